"""Sections of the recipe of `clips-mllm train`: what trains, how, and what is measured on the way. No torch."""

from __future__ import annotations

import dataclasses
import math

from clips_mllm.model.recipe import AdapterRecipe
from vision_tower.common.errors import UserError
from vision_tower.training.recipe import TrainingRecipe


@dataclasses.dataclass(frozen=True, kw_only=True)
class StageRecipe:
    """What trains in a stage; the rest is frozen.

    Args:
        projector: the MLP between tower and LLM; always by its own weights, which are saved with an adapter.
        llm: the LLM, all of it or by an adapter.
        tower: the vision tower up to the hidden state that the projector reads, all of it or by an adapter.
        tower_from_layer: with `tower`, the first block that trains, counted from 0; blocks before it stay frozen.
        projector_learning_rate: of the projector, where it differs from training.learning_rate.
        llm_learning_rate: the same for the LLM.
        tower_learning_rate: the same for the tower.
        adapter: how LLM and tower train.
    """

    projector: bool = True
    llm: bool = False
    tower: bool = False
    tower_from_layer: int = 0
    projector_learning_rate: float | None = None
    llm_learning_rate: float | None = None
    tower_learning_rate: float | None = None
    adapter: AdapterRecipe = dataclasses.field(default_factory=AdapterRecipe)

    def check(self) -> None:
        """Raise UserError where nothing would train, or a value has no meaning."""
        if not (self.projector or self.llm or self.tower):
            raise UserError(
                "nothing trains", key="stage", remedy="set at least one of projector, llm and tower to true"
            )
        if self.tower_from_layer and not self.tower:
            raise UserError("the tower is frozen", key="stage.tower_from_layer", remedy="set stage.tower=true")
        for name in ("projector", "llm", "tower"):
            rate = getattr(self, f"{name}_learning_rate")
            if rate is not None and not getattr(self, name):
                raise UserError(
                    f"stage.{name}_learning_rate={rate}: the {name} is frozen", remedy=f"set stage.{name}=true"
                )
            if rate is not None and not 0 <= rate < math.inf:
                raise UserError(f"stage.{name}_learning_rate={rate}: a number from 0")
        adapter = self.adapter
        if adapter.kind == "none":
            return
        if not (self.llm or self.tower):
            raise UserError(
                "adapts LLM or tower", key="stage.adapter.kind", value=adapter.kind, remedy="set stage.llm=true"
            )
        if adapter.kind == "qlora" and not self.llm:
            raise UserError(
                "it is the LLM that is in 4 bits", key="stage.adapter.kind", value="qlora", remedy="set stage.llm=true"
            )
        if adapter.rank < 1 or adapter.alpha < 1 or not 0 <= adapter.dropout < 1:
            raise UserError("rank and alpha are at least 1, dropout is from 0 to below 1", key="stage.adapter")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainEvaluationRecipe:
    """What is measured inside the run. Nothing that the run draws or learns depends on it, but for an early stop.

    Args:
        every: optimiser steps between measurements; 0 measures nothing.
        file: held-out conversations of the same kind as data.file.
        images: folder that their image paths are relative to, where it is not data.images.
        share: without `file`, the share of data.file that is held out and not trained on.
        batch_size: samples in one forward pass of one device.
        tasks: recipe of `clips-mllm evaluate` (configs/eval/): its lmms-eval tasks are measured too.
        scorer: with `tasks`, what measures them: MODULE:FUNCTION, called with the recipe's path, returns an object
            with `evaluate(mllm, step) -> dict[str, float]` and those scores' `names`.
        best_by: which number tells the best: "loss", or a score of `tasks`, larger is better.
        keep_best: end with the best weights instead of the last; their checkpoint is never removed.
        patience: stop after so many measurements without a better one; 0 never stops early.
    """

    every: int = 0
    file: str | None = None
    images: str | None = None
    share: float = 0.0
    batch_size: int = 8
    tasks: str | None = None
    scorer: str = "clips_eval.in_training:load_scorer"
    best_by: str = "loss"
    keep_best: bool = False
    patience: int = 0

    def check(self, save_every: int) -> None:
        """Raise UserError where the values do not fit each other."""
        if not self.every:
            if self.keep_best or self.patience:
                raise UserError(
                    "nothing is measured to tell the best by", key="evaluation.every", value="0", remedy="set it"
                )
            return
        if self.file is None and not self.share and self.tasks is None:
            raise UserError(
                "nothing to measure", key="evaluation.every", remedy="give evaluation.file, .share or .tasks"
            )
        if not 0 <= self.share < 1:
            raise UserError("from 0 to below 1, for example 0.01", key="evaluation.share", value=self.share)
        if self.batch_size < 1:
            raise UserError("at least 1", key="evaluation.batch_size", value=self.batch_size)
        if self.best_by == "loss" and (self.keep_best or self.patience) and self.file is None and not self.share:
            raise UserError(
                "no held-out loss", key="evaluation.best_by", value="loss", remedy="give evaluation.file or .share"
            )
        if self.best_by != "loss" and self.tasks is None:
            raise UserError(
                "a score of tasks",
                key="evaluation.best_by",
                value=self.best_by,
                remedy="give evaluation.tasks, or take loss",
            )
        if self.keep_best and (not save_every or save_every % self.every):
            raise UserError(
                f"training.save_every={save_every} must be a multiple of evaluation.every={self.every}, "
                f"so that there is a checkpoint of the best",
                key="evaluation.keep_best",
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class MllmTraining(TrainingRecipe):
    """How to optimise an MLLM.

    Args:
        compile: torch.compile of the transformer blocks.
        liger: fused Triton kernels of the package liger-kernel; on GPUs, where it is installed.
    """

    compile: bool = False
    liger: bool = False
