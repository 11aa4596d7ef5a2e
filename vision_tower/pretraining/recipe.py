"""The recipe of `clips-mllm pretrain`.

Separate from the code that uses it, so that `--help` does not import torch.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

from vision_tower.common.errors import UserError
from vision_tower.common.recipe import check_ranges, refuse_unused
from vision_tower.data.recipe import PairsRecipe
from vision_tower.model.recipe import LockRecipe, ModelRecipe
from vision_tower.text.objectives import CaptionRecipe, LossWeights, ObjectiveName, choose_objective
from vision_tower.training.recipe import TrainingRecipe


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluationRecipe:
    """Evaluation during the run; it does not affect training.

    Args:
        every: optimizer steps between evaluations, plus one after the last step; 0 disables evaluation.
        retrieval: Karpathy-style JSON, as for `clips-mllm retrieve`.
        images: folder of its images; default: the folder of the JSON.
        split: split of the JSON to evaluate.
        zeroshot: folder with one folder of images per class, as for `clips-mllm zeroshot`.
        templates: text file with one prompt per line, with {} for the class name; default: eight simple prompts.
        classes: text file with one class name per line, in the order of the sorted class folders; default: the names of
            the folders.
        best_by: score that selects the weights saved in `best/`; mean_recall is the mean of R@1, R@5 and R@10 in both
            directions.
        batch_size: images, or texts, per batch.
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
        """Raise UserError if values are out of range, missing, or without effect."""
        check_ranges(self, "evaluation.", every="[0, inf)", batch_size="[1, inf)")
        if not self.every:
            fields, remedy = [field.name for field in dataclasses.fields(self)], "set evaluation.every, or remove it"
            refuse_unused(self, fields, "has no effect with evaluation.every=0", "evaluation.", remedy)
            return
        if self.retrieval is None and self.zeroshot is None:
            raise UserError("no data", key="evaluation.every", value=self.every, remedy="set .retrieval or .zeroshot")
        data = {"mean_recall": self.retrieval, "top1": self.zeroshot, "none": ""}[self.best_by]
        if data is None:
            remedy = "choose another score, or none to save no best weights"
            raise UserError("not computed with this data", key="evaluation.best_by", value=self.best_by, remedy=remedy)


@dataclasses.dataclass(frozen=True, kw_only=True)
class EncoderTraining(TrainingRecipe):
    """Optimization of an encoder.

    Args:
        ema_decay: decay of an exponential moving average of the weights, which is evaluated and exported; 0 disables.
        compile: apply torch.compile to the transformer blocks.
        peak_tflops: peak TFLOP/s of one device in this precision, for MFU; known for common GPUs.
    """

    ema_decay: float = 0.0
    compile: bool = False
    peak_tflops: float | None = None

    def check(self) -> None:
        """Raise UserError if a value is out of range."""
        super().check()
        if self.max_steps < 1:
            raise UserError(
                "required for an endless stream", key="training.max_steps", value=self.max_steps, remedy="set it"
            )
        check_ranges(self, "training.", ema_decay="[0, 1)", peak_tflops="(0, inf)")


@dataclasses.dataclass(frozen=True, kw_only=True)
class PretrainRecipe:
    """Pretrain a CLIPS encoder from image-text pairs.

    Args:
        output_dir: run folder for the model, `tower/`, metrics and checkpoints.
        data: image-text pairs.
        model: model architecture.
        objective: clip-web, clip-synthetic, clipa-mix (mostly web captions), coca (as clipa-mix, with a teacher-forced
            captioner) or clips.
        captions: part of each caption that the text tower reads.
        loss: weights of the loss terms.
        lock: tower to keep frozen.
        training: optimization.
        evaluation: evaluation during the run.
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
        """Raise UserError if values are out of range or contradict each other."""
        self.data.check()
        self.model.check()
        self.captions.check(self.model.text_room)
        objective = choose_objective(self.objective, self.loss)
        if "mix" not in objective.streams:
            problem = f"has no effect with objective={self.objective}, which does not mix captions"
            remedy = "remove it, or set the objective to clipa-mix or coca"
            refuse_unused(self.captions, ["web_share"], problem, "captions.", remedy)
        self.lock.check()
        if self.lock.tower == "text" and (self.model.vocabulary or self.model.start_from):
            remedy = "remove model.vocabulary and model.start_from"
            raise UserError("has its own vocabulary", key="lock.tower", value="text", remedy=remedy)
        self.training.check()
        self.evaluation.check()
