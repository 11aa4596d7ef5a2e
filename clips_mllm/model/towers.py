"""Supported vision towers: what LLaVA must know about each kind, and resizing to another resolution."""

from __future__ import annotations

import copy
import dataclasses
from typing import TYPE_CHECKING, Any, Literal

import torch

from vision_tower.common.errors import UserError
from vision_tower.model.positions import resized_positions

if TYPE_CHECKING:
    from transformers import BaseImageProcessor, PreTrainedModel

FeatureSelect = Literal["full", "default"]


@dataclasses.dataclass(frozen=True)
class TowerKind:
    """Differences between the stock towers.

    Attributes:
        class_token: True if the sequence begins with a class token; LLaVA's "default" selection drops it.
        positions: parameter name of the position table.
    """

    class_token: bool
    positions: str


KINDS = {
    "siglip_vision_model": TowerKind(False, "embeddings.position_embedding.weight"),
    "clip_vision_model": TowerKind(True, "embeddings.position_embedding.weight"),
    "vit": TowerKind(True, "embeddings.position_embeddings"),
    "dinov2": TowerKind(True, "embeddings.position_embeddings"),
}


def check_tower(tower: str, config: Any) -> None:
    """Raise UserError for an unsupported kind of tower."""
    if config.model_type not in KINDS:
        raise UserError(f"unsupported tower '{config.model_type}'", file=tower, remedy=f"use one of {', '.join(KINDS)}")


def feature_selection(tower: str, config: Any, wanted: Literal["auto", "full", "default"]) -> FeatureSelect:
    """Resolve model.feature_select: "default" drops the first position, "full" keeps all.

    Raises:
        UserError: the tower is unsupported, or "default" would drop a patch.
    """
    check_tower(tower, config)
    class_token = KINDS[config.model_type].class_token
    if wanted == "default" and not class_token:
        raise UserError("the tower has no class token", key="model.feature_select", value="default", remedy="use auto")
    return ("default" if class_token else "full") if wanted == "auto" else wanted


def additional_tokens(config: Any) -> int:
    """Number of positions in addition to the patches: LlavaProcessor's `num_additional_image_tokens`."""
    return int(KINDS[config.model_type].class_token)


@torch.no_grad()
def at_size(tower: PreTrainedModel, image_size: int) -> PreTrainedModel:
    """Return the tower for square images of `image_size` pixels, with resized positions.

    Raises:
        UserError: `image_size` is not a multiple of the patch size.
    """
    config = copy.deepcopy(tower.config)
    if image_size == config.image_size:
        return tower
    if image_size < config.patch_size or image_size % config.patch_size:
        lower = max(image_size // config.patch_size, 1) * config.patch_size
        raise UserError(
            f"not a multiple of the tower's patch size {config.patch_size}",
            key="model.image_size",
            value=image_size,
            remedy=f"use {lower} or {lower + config.patch_size}",
        )
    kind, state = KINDS[config.model_type], tower.state_dict()
    state[kind.positions] = resized_positions(state[kind.positions], image_size // config.patch_size, kind.class_token)
    config.image_size = image_size
    resized = type(tower)._from_config(config, dtype=tower.dtype)
    resized.load_state_dict(state)
    return resized


def resize_processor(processor: BaseImageProcessor, image_size: int) -> None:
    """Change the output size of an image processor, keeping its mode (resize, or resize and crop)."""
    square = {"height": image_size, "width": image_size}
    if processor.size.get("shortest_edge"):
        processor.size = {"shortest_edge": image_size}
        processor.crop_size = square
    else:
        processor.size = square
