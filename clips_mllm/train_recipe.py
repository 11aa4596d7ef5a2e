"""The recipe of `clips-mllm train`: every value of the two LLaVA stages, without importing torch."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Literal

from clips_mllm.prompts import TemplateName
from clips_mllm.stage_recipe import MllmTraining, StageRecipe, TrainEvaluationRecipe
from vision_tower.errors import UserError
from vision_tower.files import read_object

Attention = Literal["auto", "eager", "sdpa", "flash_attention_2"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class MllmRecipe:
    """What the MLLM is made of: a tower and an LLM, or an earlier stage's checkpoint.

    Args:
        tower: folder or hub id of a stock vision tower with its image processor.
        llm: folder or hub id of a LLaMA-family causal LM.
        checkpoint: folder or hub id of a LLaVA checkpoint, instead of tower and llm.
        feature_layer: which hidden state of the tower the projector reads; -2 is the last but one. Several, as
            [-2, -5], are concatenated.
        feature_select: "full" keeps every position, "default" drops the class token; "auto" keeps the patches alone.
        image_size: side in pixels for which the tower's positions are computed anew; none keeps its own.
        tiles: most tiles in which a picture is shown again at a higher resolution, beside the whole of it; the
            checkpoint is then one of LLaVA-NeXT's classes. None shows the whole alone, in LLaVA's.
        word_steps: steps in which the projector alone first learns to put patches at the words of their captions
            (clips_mllm/word_start.py), for LLMs too small to tell it where; 0 does without.
        attention: how attention is computed; auto is eager in bf16 on CPUs (the fastest), else transformers' choice.
    """

    tower: str | None = None
    llm: str | None = None
    checkpoint: str | None = None
    feature_layer: int | list[int] = -2
    feature_select: Literal["auto", "full", "default"] = "auto"
    image_size: int | None = None
    tiles: int | None = None
    word_steps: int = 0
    attention: Attention = "auto"

    def check(self) -> None:
        """Raise UserError unless exactly one of the two ways is given, and tiles where they can be chosen."""
        pair = self.tower is not None and self.llm is not None
        if pair == (self.checkpoint is not None) or (self.tower is None) != (self.llm is None):
            raise UserError("model: give either 'checkpoint', or both 'tower' and 'llm'")
        if self.tiles is not None and self.checkpoint is not None:
            raise UserError("model.tiles: a checkpoint brings its own; choose them in stage 1, with 'tower' and 'llm'")
        if self.tiles is not None and self.tiles < 2:
            raise UserError(f"model.tiles={self.tiles}: at least 2; leave it out to show pictures whole")
        for name, given, own in (
            ("image_size", self.image_size, None),
            ("feature_layer", self.feature_layer, -2),
            ("feature_select", self.feature_select, "auto"),
        ):
            if given != own and self.checkpoint is not None:
                raise UserError(
                    f"model.{name}={given}: a checkpoint brings its own; choose it in stage 1, with 'tower' and 'llm'"
                )
        if self.word_steps < 0:
            raise UserError(f"model.word_steps={self.word_steps}: 0 (none) or a number of steps")
        if self.word_steps and (self.tiles is not None or self.checkpoint is not None):
            raise UserError("model.word_steps: a start of stage 1 without tiles; leave it out")


def check_feature_layer(feature_layer: int | list[int], layers: int) -> None:
    """Raise UserError unless a tower of so many layers has these hidden states; the first is what enters layer 1."""
    states = layers + 1
    for layer in [feature_layer] if isinstance(feature_layer, int) else feature_layer:
        if not -states <= layer < states:
            raise UserError(
                f"model.feature_layer={layer}: the tower has hidden states 0 to {states - 1}, or {-states} to -1 from "
                "the end; -2 is what LLaVA reads"
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class InstructionSource:
    """One source of conversations.

    Args:
        file: LLaVA JSON (.json), JSONL (.jsonl) or Parquet (.parquet, globs allowed), a folder of a `datasets` data
            set, or one on the hub as hf://datasets/OWNER/NAME.
        images: folder that the rows' image paths are relative to; not needed where the pictures are in the file.
        split: which split of a folder or hub data set.
        weight: passes over this source in one epoch: 0.5 takes a fixed random half of it, 2 takes it twice.
        cap: most samples of it in one epoch, chosen at random; 0 is no limit.
    """

    file: str
    images: str | None = None
    split: str = "train"
    weight: float = 1.0
    cap: int = 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class InstructionRecipe:
    """Which conversations, and how they become tokens.

    Args:
        file: LLaVA JSON (.json), JSONL (.jsonl) or Parquet (.parquet, globs allowed), a folder of a `datasets` data
            set, or one on the hub as hf://datasets/OWNER/NAME.
        images: folder that the rows' image paths are relative to; not needed where the pictures are in the file.
        mixture: several sources with file, images, split, weight and cap each, instead of the two values above.
        template: how a conversation is written; the checkpoint carries it on. `tokenizer` is the LLM's own.
        max_length: longest sequence in tokens, pictures included.
        square: squash the picture to the tower's square, pad it with the mean colour first, or crop it as the tower's
            own processor does.
        most_bad: share of unusable samples above which the run stops.
        group_by_length: batches of like length and modality, for less padding.
        text_first: with group_by_length, what has no picture comes first in an epoch: a small LLM learns a kind of
            question from words before it is asked about pictures.
        packing: lay several short samples of a batch into one row; they do not see each other.
        seed: of the random part of a source that weight or cap takes.
        feature_cache: a folder that keeps what a frozen tower says of each picture, shared by stages and runs; none
            runs the tower in every step. A picture takes patches x width values (docs/planning.md).
    """

    file: str | None = None
    images: str | None = None
    mixture: tuple[InstructionSource, ...] = ()
    template: TemplateName
    max_length: int = 2048
    square: Literal["squash", "pad", "crop"] = "squash"
    most_bad: float = 0.01
    group_by_length: bool = False
    text_first: bool = False
    packing: bool = False
    seed: int = 0
    feature_cache: str | None = None

    @property
    def sources(self) -> tuple[InstructionSource, ...]:
        """The mixture, or the one source."""
        return self.mixture if self.file is None else (InstructionSource(file=self.file, images=self.images),)

    def check(self) -> None:
        """Raise UserError where it does not say what to read, or a number has no meaning."""
        if (self.file is None) == (not self.mixture):
            raise UserError("data.file: say where the conversations are, or give several sources as data.mixture")
        for number, source in enumerate(self.mixture):
            place = f"data.mixture[{number}]"
            if not 0 < source.weight < math.inf:
                raise UserError(f"{place}.weight={source.weight}: must be a number above 0; or leave the source out")
            if source.cap < 0:
                raise UserError(f"{place}.cap={source.cap}: 0 (no limit) or a number of samples")
        if not 0 <= self.most_bad <= 1:
            raise UserError(f"data.most_bad={self.most_bad}: a share from 0 to 1")
        if self.text_first and not self.group_by_length:
            raise UserError("data.text_first: batches are of one kind by data.group_by_length; set it too")
        if self.max_length < 2:
            raise UserError(f"data.max_length={self.max_length}: at least 2 tokens")


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
            raise UserError("data.feature_cache: pictures in tiles are not kept; take the cache out of the recipe")
        if self.stage.adapter.kind != "none" and self.model.checkpoint is None:
            raise UserError(
                "model.checkpoint: an adapter is saved without its base, which must be a checkpoint; give a run of "
                "stage 1 (configs/mllm/*_align.yaml) instead of tower and llm"
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
                f"model.word_steps={self.model.word_steps}: under ZeRO-3 the projector is in pieces before it can "
                "start; take configs/deepspeed/zero2.json, or leave it out"
            )
        raise UserError(
            f"training.deepspeed={self.training.deepspeed}: ZeRO-3 cannot divide 4-bit weights; take "
            "configs/deepspeed/zero2.json, or stage.adapter.kind=lora"
        )
