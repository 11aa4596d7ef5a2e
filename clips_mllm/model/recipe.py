"""Sections of the training recipe that say what the MLLM is. No torch."""

from __future__ import annotations

import dataclasses
from typing import Literal

from vision_tower.common.errors import UserError

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
        tiles: most tiles in which an image is shown again at a higher resolution, beside the whole of it; the
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
            raise UserError("give either 'checkpoint', or both 'tower' and 'llm'", key="model")
        if self.tiles is not None and self.checkpoint is not None:
            raise UserError(
                "a checkpoint brings its own",
                key="model.tiles",
                remedy="choose them in stage 1, with 'tower' and 'llm'",
            )
        if self.tiles is not None and self.tiles < 2:
            raise UserError(
                "at least 2", key="model.tiles", value=self.tiles, remedy="leave it out to show images whole"
            )
        for name, given, own in (
            ("image_size", self.image_size, None),
            ("feature_layer", self.feature_layer, -2),
            ("feature_select", self.feature_select, "auto"),
        ):
            if given != own and self.checkpoint is not None:
                raise UserError(
                    f"model.{name}={given}: a checkpoint brings its own",
                    remedy="choose it in stage 1, with 'tower' and 'llm'",
                )
        if self.word_steps < 0:
            raise UserError("0 (none) or a number of steps", key="model.word_steps", value=self.word_steps)
        if self.word_steps and (self.tiles is not None or self.checkpoint is not None):
            raise UserError("a start of stage 1 without tiles", key="model.word_steps", remedy="leave it out")


def check_feature_layer(feature_layer: int | list[int], layers: int) -> None:
    """Raise UserError unless a tower of so many layers has these hidden states; the first is what enters layer 1."""
    states = layers + 1
    for layer in [feature_layer] if isinstance(feature_layer, int) else feature_layer:
        if not -states <= layer < states:
            raise UserError(
                f"the tower has hidden states 0 to {states - 1}, or {-states} to -1 from the end",
                key="model.feature_layer",
                value=layer,
                remedy="-2 is what LLaVA reads",
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdapterRecipe:
    """How LLM and tower train: by all of their weights, or by low-rank adapters beside frozen ones (PEFT).

    Args:
        kind: none trains the weights themselves; lora (arXiv 2106.09685), dora (arXiv 2402.09353), or qlora, which is
            LoRA beside an LLM in 4 bits (nf4 with double quantisation, arXiv 2305.14314).
        rank: of the adapter's two matrices.
        alpha: the adapter's output is scaled by alpha / rank.
        dropout: on the adapter's input.
    """

    kind: Literal["none", "lora", "dora", "qlora"] = "none"
    rank: int = 128
    alpha: int = 256
    dropout: float = 0.05
