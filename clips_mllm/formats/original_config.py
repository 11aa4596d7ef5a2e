"""config.json of the original LLaVA code: what of it is the LLM's, and what says how a tower is read."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, Literal

from vision_tower.common.errors import UserError
from vision_tower.common.files import read_object

# The LLM behind each of the original classes, by the `model_type` that they write.
LLMS = {"llava": "llama", "llava_llama": "llama", "llava_mistral": "mistral", "llava_qwen": "qwen2"}
FEATURES: dict[str, Literal["default", "full"]] = {"patch": "default", "cls_patch": "full"}
PROJECTOR = "mlp2x_gelu"
# Fields of a config that name its class or its training, and that no LLM's config takes.
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


@dataclasses.dataclass(frozen=True, kw_only=True)
class OriginalConfig:
    """How an original checkpoint reads its tower, and the rest of its config, which is the LLM's.

    Attributes:
        tower: name or path of the vision tower, where the file says one.
        feature_layer: which hidden state the projector reads.
        feature_select: "default" drops the class token.
        square: whether images are padded to a square first.
        width: of the features that the projector reads, where the file says it.
        llm_type: transformers' model type of the LLM.
        llm: the LLM's own fields.
    """

    tower: str | None = None
    feature_layer: int = -2
    feature_select: Literal["default", "full"] = "default"
    square: Literal["squash", "pad"] = "squash"
    width: int | None = None
    llm_type: str = "llama"
    llm: dict[str, Any] = dataclasses.field(default_factory=dict)


def is_original(config: dict[str, Any]) -> bool:
    """Whether a config.json is of the original code; both codes have used the model type 'llava'."""
    return config.get("model_type") in LLMS and ("mm_vision_tower" in config or "mm_projector_type" in config)


def read_original_config(file: Path) -> OriginalConfig:
    """The config of an original checkpoint.

    Raises:
        UserError: another kind of model, or a field that the stock model has no form for.
    """
    values = read_object(file)
    if not is_original(values):
        raise UserError(
            f"not of the original LLaVA code (model_type '{values.get('model_type')}')",
            file=file,
            remedy="give a folder with its config.json",
        )
    llm_type = LLMS[values["model_type"]]
    _refuse(file, values, "mm_projector_type", (PROJECTOR,))
    _refuse(file, values, "mm_use_im_start_end", (False, None))
    _refuse(file, values, "mm_patch_merge_type", ("flat", None))
    _refuse(file, values, "mm_vision_select_feature", (*FEATURES, None))
    _refuse(file, values, "image_aspect_ratio", ("pad", "square", None))
    own = {
        "tower": values.pop("mm_vision_tower", None),
        "feature_layer": values.pop("mm_vision_select_layer", -2),
        "feature_select": FEATURES[values.pop("mm_vision_select_feature", None) or "patch"],
        "square": "pad" if values.pop("image_aspect_ratio", None) == "pad" else "squash",
        "width": values.pop("mm_hidden_size", None),
    }
    for name in (*CLASS_FIELDS, *TRAINING_FIELDS):
        values.pop(name, None)
    for name in ("mm_projector_type", "mm_use_im_start_end", "mm_patch_merge_type"):
        values.pop(name, None)
    unknown = sorted(name for name in values if name.startswith("mm_"))
    if unknown:
        raise UserError(f"{unknown[0]}={values[unknown[0]]!r}: the stock model has no form for it", file=file)
    return OriginalConfig(**own, llm_type=llm_type, llm=values)


def _refuse(file: Path, values: dict[str, Any], name: str, known: tuple[Any, ...]) -> None:
    if values.get(name) not in known:
        can = " or ".join(str(value) for value in known if value is not None)
        raise UserError(f"{name}={values.get(name)!r}: the stock model has no form for it, only for {can}", file=file)
