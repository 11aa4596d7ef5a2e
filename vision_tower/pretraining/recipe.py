"""The pretraining recipe: every value of `clips-mllm pretrain`, without importing torch.

Recipes live apart from the code that reads them only so that `--help` answers at once.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

from vision_tower.common.errors import UserError
from vision_tower.data.recipe import PairsRecipe
from vision_tower.model.recipe import LockRecipe, ModelRecipe
from vision_tower.text.objectives import CaptionRecipe, LossWeights, ObjectiveName, choose_objective
from vision_tower.training.recipe import TrainingRecipe


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluationRecipe:
    """Measuring inside the run; it changes nothing in the training.

    Args:
        every: optimiser steps between evaluations (the last step is measured too); 0 measures nothing.
        retrieval: a Karpathy-style JSON, as of `clips-mllm retrieve`.
        images: folder of its images; the JSON's own folder if not given.
        split: which of its splits.
        zeroshot: a folder of class folders, as of `clips-mllm zeroshot`.
        templates: text file with one prompt a line, {} where the class name goes; eight simple ones if not given.
        classes: text file with one class name a line, in the order of the sorted class folders; their names if not
            given.
        best_by: the score whose best weights are kept in `best/`; mean_recall is the mean of R@1, 5, 10 both ways.
        batch_size: images, or texts, at a time.
    """

    every: int = 0
    retrieval: str | None = None
    images: str | None = None
    split: str = "val"
    zeroshot: str | None = None
    templates: str | None = None
    classes: str | None = None
    best_by: Literal["mean_recall", "top1", "none"] = "mean_recall"
    batch_size: int = 64

    def check(self) -> None:
        """Raise UserError where something is missing."""
        if self.every < 0 or self.batch_size < 1:
            raise UserError("at least 0, and evaluation.batch_size at least 1", key="evaluation.every")
        if self.every and self.retrieval is None and self.zeroshot is None:
            raise UserError(
                "nothing to measure", key="evaluation.every", value=self.every, remedy="give retrieval or zeroshot"
            )
        needed = {"mean_recall": self.retrieval, "top1": self.zeroshot, "none": ""}[self.best_by]
        if self.every and needed is None:
            raise UserError(
                "not measured",
                key="evaluation.best_by",
                value=self.best_by,
                remedy="take another, or none to keep no best",
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class EncoderTraining(TrainingRecipe):
    """How to optimise an encoder.

    Args:
        ema_decay: keeps an average of the weights, for evaluation and the exported tower; 0 keeps none.
        compile: torch.compile of the transformer blocks.
        peak_tflops: what one device can do in this precision, for model-FLOPs utilisation; known GPUs need none.
    """

    ema_decay: float = 0.0
    compile: bool = False
    peak_tflops: float | None = None

    def check(self) -> None:
        """Raise UserError where the numbers make no sense."""
        super().check()
        if self.max_steps < 1:
            raise UserError(
                "pretraining reads an endless stream", key="training.max_steps", remedy="say how many steps to take"
            )
        if not 0 <= self.ema_decay < 1:
            raise UserError("from 0 to below 1, for example 0.9999", key="training.ema_decay", value=self.ema_decay)
        if self.peak_tflops is not None and self.peak_tflops <= 0:
            raise UserError("a positive number, in 10^12 FLOP/s", key="training.peak_tflops", value=self.peak_tflops)


@dataclasses.dataclass(frozen=True, kw_only=True)
class PretrainRecipe:
    """Pretrain a CLIPS encoder from image-text pairs.

    Args:
        output_dir: the run folder; it gets the model, `tower/`, metrics and checkpoints.
        data: the pairs.
        model: the model.
        objective: clip-web, clip-synthetic, clipa-mix (most captions from the web), coca (the same, with a
            teacher-forced captioner) or clips.
        captions: which part of a caption the text tower reads.
        loss: weights of the loss terms.
        lock: a tower that does not train.
        training: how to optimise.
        evaluation: what is measured inside the run.
    """

    output_dir: str
    data: PairsRecipe
    model: ModelRecipe
    objective: ObjectiveName = "clips"
    captions: CaptionRecipe = dataclasses.field(default_factory=CaptionRecipe)
    loss: LossWeights = dataclasses.field(default_factory=LossWeights)
    lock: LockRecipe = dataclasses.field(default_factory=LockRecipe)
    training: EncoderTraining = dataclasses.field(default_factory=EncoderTraining)
    evaluation: EvaluationRecipe = dataclasses.field(default_factory=EvaluationRecipe)

    def check(self) -> None:
        """Raise UserError where the numbers do not fit together."""
        self.data.check()
        self.model.check()
        self.captions.check(self.model.text_room)
        choose_objective(self.objective, self.loss)
        self.lock.check()
        if self.lock.tower == "text" and (self.model.vocabulary or self.model.start_from):
            raise UserError(
                "brings its own vocabulary",
                key="lock.tower",
                value="text",
                remedy="leave model.vocabulary and start_from out",
            )
        self.training.check()
        self.evaluation.check()
