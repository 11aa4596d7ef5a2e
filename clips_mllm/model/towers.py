"""Vision towers of any supported kind, at any resolution: one face for what LLaVA needs to know of them.

folder or hub id --AutoModel--> tower, or the vision half of a two-tower model --at_size--> tower for other images
"""

from __future__ import annotations

import copy
import dataclasses
from typing import TYPE_CHECKING, Any, Literal

import torch

from vision_tower.common.errors import UserError
from vision_tower.model.positions import interpolate_positions, sincos_positions

if TYPE_CHECKING:
    from transformers import BaseImageProcessor, PreTrainedModel

FeatureSelect = Literal["full", "default"]


@dataclasses.dataclass(frozen=True)
class TowerKind:
    """What differs between stock towers.

    Attributes:
        class_token: whether the sequence begins with one; LLaVA's "default" selection drops it.
        positions: name of the table of positions.
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
    """Raise UserError for a tower of an unknown kind."""
    if config.model_type not in KINDS:
        known = ", ".join(KINDS)
        raise UserError(
            f"a '{config.model_type}' model cannot be the tower", file=tower, remedy=f"kinds that can: {known}"
        )


def feature_selection(tower: str, config: Any, wanted: Literal["auto", "full", "default"]) -> FeatureSelect:
    """How LLaVA takes the patches of a tower: "default" drops the first position, "full" nothing.

    Raises:
        UserError: a tower of an unknown kind, or a selection that would drop a patch.
    """
    check_tower(tower, config)
    class_token = KINDS[config.model_type].class_token
    if wanted == "default" and not class_token:
        raise UserError(
            f"a '{config.model_type}' tower needs 'full', it has no class token to drop",
            key="model.feature_select",
            value="default",
        )
    return ("default" if class_token else "full") if wanted == "auto" else wanted


def additional_tokens(config: Any) -> int:
    """Positions beside the patches, in LlavaProcessor's words."""
    return int(KINDS[config.model_type].class_token)


@torch.no_grad()
def at_size(tower: PreTrainedModel, image_size: int) -> PreTrainedModel:
    """The same weights for square images of another side, in pixels.

    Fixed sin-cos positions, as of towers trained here, are computed anew; learned ones are interpolated, bicubic.

    Raises:
        UserError: the side is no multiple of the patch.
    """
    config = copy.deepcopy(tower.config)
    if image_size == config.image_size:
        return tower
    if image_size < config.patch_size or image_size % config.patch_size:
        lower = max(image_size // config.patch_size, 1) * config.patch_size
        raise UserError(
            f"no multiple of the tower's patch of {config.patch_size} pixels",
            key="model.image_size",
            value=image_size,
            remedy=f"take {lower} or {lower + config.patch_size}",
        )
    kind = KINDS[config.model_type]
    state = tower.state_dict()
    table = state[kind.positions]
    old_side, side = config.image_size // config.patch_size, image_size // config.patch_size
    flat = table.flatten(end_dim=-2)
    fixed = config.hidden_size % 4 == 0 and torch.allclose(
        flat.float(), sincos_positions(old_side, config.hidden_size, kind.class_token), atol=4e-3
    )
    if fixed:
        positions = sincos_positions(side, config.hidden_size, kind.class_token).to(table.dtype)
    else:
        positions = interpolate_positions(flat, side, kind.class_token)
    config.image_size = image_size
    resized = type(tower)._from_config(config, dtype=tower.dtype)
    resized.load_state_dict(state | {kind.positions: positions.view(*table.shape[:-2], *positions.shape)})
    return resized


def resize_processor(processor: BaseImageProcessor, image_size: int) -> None:
    """Let an image processor make images of another side, in the way it made them before."""
    square = {"height": image_size, "width": image_size}
    if processor.size.get("shortest_edge"):
        processor.size = {"shortest_edge": image_size}
        processor.crop_size = square
    else:
        processor.size = square
