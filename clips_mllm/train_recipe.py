"""The recipe of `clips-mllm train`: every value of the two LLaVA stages, without importing torch."""

from __future__ import annotations

import dataclasses
from typing import Literal

from clips_mllm.prompts import TemplateName
from clips_mllm.stage_recipe import MllmTraining, StageRecipe, TrainEvaluationRecipe
from vision_tower.errors import UserError


@dataclasses.dataclass(frozen=True, kw_only=True)
class MllmRecipe:
    """What the MLLM is made of: a tower and an LLM, or an earlier stage's checkpoint.

    Args:
        tower: folder or hub id of a stock vision tower with its image processor.
        llm: folder or hub id of a LLaMA-family causal LM.
        checkpoint: folder or hub id of a LLaVA checkpoint, instead of tower and llm.
        feature_layer: which hidden state of the tower the projector reads; -2 is the last but one.
        feature_select: "full" for towers without a class token, "default" drops the class token.
        attention: how attention is computed; auto leaves the choice to transformers.
    """

    tower: str | None = None
    llm: str | None = None
    checkpoint: str | None = None
    feature_layer: int = -2
    feature_select: Literal["full", "default"] = "full"
    attention: Literal["auto", "eager", "sdpa", "flash_attention_2"] = "auto"

    def check(self) -> None:
        """Raise UserError unless exactly one of the two ways is given."""
        pair = self.tower is not None and self.llm is not None
        if pair == (self.checkpoint is not None) or (self.tower is None) != (self.llm is None):
            raise UserError("model: give either 'checkpoint', or both 'tower' and 'llm'")


@dataclasses.dataclass(frozen=True, kw_only=True)
class InstructionRecipe:
    """Which conversations, and how they become tokens.

    Args:
        file: LLaVA JSON or JSONL.
        images: folder that the rows' image paths are relative to.
        template: how a conversation is written; the checkpoint carries it on.
        max_length: longest sequence in tokens, pictures included.
        square: squash the picture to the tower's square, or pad it with the mean colour first.
        most_bad: share of unusable samples above which the run stops.
        group_by_length: batches of like length and modality, for less padding.
    """

    file: str
    images: str
    template: TemplateName
    max_length: int = 2048
    square: Literal["squash", "pad"] = "squash"
    most_bad: float = 0.01
    group_by_length: bool = False


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
        self.stage.check()
        self.training.check()
        self.evaluation.check(self.training.save_every)
        if self.stage.adapter.kind != "none" and self.model.checkpoint is None:
            raise UserError(
                "model.checkpoint: an adapter is saved without its base, which must be a checkpoint; give a run of "
                "stage 1 (configs/mllm/*_align.yaml) instead of tower and llm"
            )
