"""The two stock image towers behind one face.

SiglipVisionModel   patches only: what is trained here by default
ViTModel            a class token before the patches, attended but not pooled: the published weights

Both are pre-norm transformers without a LayerNorm before the first block, as CLIPS wants them.
"""

from __future__ import annotations

import dataclasses
from typing import Any, TypeAlias

import torch
from torch import nn
from transformers import SiglipVisionConfig, SiglipVisionModel, ViTConfig, ViTModel

TowerConfig: TypeAlias = SiglipVisionConfig | ViTConfig
ImageTower: TypeAlias = SiglipVisionModel | ViTModel

CONFIGS: dict[str, type[TowerConfig]] = {"siglip_vision_model": SiglipVisionConfig, "vit": ViTConfig}


def tower_config(given: dict[str, Any] | TowerConfig | None) -> TowerConfig:
    """The stock config of a mapping, by its `model_type`."""
    if isinstance(given, (SiglipVisionConfig, ViTConfig)):
        return given
    values = dict(given or {})
    return CONFIGS[values.get("model_type", "siglip_vision_model")](**values)


def build_tower(config: TowerConfig) -> ImageTower:
    """A freshly initialised tower."""
    return ViTModel._from_config(config) if has_class_token(config) else SiglipVisionModel._from_config(config)


def has_class_token(config: TowerConfig) -> bool:
    """Whether the sequence begins with a class token."""
    return isinstance(config, ViTConfig)


@dataclasses.dataclass(frozen=True)
class TowerParts:
    """What CLIPS reaches for inside a stock tower.

    Attributes:
        positions: (p, w), or (1, 1 + p, w) with a class token.
        norm: the LayerNorm that CLIPS puts behind the mean of the patches.
        absent: parameters of the stock class that CLIPS has not; zero for ever.
    """

    positions: nn.Parameter
    norm: nn.LayerNorm
    absent: list[nn.Parameter]


def tower_parts(tower: ImageTower) -> TowerParts:
    """The parts of either tower."""
    if isinstance(tower, ViTModel):
        # The pooler stays, as zeros, so that a saved tower is whole for the stock class.
        absent = [tower.embeddings.patch_embeddings.projection.bias, *tower.pooler.parameters()]
        return TowerParts(tower.embeddings.position_embeddings, tower.layernorm, absent)
    embeddings = tower.embeddings
    return TowerParts(embeddings.position_embedding.weight, tower.post_layernorm, [embeddings.patch_embedding.bias])


def patch_tokens(tower: ImageTower, pixel_values: torch.Tensor) -> torch.Tensor:
    """The last block's patch tokens, not normalised, (b, p, w); without the class token where there is one."""
    hidden = tower.embeddings(pixel_values)
    if isinstance(tower, ViTModel):
        for layer in tower.layers:
            hidden = layer(hidden)
        return hidden[:, 1:]
    return tower.encoder(inputs_embeds=hidden).last_hidden_state
