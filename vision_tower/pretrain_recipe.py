"""The pretraining recipe: every value of `clips-mllm pretrain`, without importing torch.

Recipes live apart from the code that reads them only so that `--help` answers at once.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

from vision_tower.errors import UserError
from vision_tower.objectives import CaptionRecipe, LossWeights, ObjectiveName, choose_objective
from vision_tower.pairs_recipe import PairsRecipe
from vision_tower.training_recipe import TrainingRecipe


@dataclasses.dataclass(frozen=True, kw_only=True)
class TowerRecipe:
    """One transformer.

    Args:
        width: hidden size.
        layers: blocks.
        mlp: width of the MLP.
        heads: attention heads.
    """

    width: int
    layers: int
    mlp: int
    heads: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelRecipe:
    """The pretraining model.

    Args:
        image: image tower.
        text: text tower.
        captioner: captioner; objectives without one leave it out.
        joint: width of the shared embedding space.
        image_size: side of the square picture, in pixels.
        patch_size: side of a patch, in pixels; it must divide the image size.
        class_token: a class token before the patches, attended but not pooled, as in published weights (the tower is
            then a ViTModel, else a SiglipVisionModel).
        positions: of the image tower; sincos is fixed and recomputed at another size, learned starts from it.
        text_length: context of the text tower, with all special pieces.
        padding: of texts: attended, as in published weights, or masked, so that batches can be trimmed to their longest
            text (faster; open_clip knows no such model).
        target_length: learnable queries, that is the longest caption to predict.
        vocabulary: a WordPiece vocab.txt, or none to train one on the captions.
        vocabulary_size: rows of the token embedding.
        start_from: folder of an encoder whose weights and vocabulary the run starts from, usually at a smaller image
            size (the optimiser starts afresh).
    """

    image: TowerRecipe
    text: TowerRecipe
    captioner: TowerRecipe
    joint: int
    image_size: int
    patch_size: int
    class_token: bool = False
    positions: Literal["sincos", "learned"] = "sincos"
    text_length: int = 80
    padding: Literal["attended", "masked"] = "attended"
    target_length: int = 128
    vocabulary: str | None = None
    vocabulary_size: int = 32_000
    start_from: str | None = None

    @property
    def text_room(self) -> int:
        """Word pieces of a caption that the text tower holds, beside `[bos]`, `[eos]` and `[CLS]`."""
        return self.text_length - 3

    def check(self) -> None:
        """Raise UserError where the numbers do not fit together."""
        for name, value in self._sizes().items():
            if value < 1:
                raise UserError(f"model.{name}={value}: at least 1")
        if self.image_size % self.patch_size:
            down = self.image_size // self.patch_size * self.patch_size
            near = f"{down} or {down + self.patch_size}" if down else str(self.patch_size)
            raise UserError(
                f"model.image_size={self.image_size}: patch_size={self.patch_size} does not divide it; take {near}"
            )
        for name, tower in (("image", self.image), ("text", self.text), ("captioner", self.captioner)):
            if tower.width % tower.heads:
                raise UserError(f"model.{name}.heads={tower.heads}: does not divide width={tower.width}; change one")
        if self.start_from is not None and self.vocabulary is not None:
            raise UserError(
                f"model.vocabulary={self.vocabulary}: the encoder in model.start_from brings its own; leave it out"
            )
        if self.text_length < 4 or self.target_length < 3:
            raise UserError("model.text_length: at least 4, and model.target_length at least 3; nothing else would fit")
        if self.image.width % 4:
            raise UserError(f"model.image.width={self.image.width}: sin-cos positions need a multiple of 4")

    def _sizes(self) -> dict[str, int]:
        """Every number of the recipe by its dotted name."""
        sizes = {name: getattr(self, name) for name in ("joint", "image_size", "patch_size", "vocabulary_size")}
        for tower in ("image", "text", "captioner"):
            sizes |= {f"{tower}.{name}": value for name, value in dataclasses.asdict(getattr(self, tower)).items()}
        return sizes


@dataclasses.dataclass(frozen=True, kw_only=True)
class LockRecipe:
    """A tower that does not train (LiT).

    Args:
        tower: which tower, with its projection, keeps the weights of the checkpoint.
        checkpoint: folder of a `pretrain` run or a converted encoder; its tower must have this recipe's sizes. A text
            tower brings its vocabulary.
    """

    tower: Literal["none", "image", "text"] = "none"
    checkpoint: str | None = None

    def check(self) -> None:
        """Raise UserError where one of the two is missing."""
        if (self.tower == "none") != (self.checkpoint is None):
            raise UserError("lock: tower and checkpoint belong together; give both, or neither")


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluationRecipe:
    """Measuring inside the run; it changes nothing in the training.

    Args:
        every: optimiser steps between evaluations (the last step is measured too); 0 measures nothing.
        retrieval: a Karpathy-style JSON, as of `clips-mllm retrieve`.
        images: folder of its pictures; the JSON's own folder if not given.
        split: which of its splits.
        zeroshot: a folder of class folders, as of `clips-mllm zeroshot`.
        templates: text file with one prompt a line, {} where the class name goes; eight simple ones if not given.
        classes: text file with one class name a line, in the order of the sorted class folders; their names if not
            given.
        best_by: the score whose best weights are kept in `best/`; mean_recall is the mean of R@1, 5, 10 both ways.
        batch_size: pictures, or texts, at a time.
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
            raise UserError("evaluation.every: at least 0, and evaluation.batch_size at least 1")
        if self.every and self.retrieval is None and self.zeroshot is None:
            raise UserError(f"evaluation.every={self.every}: nothing to measure; give retrieval or zeroshot")
        needed = {"mean_recall": self.retrieval, "top1": self.zeroshot, "none": ""}[self.best_by]
        if self.every and needed is None:
            raise UserError(f"evaluation.best_by={self.best_by}: not measured; take another, or none to keep no best")


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
            raise UserError("training.max_steps: pretraining reads an endless stream; say how many steps to take")
        if not 0 <= self.ema_decay < 1:
            raise UserError(f"training.ema_decay={self.ema_decay}: from 0 to below 1, for example 0.9999")
        if self.peak_tflops is not None and self.peak_tflops <= 0:
            raise UserError(f"training.peak_tflops={self.peak_tflops}: a positive number, in 10^12 FLOP/s")


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
            raise UserError("lock.tower=text: brings its own vocabulary; leave model.vocabulary and start_from out")
        self.training.check()
        self.evaluation.check()
