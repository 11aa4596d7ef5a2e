"""The recipe of `clips-mllm train`: every value of the two LLaVA stages, without importing torch."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from clips_mllm.data.recipe import InstructionRecipe
from clips_mllm.model.recipe import MllmRecipe
from clips_mllm.training.stage_recipe import MllmTraining, StageRecipe, TrainEvaluationRecipe
from vision_tower.common.errors import UserError
from vision_tower.common.files import read_object


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainRecipe:
    """Train a multimodal LLM: stage 1 aligns the projector, stage 2 finetunes the LLM too.

    Args:
        output_dir: the run folder; it gets a stock LLaVA checkpoint or a PEFT adapter, metrics and checkpoints.
        model: what the MLLM is made of.
        data: the conversations.
        stage: what trains.
        training: how to optimise.
        evaluation: what is measured inside the run.
    """

    output_dir: str
    model: MllmRecipe
    data: InstructionRecipe
    stage: StageRecipe = dataclasses.field(default_factory=StageRecipe)
    training: MllmTraining = dataclasses.field(default_factory=MllmTraining)
    evaluation: TrainEvaluationRecipe = dataclasses.field(default_factory=TrainEvaluationRecipe)

    def check(self) -> None:
        """Raise UserError where a value has no meaning, or two do not fit each other."""
        self.model.check()
        self.data.check()
        self.stage.check()
        self.training.check()
        self.evaluation.check(self.training.save_every)
        if self.model.tiles is not None and self.data.feature_cache is not None:
            raise UserError(
                "images in tiles are not kept", key="data.feature_cache", remedy="take the cache out of the recipe"
            )
        if self.stage.adapter.kind != "none" and self.model.checkpoint is None:
            raise UserError(
                "an adapter is saved without its base, which must be a checkpoint",
                key="model.checkpoint",
                remedy="give a run of stage 1 (configs/mllm/*_align.yaml) instead of tower and llm",
            )
        self._check_zero()

    def _check_zero(self) -> None:
        """Raise UserError where ZeRO-3 would have to divide 4-bit weights, or has divided what starts by words."""
        four_bits = self.stage.adapter.kind == "qlora"
        if self.training.deepspeed is None or not (four_bits or self.model.word_steps):
            return
        zero = read_object(Path(self.training.deepspeed)).get("zero_optimization", {})
        if zero.get("stage") != 3:
            return
        if self.model.word_steps:
            raise UserError(
                "under ZeRO-3 the projector is in pieces before it can start",
                key="model.word_steps",
                value=self.model.word_steps,
                remedy="take configs/deepspeed/zero2.json, or leave it out",
            )
        raise UserError(
            "ZeRO-3 cannot divide 4-bit weights",
            key="training.deepspeed",
            value=self.training.deepspeed,
            remedy="take configs/deepspeed/zero2.json, or stage.adapter.kind=lora",
        )
