"""Recipe sections for the MLLM and its adapters. Imports no torch, so that `--help` is fast."""

from __future__ import annotations

import dataclasses
from typing import Literal

from vision_tower.common.errors import UserError
from vision_tower.common.recipe import check_ranges, refuse_unused

Attention = Literal["auto", "eager", "sdpa", "flash_attention_2"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class MllmRecipe:
    """Model to train: a tower and an LLM, or the checkpoint of an earlier stage.

    Args:
        tower: folder or hub id of a stock vision tower with its image processor.
        llm: folder or hub id of a LLaMA-family causal LM.
        checkpoint: folder or hub id of a LLaVA checkpoint, instead of tower and llm.
        feature_layer: hidden state of the tower that the projector reads; -2 is the output of the second-last layer.
            A list, such as [-2, -5], concatenates several.
        feature_select: `full` keeps every position, `default` drops the class token, `auto` drops it if there is one.
        image_size: image side in pixels, if not the tower's own; position embeddings are resized.
        tiles: maximum number of high-resolution tiles per image, in addition to the whole image. The checkpoint then
            has LLaVA-NeXT's classes. By default an image is not tiled, and the classes are LLaVA's.
        projector: file of initial projector weights (safetensors, or LLaVA's mm_projector.bin), like LLaVA's
            --pretrain_mm_mlp_adapter; with tower and llm.
        projector_init: without `projector`, its initialization: `default` is torch's for nn.Linear, as in LLaVA;
            `standardized` normalizes the tower's features over a sample of the images.
        attention: attention implementation; `auto` is eager for bf16 on CPUs (fastest there), else transformers' own.
    """

    tower: str | None = None
    llm: str | None = None
    checkpoint: str | None = None
    feature_layer: int | list[int] = -2
    feature_select: Literal["auto", "full", "default"] = "auto"
    image_size: int | None = None
    tiles: int | None = None
    projector: str | None = None
    projector_init: Literal["default", "standardized"] = "default"
    attention: Attention = "auto"

    def check(self) -> None:
        """Raise UserError for contradicting or out-of-range values."""
        pair = self.tower is not None and self.llm is not None
        if pair == (self.checkpoint is not None) or (self.tower is None) != (self.llm is None):
            raise UserError("set either 'checkpoint', or both 'tower' and 'llm'", key="model")
        check_ranges(self, "model.", tiles="[2, inf)")
        if self.checkpoint is not None:
            fixed = ("tiles", "image_size", "feature_layer", "feature_select", "projector", "projector_init")
            remedy = "set it in stage 1, with 'tower' and 'llm'"
            refuse_unused(self, fixed, "has no effect with model.checkpoint, which fixes it", "model.", remedy)
        if self.projector is not None:
            refuse_unused(self, ["projector_init"], "has no effect with model.projector", "model.", "remove one")


def check_feature_layer(feature_layer: int | list[int], layers: int) -> None:
    """Raise UserError if a tower of `layers` layers has no such hidden state; state 0 is the input of layer 1."""
    states = layers + 1
    for layer in [feature_layer] if isinstance(feature_layer, int) else feature_layer:
        if not -states <= layer < states:
            raise UserError(
                f"the tower has hidden states 0 to {states - 1}, or {-states} to -1 from the end",
                key="model.feature_layer",
                value=layer,
                remedy="use -2, as LLaVA does",
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdapterRecipe:
    """PEFT adapters on the LLM and the tower.

    Args:
        kind: `none` trains all weights; `lora` (arXiv 2106.09685), `dora` (arXiv 2402.09353), or `qlora`: LoRA on a
            4-bit LLM (nf4 with double quantization, arXiv 2305.14314).
        rank: rank of the adapter matrices.
        alpha: the adapter's output is scaled by alpha / rank.
        dropout: dropout probability on the adapter's input.
    """

    kind: Literal["none", "lora", "dora", "qlora"] = "none"
    rank: int = 128
    alpha: int = 256
    dropout: float = 0.05
