"""config.json of the original LLaVA code: fields of the LLM, and how features of the tower are read."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, Literal

from vision_tower.common.errors import UserError
from vision_tower.common.files import read_object

# model_type of the original classes: model type of their LLM in transformers.
LLMS = {"llava": "llama", "llava_llama": "llama", "llava_mistral": "mistral", "llava_qwen": "qwen2"}
FEATURES: dict[str, Literal["default", "full"]] = {"patch": "default", "cls_patch": "full"}
PROJECTOR_TYPE = "mlp2x_gelu"
# Fields about the class or the training, which the LLM's own config does not have.
CLASS_FIELDS = ("_name_or_path", "architectures", "auto_map", "model_type", "transformers_version")
TRAINING_FIELDS = (
    "freeze_mm_mlp_adapter",
    "freeze_mm_vision_resampler",
    "image_grid_pinpoints",
    "mm_projector_lr",
    "mm_resampler_type",
    "mm_use_im_patch_token",
    "mm_vision_tower_lr",
    "tokenizer_model_max_length",
    "tokenizer_padding_side",
    "tune_mm_mlp_adapter",
    "tune_mm_vision_resampler",
    "unfreeze_mm_vision_tower",
    "use_mm_proj",
)
# Checked, or equal to the size of the projector's weights, which is checked.
PROJECTOR_FIELDS = ("mm_hidden_size", "mm_patch_merge_type", "mm_projector_type", "mm_use_im_start_end")


@dataclasses.dataclass(frozen=True, kw_only=True)
class OriginalConfig:
    """Config of an original checkpoint, divided into tower and LLM.

    Attributes:
        tower: path or hub id of the vision tower; None if the file names none.
        feature_layer: hidden state of the tower that the projector reads.
        feature_select: "default" drops the class token.
        image_aspect_ratio: "pad" pads images to a square, "squash" resizes them to one.
        llm_type: model type of the LLM in transformers.
        llm: fields of the LLM's config.
    """

    tower: str | None = None
    feature_layer: int = -2
    feature_select: Literal["default", "full"] = "default"
    image_aspect_ratio: Literal["squash", "pad"] = "squash"
    llm_type: str = "llama"
    llm: dict[str, Any] = dataclasses.field(default_factory=dict)


def is_original(config: dict[str, Any]) -> bool:
    """Return True if a config.json is from the original code; its model type 'llava' is also transformers'."""
    return config.get("model_type") in LLMS and ("mm_vision_tower" in config or "mm_projector_type" in config)


def read_original_config(file: Path) -> OriginalConfig:
    """Read the config of an original checkpoint.

    Raises:
        UserError: another kind of model, or a feature that the stock LLaVA model does not have.
    """
    values = read_object(file)
    if not is_original(values):
        raise UserError(
            "not a config of the original LLaVA code",
            file=file,
            key="model_type",
            value=values.get("model_type"),
            remedy="give the folder of an original checkpoint",
        )
    llm_type = LLMS[values["model_type"]]
    _refuse(file, values, "mm_projector_type", (PROJECTOR_TYPE,))
    _refuse(file, values, "mm_use_im_start_end", (False, None))
    _refuse(file, values, "mm_patch_merge_type", ("flat", None))
    _refuse(file, values, "mm_vision_select_feature", (*FEATURES, None))
    _refuse(file, values, "image_aspect_ratio", ("pad", "square", None))
    own = {
        "tower": values.pop("mm_vision_tower", None),
        "feature_layer": values.pop("mm_vision_select_layer", -2),
        "feature_select": FEATURES[values.pop("mm_vision_select_feature", None) or "patch"],
        "image_aspect_ratio": "pad" if values.pop("image_aspect_ratio", None) == "pad" else "squash",
    }
    for name in (*CLASS_FIELDS, *TRAINING_FIELDS, *PROJECTOR_FIELDS):
        values.pop(name, None)
    for name in sorted(values):
        if name.startswith("mm_"):
            _refuse(file, values, name, ())
    return OriginalConfig(**own, llm_type=llm_type, llm=values)


def _refuse(file: Path, values: dict[str, Any], name: str, known: tuple[Any, ...]) -> None:
    if values.get(name) not in known:
        accepted = " or ".join(str(value) for value in known if value is not None)
        raise UserError(
            f"the stock LLaVA model supports only {accepted}" if known else "the stock LLaVA model has no such option",
            file=file,
            key=name,
            value=values.get(name),
            remedy="this checkpoint cannot be converted",
        )
