"""open_clip_config.json to ClipsConfig and back.

Only models of the CLIPS layout are accepted: no LayerNorm before the first block, average pooling over patches, the
final LayerNorm after pooling, bidirectional text attention with tanh GELU, and the last text token pooled.
Each field of the JSON is a size, a choice that CLIPS fixes, or has no effect on the outputs; others are refused.
Source: `CLIPVisionCfg` and `CLIPTextCfg` of open_clip 3.3, and the JSON files of UCSC-VLAA's published checkpoints.
"""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

from vision_tower.common.errors import UserError
from vision_tower.common.files import read_object
from vision_tower.data.images import MEAN, STD
from vision_tower.model.config import ClipsConfig
from vision_tower.model.towers import has_class_token

FILE = "open_clip_config.json"
# Options of a block that CLIPS does not use: (open_clip's default, the value CLIPS needs).
_PLAIN_BLOCKS = {
    "ls_init_value": (None, None),
    "block_type": (None, None),
    **dict.fromkeys(("qk_norm", "scaled_cosine_attn", "scale_heads"), (False, False)),
    **dict.fromkeys(("scale_attn_inner", "scale_attn", "scale_fc"), (False, False)),
}


@dataclasses.dataclass(frozen=True)
class Section:
    """Schema of one section of the JSON.

    Attributes:
        sizes: positive numbers, with open_clip's defaults.
        fixed: choices, each as (open_clip's default, the value CLIPS needs).
        free: fields without effect on the outputs.
    """

    name: str
    sizes: dict[str, float]
    fixed: dict[str, tuple[Any, Any]]
    free: frozenset[str] = frozenset()

    def read(self, file: Path, given: Any) -> dict[str, Any]:
        """Return the sizes in a section. Raises UserError if it is not of the CLIPS layout."""
        if not isinstance(given, dict):
            raise _refused(file, self.name, given, "a section is needed")
        for key in given:
            if key not in self.sizes and key not in self.fixed and key not in self.free:
                raise _refused(file, f"{self.name}.{key}", given[key], "unknown field")
        for key, (default, needed) in self.fixed.items():
            if given.get(key, default) != needed:
                raise _refused(file, f"{self.name}.{key}", given.get(key, default), f"CLIPS has {needed!r}")
        found = {key: given.get(key, default) for key, default in self.sizes.items()}
        for key, value in found.items():
            kind, types = ("integer", (int,)) if isinstance(self.sizes[key], int) else ("number", (int, float))
            if isinstance(value, bool) or not isinstance(value, types) or not 0 < value < math.inf:
                raise _refused(file, f"{self.name}.{key}", value, f"a positive {kind} is needed")
        return found


MODEL = Section(
    "model_cfg",
    sizes={"embed_dim": 0},
    fixed={"quick_gelu": (False, False), "init_logit_bias": (None, None), "multimodal_cfg": (None, None)},
    free=frozenset({"vision_cfg", "text_cfg", "custom_text", "init_logit_scale", "nonscalar_logit_scale"}),
)
VISION = Section(
    "vision_cfg",
    sizes={"image_size": 224, "patch_size": 16, "width": 768, "layers": 12, "head_width": 64, "mlp_ratio": 4.0},
    fixed={
        "no_ln_pre": (False, True),
        "pool_type": ("tok", "avg"),
        "final_ln_after_pool": (False, True),
        "attentional_pool": (False, False),
        "act_kwargs": (None, None),
        "timm_model_name": (None, None),
        **_PLAIN_BLOCKS,
    },
    free=frozenset({"norm_kwargs", "pos_embed_type", "patch_dropout", "output_tokens"}),
)
TEXT = Section(
    "text_cfg",
    sizes={"context_length": 77, "vocab_size": 49408, "width": 512, "layers": 12, "heads": 8, "mlp_ratio": 4.0},
    fixed={
        "no_causal_mask": (False, True),
        "pool_type": ("argmax", "last"),
        "act_kwargs": (None, {"approximate": "tanh"}),
        "embed_cls": (False, False),
        "final_ln_after_pool": (False, False),
        "proj_type": ("linear", "linear"),
        "proj_bias": (False, False),
        "hf_model_name": (None, None),
        **_PLAIN_BLOCKS,
    },
    free=frozenset(
        {"norm_kwargs", "hf_tokenizer_name", "tokenizer_mode", "tokenizer_kwargs", "pad_id", "eos_id", "output_tokens"}
    ),
)
PUBLISHED_IDS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
PREPROCESSING: dict[str, Any] = {
    "mean": list(MEAN),
    "std": list(STD),
    "interpolation": "bilinear",
    "resize_mode": "squash",
}


def read_config(file: Path) -> ClipsConfig:
    """Return the config of the model in a JSON, without captioner.

    Raises:
        UserError: a damaged file, or a model that is not of the CLIPS layout.
    """
    tree = read_object(file)
    _check_preprocessing(file, tree.get("preprocess_cfg", {}))
    given = tree.get("model_cfg", tree)
    embed_dim = MODEL.read(file, given)["embed_dim"]
    image, text = VISION.read(file, given.get("vision_cfg")), TEXT.read(file, given.get("text_cfg"))
    for section, key, sizes in (("vision_cfg", "head_width", image), ("text_cfg", "heads", text)):
        if sizes["width"] % sizes[key]:
            raise _refused(file, f"{section}.{key}", sizes[key], f"does not divide the width {sizes['width']}")
    return ClipsConfig(
        vision_config={
            "model_type": "vit",
            "hidden_size": image["width"],
            "num_hidden_layers": image["layers"],
            "intermediate_size": int(image["width"] * image["mlp_ratio"]),
            "num_attention_heads": image["width"] // image["head_width"],
            "image_size": image["image_size"],
            "patch_size": image["patch_size"],
            "hidden_act": "gelu",
            "layer_norm_eps": _eps(file, given["vision_cfg"]),
        },
        text_config={
            "hidden_size": text["width"],
            "num_hidden_layers": text["layers"],
            "intermediate_size": int(text["width"] * text["mlp_ratio"]),
            "num_attention_heads": text["heads"],
            "max_position_embeddings": text["context_length"],
            "vocab_size": text["vocab_size"],
            "projection_size": embed_dim,
            "hidden_act": "gelu_pytorch_tanh",
            "layer_norm_eps": _eps(file, given["text_cfg"]),
            **PUBLISHED_IDS,
        },
        captioner_layers=0,
        projection_dim=embed_dim,
    )


def write_config(config: ClipsConfig, name: str) -> dict[str, Any]:
    """Return the JSON of a model with class token.

    Args:
        name: hub id of the tokenizer. With `local-dir:` open_clip reads the tokenizer in the folder instead.
    Raises:
        UserError: a vision tower without class token, or masked padding; open_clip has neither.
    """
    image, text = config.vision_config, config.text_config
    for wrong, problem, fix in (
        (config.padding == "masked", "this model masks padding, and open_clip attends to it", "model.padding=attended"),
        (not has_class_token(image), "open_clip needs a class token, this tower has none", "model.class_token=true"),
    ):
        if wrong:
            raise UserError(problem, key="--to", value="open_clip", remedy=f"use --to tower, or pretrain with {fix}")
    return {
        "model_cfg": {
            "embed_dim": config.projection_dim,
            "vision_cfg": {
                "image_size": image.image_size,
                "patch_size": image.patch_size,
                "width": image.hidden_size,
                "layers": image.num_hidden_layers,
                "head_width": image.hidden_size // image.num_attention_heads,
                "mlp_ratio": _ratio(image.hidden_size, image.intermediate_size),
                "norm_kwargs": {"eps": image.layer_norm_eps},
                "no_ln_pre": True,
                "pool_type": "avg",
                "final_ln_after_pool": True,
            },
            "text_cfg": {
                "context_length": text.max_position_embeddings,
                "vocab_size": text.vocab_size,
                "width": text.hidden_size,
                "layers": text.num_hidden_layers,
                "heads": text.num_attention_heads,
                "mlp_ratio": _ratio(text.hidden_size, text.intermediate_size),
                "norm_kwargs": {"eps": text.layer_norm_eps},
                "act_kwargs": {"approximate": "tanh"},
                "no_causal_mask": True,
                "pool_type": "last",
                "hf_tokenizer_name": name,
                "tokenizer_mode": "clips",
            },
        },
        "preprocess_cfg": PREPROCESSING,
    }


def _check_preprocessing(file: Path, given: Any) -> None:
    if not isinstance(given, dict):
        raise _refused(file, "preprocess_cfg", given, "a section is needed")
    for key, needed in PREPROCESSING.items():
        if given.get(key, needed) != needed:
            raise _refused(file, f"preprocess_cfg.{key}", given[key], f"CLIPS has {needed!r}")


def _eps(file: Path, section: dict[str, Any]) -> float:
    norm = section.get("norm_kwargs") or {}
    if not isinstance(norm, dict) or set(norm) - {"eps"}:
        raise _refused(file, "norm_kwargs", norm, "only 'eps' can be set")
    eps = norm.get("eps", 1e-5)  # torch.nn.LayerNorm's default
    if not isinstance(eps, (int, float)) or not 0 < eps < 1:
        raise _refused(file, "norm_kwargs.eps", eps, "a number between 0 and 1 is needed")
    return float(eps)


def _refused(file: Path, key: str, value: object, problem: str) -> UserError:
    remedy = "only CLIPS and OpenVision models can be converted: if this is one, download the file again"
    return UserError(problem, file=file, key=key, value=repr(value), remedy=remedy)


def _ratio(width: int, mlp: int) -> float:
    """Return the ratio for which open_clip's `int(width * ratio)` is `mlp`."""
    return mlp / width if int(width * (mlp / width)) == mlp else (mlp + 0.5) / width
