"""One interface over the two stock vision towers.

SiglipVisionModel   patches only; the default of our recipes
ViTModel            prepends a class token, which is attended to but not pooled; the published weights

Both are pre-norm transformers without a LayerNorm before the first block, as in CLIPS.
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


def tower_config(config: dict[str, Any] | TowerConfig | None) -> TowerConfig:
    """Convert a mapping to the stock config of its `model_type`; return configs unchanged."""
    if isinstance(config, (SiglipVisionConfig, ViTConfig)):
        return config
    values = dict(config or {})
    return CONFIGS[values.get("model_type", "siglip_vision_model")](**values)


def build_tower(config: TowerConfig) -> ImageTower:
    """Build a freshly initialized tower."""
    return ViTModel._from_config(config) if has_class_token(config) else SiglipVisionModel._from_config(config)


def has_class_token(config: TowerConfig) -> bool:
    """Return True if the sequence starts with a class token."""
    return isinstance(config, ViTConfig)


@dataclasses.dataclass(frozen=True)
class TowerParts:
    """Parts of a stock tower that CLIPS accesses directly.

    Attributes:
        positions: position embeddings (p, w), or (1, 1 + p, w) with a class token.
        norm: LayerNorm, which CLIPS applies to the mean of the patches.
        absent: parameters the stock class has but CLIPS lacks; kept at zero and frozen.
    """

    positions: nn.Parameter
    norm: nn.LayerNorm
    absent: list[nn.Parameter]


def tower_parts(tower: ImageTower) -> TowerParts:
    """Return the parts of either tower."""
    if isinstance(tower, ViTModel):
        # The pooler is kept, as zeros, so that the stock class loads a saved tower without missing keys.
        absent = [tower.embeddings.patch_embeddings.projection.bias, *tower.pooler.parameters()]
        return TowerParts(tower.embeddings.position_embeddings, tower.layernorm, absent)
    embeddings = tower.embeddings
    return TowerParts(embeddings.position_embedding.weight, tower.post_layernorm, [embeddings.patch_embedding.bias])


def patch_tokens(tower: ImageTower, pixel_values: torch.Tensor) -> torch.Tensor:
    """Return the patch tokens of the last block, without final LayerNorm or class token, (b, p, w)."""
    hidden = tower.embeddings(pixel_values)
    if isinstance(tower, ViTModel):
        for layer in tower.layers:
            hidden = layer(hidden)
        return hidden[:, 1:]
    return tower.encoder(inputs_embeds=hidden).last_hidden_state
