"""Configuration of the pretraining model."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

from transformers import AutoConfig, PretrainedConfig, SiglipTextConfig

from vision_tower.model.towers import TowerConfig, tower_config


class ClipsConfig(PretrainedConfig):
    """Two stock tower configs and the sizes of the captioner.

    Args:
        vision_config: config of the image tower; `model_type` selects the class (default: siglip_vision_model).
        text_config: config of the text tower.
        positions: image position embeddings: `sincos` is fixed, `learned` is trained.
        captioner_layers: 0 builds no captioner, as in published weights.
        teacher_forced: use CoCa's captioner, see `vision_tower.model.captioner`.
        padding: `attended`, as in published weights, or `masked`: then embeddings do not depend on the padded length.
        projection_dim: width of the joint embedding space.
    """

    model_type = "clips"
    sub_configs: ClassVar[dict[str, Any]] = {"vision_config": AutoConfig, "text_config": SiglipTextConfig}

    def __init__(
        self,
        vision_config: dict[str, Any] | TowerConfig | None = None,
        text_config: dict[str, Any] | SiglipTextConfig | None = None,
        positions: Literal["sincos", "learned"] = "sincos",
        captioner_width: int = 512,
        captioner_layers: int = 12,
        captioner_heads: int = 8,
        captioner_mlp: int = 2048,
        captioner_queries: int = 128,
        teacher_forced: bool = False,
        padding: Literal["attended", "masked"] = "attended",
        projection_dim: int = 512,
        **kwargs: Any,
    ) -> None:
        self.vision_config = tower_config(vision_config)
        is_config = isinstance(text_config, SiglipTextConfig)
        self.text_config: SiglipTextConfig = text_config if is_config else SiglipTextConfig(**(text_config or {}))
        self.positions = positions
        self.captioner_width = captioner_width
        self.captioner_layers = captioner_layers
        self.captioner_heads = captioner_heads
        self.captioner_mlp = captioner_mlp
        self.captioner_queries = captioner_queries
        self.teacher_forced = teacher_forced
        self.padding = padding
        self.projection_dim = projection_dim
        super().__init__(**kwargs)
