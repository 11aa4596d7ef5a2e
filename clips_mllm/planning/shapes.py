"""Sizes of towers and LLMs, and the parameter counts that follow. No torch."""

from __future__ import annotations

import dataclasses
from typing import Any

from vision_tower.common.errors import UserError

Values = dict[str, Any]  # fields of a config.json


@dataclasses.dataclass(frozen=True, kw_only=True)
class LlmShape:
    """Sizes of a LLaMA-family LLM.

    Attributes:
        mlp: width inside the gated MLP.
        tied: the output layer shares the embedding's weights.
        qkv_bias: the query, key and value projections have biases (Qwen2).
        head_dim: width of an attention head; 0 means width / heads.
    """

    width: int
    layers: int
    mlp: int
    heads: int
    kv_heads: int
    vocab_size: int
    tied: bool = False
    qkv_bias: bool = False
    head_dim: int = 0

    @property
    def q_width(self) -> int:
        """Output width of the query projection."""
        return self.heads * (self.head_dim or self.width // self.heads)

    @property
    def kv_width(self) -> int:
        """Output width of the key projection and of the value projection."""
        return self.kv_heads * (self.head_dim or self.width // self.heads)

    @property
    def linear_parameters(self) -> int:
        """Weights of the linear layers in all blocks: those that LoRA adapts and QLoRA quantizes."""
        attention = 2 * self.width * self.q_width + 2 * self.width * self.kv_width
        return self.layers * (attention + 3 * self.width * self.mlp)

    @property
    def embedding_parameters(self) -> int:
        """Weights of the embedding and the output layer."""
        return self.vocab_size * self.width * (1 if self.tied else 2)

    @property
    def parameters(self) -> int:
        """All parameters."""
        bias = self.layers * (self.q_width + 2 * self.kv_width) if self.qkv_bias else 0
        return self.linear_parameters + self.embedding_parameters + bias + (2 * self.layers + 1) * self.width

    def lora_parameters(self, rank: int) -> int:
        """Parameters of LoRA adapters on every linear layer of the blocks."""
        attention = 2 * (self.width + self.q_width) + 2 * (self.width + self.kv_width)
        return self.layers * rank * (attention + 3 * (self.width + self.mlp))


@dataclasses.dataclass(frozen=True, kw_only=True)
class TowerShape:
    """Sizes of a vision transformer on square images; `image_size` and `patch_size` are in pixels."""

    width: int
    layers: int
    mlp: int
    heads: int
    image_size: int
    patch_size: int
    class_token: bool = False

    @property
    def patches(self) -> int:
        """Image tokens in the LLM's sequence."""
        return (self.image_size // self.patch_size) ** 2

    @property
    def parameters(self) -> int:
        """All parameters, except for a few biases."""
        block = 4 * self.width**2 + 2 * self.width * self.mlp + 9 * self.width + self.mlp
        return self.layers * block + self.width * (3 * self.patch_size**2 + self.patches + 3)

    def lora_parameters(self, rank: int) -> int:
        """Parameters of LoRA adapters on every linear layer of the blocks."""
        return self.layers * rank * (8 * self.width + 2 * (self.width + self.mlp))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shape:
    """Sizes of an MLLM; those of the projector follow from tower and LLM."""

    tower: TowerShape
    llm: LlmShape

    @property
    def projector_parameters(self) -> int:
        """Parameters of LLaVA's mlp2x_gelu."""
        return (self.tower.width + 1) * self.llm.width + (self.llm.width + 1) * self.llm.width

    @property
    def parameters(self) -> int:
        """All parameters."""
        return self.tower.parameters + self.projector_parameters + self.llm.parameters


def llm_shape(values: Values, file: object) -> LlmShape:
    """Read an LLM's config. `file` is for messages. Raises UserError if a field is missing."""
    try:
        heads = values["num_attention_heads"]
        return LlmShape(
            width=values["hidden_size"],
            layers=values["num_hidden_layers"],
            mlp=values["intermediate_size"],
            heads=heads,
            kv_heads=values.get("num_key_value_heads") or heads,
            vocab_size=values["vocab_size"],
            tied=values.get("tie_word_embeddings", False),
            qkv_bias=values.get("model_type") == "qwen2" or values.get("attention_bias", False),
            head_dim=values.get("head_dim") or 0,
        )
    except KeyError as error:
        raise missing_field(error, file, "a LLaMA-family LLM") from error


def tower_shape(values: Values, file: object) -> TowerShape:
    """Read the config of a vision tower, or of a CLIP or SigLIP that contains one. Raises UserError."""
    values = values.get("vision_config", values)
    try:
        return TowerShape(
            width=values["hidden_size"],
            layers=values["num_hidden_layers"],
            mlp=values["intermediate_size"],
            heads=values["num_attention_heads"],
            image_size=values["image_size"],
            patch_size=values["patch_size"],
            class_token=values.get("model_type") != "siglip_vision_model",
        )
    except KeyError as error:
        raise missing_field(error, file, "a vision tower") from error


def missing_field(error: KeyError, file: object, kind: str) -> UserError:
    """Return the error for a config without a field. `kind` is what the user should give instead."""
    return UserError("its config.json lacks this field", file=file, key=error.args[0], remedy=f"give {kind}")
