"""open_clip's JSON and our config, both ways.

Only towers of the CLIPS layout pass: no LayerNorm before the first block, average pooling over patches, the final
LayerNorm after pooling, bidirectional text with tanh GELU and the last token pooled. Each field of the JSON is a size,
a choice that CLIPS fixes, or of no consequence to what the weights compute; a field of another name is refused.
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
_PLAIN_BLOCKS = {
    "ls_init_value": (None, None),
    "block_type": (None, None),
    **dict.fromkeys(("qk_norm", "scaled_cosine_attn", "scale_heads"), (False, False)),
    **dict.fromkeys(("scale_attn_inner", "scale_attn", "scale_fc"), (False, False)),
}


@dataclasses.dataclass(frozen=True)
class Section:
    """One section of the JSON.

    Attributes:
        sizes: numbers, with open_clip's defaults.
        fixed: choices, as open_clip's default and what CLIPS needs.
        free: fields that do not change what the weights compute.
    """

    name: str
    sizes: dict[str, float]
    fixed: dict[str, tuple[Any, Any]]
    free: frozenset[str] = frozenset()

    def read(self, file: Path, given: Any) -> dict[str, Any]:
        """The sizes that a JSON's section states. Raises UserError for what is not of the CLIPS layout."""
        if not isinstance(given, dict):
            raise UserError(
                f"no section '{self.name}'", file=file, remedy="a CLIP model with an image and a text tower is needed"
            )
        for key in given:
            if key not in self.sizes and key not in self.fixed and key not in self.free:
                raise UserError(
                    f"{self.name}.{key} is not a field of open_clip's {self.name}", file=file, remedy="take it out"
                )
        for key, (default, needed) in self.fixed.items():
            if given.get(key, default) != needed:
                raise UserError(
                    f"{self.name}.{key} is {given.get(key, default)!r}, and CLIPS has {needed!r}",
                    file=file,
                    remedy="only CLIPS and OpenVision models can be converted",
                )
        found = {key: given.get(key, default) for key, default in self.sizes.items()}
        for key, value in found.items():
            whole = isinstance(self.sizes[key], int)
            if (
                isinstance(value, bool)
                or not isinstance(value, int if whole else (int, float))
                or not 0 < value < math.inf
            ):
                kind = "positive whole number" if whole else "positive number"
                raise UserError(f"{self.name}.{key} is {value!r}, where a {kind} is needed", file=file)
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
    """The model that a JSON describes, without captioner. Raises UserError for any that is not of the CLIPS layout."""
    tree = read_object(file)
    _check_preprocessing(file, tree.get("preprocess_cfg", {}))
    given = tree.get("model_cfg", tree)
    embed_dim = MODEL.read(file, given)["embed_dim"]
    image, text = VISION.read(file, given.get("vision_cfg")), TEXT.read(file, given.get("text_cfg"))
    for name, width, heads in (
        ("vision_cfg.head_width", image["width"], image["width"] / image["head_width"]),
        ("text_cfg.heads", text["width"], text["heads"]),
    ):
        if heads % 1 or width % heads:
            raise UserError(f"{name} does not divide the width {width}", file=file, remedy="fetch the file again")
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
    """The JSON of a model with class token.

    Args:
        name: of the repository that holds the tokenizer. open_clip's `local-dir:` reads the folder's own in any case.
    Raises:
        UserError: a tower without class token, which open_clip's own ViT cannot be, or masked padding.
    """
    image, text = config.vision_config, config.text_config
    if config.padding == "masked":
        raise UserError(
            "--to open_clip: this model masks padding, and open_clip attends to it",
            remedy="use --to tower, or pretrain with model.padding=attended",
        )
    if not has_class_token(image):
        raise UserError(
            "--to open_clip: this tower has no class token, and open_clip's always has one",
            remedy="use --to tower, or pretrain with model.class_token=true",
        )
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
        raise UserError(
            f"preprocess_cfg is {given!r}, where an object is needed", file=file, remedy="fetch the file again"
        )
    for key, needed in PREPROCESSING.items():
        if given.get(key, needed) != needed:
            raise UserError(
                f"preprocess_cfg.{key} is {given[key]!r}, and CLIPS has {needed!r}",
                file=file,
                remedy="only CLIPS and OpenVision models can be converted",
            )


def _eps(file: Path, section: dict[str, Any]) -> float:
    norm = section.get("norm_kwargs") or {}
    if not isinstance(norm, dict) or set(norm) - {"eps"}:
        raise UserError(f"norm_kwargs is {norm!r}, where only 'eps' is known", file=file)
    eps = norm.get("eps", 1e-5)
    if not isinstance(eps, (int, float)) or not 0 < eps < 1:
        raise UserError(f"norm_kwargs.eps is {eps!r}, where a small positive number is needed", file=file)
    return float(eps)


def _ratio(width: int, mlp: int) -> float:
    """The factor from which open_clip computes `int(width * ratio)` back to `mlp`."""
    return mlp / width if int(width * (mlp / width)) == mlp else (mlp + 0.5) / width
