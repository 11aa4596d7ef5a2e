"""The pretraining model: a stock vision tower, a stock text tower and the captioner.

pixels (b, 3, h, w) -> a stock tower  -> patches (b, p, wv) -- mean, LayerNorm, linear --> image (b, d)
web    (b, l)       -> SiglipTextModel -> tokens  (b, l, wt) -- last, LayerNorm, linear --> web   (b, d)
sub    (b, l)       -> same text tower                                                  --> sub   (b, d)
[patches | web tokens | q queries] -> Captioner -> logits (b, q, v) of the full synthetic caption
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import nn
from transformers import AutoConfig, PretrainedConfig, PreTrainedModel, SiglipTextConfig, SiglipTextModel
from transformers.models.siglip.modeling_siglip import SiglipEncoderLayer

from vision_tower.positions import sincos_positions
from vision_tower.towers import (
    TowerConfig,
    build_tower,
    has_class_token,
    patch_tokens,
    tower_config,
    tower_parts,
)

MAX_SCALE = 100.0


class ClipsConfig(PretrainedConfig):
    """Stock tower configs plus the captioner's.

    Args:
        vision_config: of either image tower, told apart by `model_type`; without one, the tower without class token.
        text_config: of the text tower.
        positions: of the image: `sincos` is fixed, `learned` is trained.
        captioner_layers: 0 leaves the captioner out, as in published weights.
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
        projection_dim: int = 512,
        **kwargs: Any,
    ) -> None:
        self.vision_config = tower_config(vision_config)
        given = isinstance(text_config, SiglipTextConfig)
        self.text_config: SiglipTextConfig = text_config if given else SiglipTextConfig(**(text_config or {}))
        self.positions = positions
        self.captioner_width = captioner_width
        self.captioner_layers = captioner_layers
        self.captioner_heads = captioner_heads
        self.captioner_mlp = captioner_mlp
        self.captioner_queries = captioner_queries
        self.projection_dim = projection_dim
        super().__init__(**kwargs)


def combination_mask(prefix: int, queries: int) -> torch.Tensor:
    """Who may attend to whom, (s, s) bool with s = prefix + queries; True = may.

    The prefix (image and web text) sees all of itself and no query; query t sees the prefix and queries <= t.
    """
    size = prefix + queries
    mask = torch.ones(size, size, dtype=torch.bool).tril()
    mask[:prefix, :prefix] = True
    return mask


class Captioner(nn.Module):
    """Predicts the full synthetic caption from learnable queries, without teacher forcing."""

    def __init__(self, config: ClipsConfig) -> None:
        super().__init__()
        width = config.captioner_width
        self.image_projection = nn.Linear(config.vision_config.hidden_size, width, bias=False)
        self.text_projection = nn.Linear(config.text_config.hidden_size, width, bias=False)
        self.queries = nn.Parameter(torch.empty(config.captioner_queries, width))
        self.layers = nn.ModuleList(
            SiglipEncoderLayer(_captioner_config(config)) for _ in range(config.captioner_layers)
        )
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.head = nn.Linear(width, config.text_config.vocab_size, bias=False)

    def forward(self, patches: torch.Tensor, words: torch.Tensor) -> torch.Tensor:
        """Logits (b, q, v) from unnormalised patches (b, p, wv) and web tokens (b, l, wt)."""
        prefix = torch.cat([self.image_projection(patches), self.text_projection(words)], dim=1)
        queries = self.queries.to(prefix.dtype).expand(len(prefix), -1, -1)
        hidden = torch.cat([prefix, queries], dim=1)
        allowed = combination_mask(prefix.shape[1], queries.shape[1]).to(hidden.device)
        mask = torch.zeros(allowed.shape, dtype=hidden.dtype, device=hidden.device)
        mask = mask.masked_fill(~allowed, torch.finfo(hidden.dtype).min)[None, None]
        for layer in self.layers:
            hidden = layer(hidden, attention_mask=mask)
        with torch.autocast(hidden.device.type, enabled=False):  # the vocabulary layer is fp32, as published
            normed = self.norm(hidden[:, prefix.shape[1] :].to(self.norm.weight.dtype))
            return F.linear(normed.float(), self.head.weight.float())


def _captioner_config(config: ClipsConfig) -> SiglipTextConfig:
    return SiglipTextConfig(
        hidden_size=config.captioner_width,
        intermediate_size=config.captioner_mlp,
        num_hidden_layers=config.captioner_layers,
        num_attention_heads=config.captioner_heads,
        hidden_act="gelu_pytorch_tanh",
        layer_norm_eps=1e-6,
        attn_implementation=config._attn_implementation or "sdpa",
    )


@dataclasses.dataclass
class ClipsOutput:
    """Unit-norm embeddings (b, d), the clamped logit scale, and the captioner's logits (b, q, v), if there is one."""

    image: torch.Tensor
    web: torch.Tensor
    sub: torch.Tensor
    scale: torch.Tensor
    caption_logits: torch.Tensor | None


class ClipsModel(PreTrainedModel):
    """Two stock towers and the captioner."""

    config_class = ClipsConfig
    base_model_prefix = "clips"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _no_split_modules: ClassVar[list[str]] = ["SiglipEncoderLayer", "ViTLayer"]

    def __init__(self, config: ClipsConfig) -> None:
        super().__init__(config)
        self.vision_model = build_tower(config.vision_config)
        self.text_model = SiglipTextModel._from_config(config.text_config)
        self.visual_projection = nn.Linear(config.vision_config.hidden_size, config.projection_dim, bias=False)
        self.captioner = Captioner(config) if config.captioner_layers else None
        # One element, not a scalar: DeepSpeed cannot broadcast a tensor without dimensions.
        self.logit_scale = nn.Parameter(torch.tensor([math.log(1 / 0.07)]))
        self.post_init()
        self._freeze_what_clips_lacks()

    def _freeze_what_clips_lacks(self) -> None:
        """CLIPS has no bias in patch embedding and text projection, and its image positions may be fixed."""
        for parameter in self.absent_parameters():
            parameter.requires_grad_(False)
        tower_parts(self.vision_model).positions.requires_grad_(self.config.positions == "learned")

    def absent_parameters(self) -> list[nn.Parameter]:
        """What the stock classes have and CLIPS has not: zeros, never trained."""
        return [*tower_parts(self.vision_model).absent, self.text_model.head.bias]

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, Captioner):
            nn.init.normal_(module.queries, std=1.0)
            nn.init.normal_(module.head.weight, std=module.head.in_features**-0.5)
        elif isinstance(module, ClipsModel):
            nn.init.normal_(module.visual_projection.weight, std=module.visual_projection.in_features**-0.5)

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """As in transformers, whose loading makes every parameter trainable; here the fixed ones stay fixed."""
        answer = super().from_pretrained(*args, **kwargs)
        (answer[0] if isinstance(answer, tuple) else answer)._freeze_what_clips_lacks()
        return answer

    @classmethod
    def from_scratch(cls, config: ClipsConfig) -> ClipsModel:
        """A freshly initialised model: positions start as sin-cos, and zeros stand where CLIPS has nothing."""
        model = cls(config)
        vision = config.vision_config
        positions = tower_parts(model.vision_model).positions
        table = sincos_positions(vision.image_size // vision.patch_size, vision.hidden_size, has_class_token(vision))
        with torch.no_grad():
            positions.copy_(table.view_as(positions))
            for parameter in model.absent_parameters():
                parameter.zero_()
        return model

    def patches(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """The last block's patch tokens, neither normalised nor projected, (b, p, wv)."""
        return patch_tokens(self.vision_model, pixel_values)

    def words(self, ids: torch.Tensor) -> torch.Tensor:
        """The last block's text tokens, not normalised, (b, l, wt). Padding is attended to, as published."""
        return self.text_model.encoder(inputs_embeds=self.text_model.embeddings(input_ids=ids)).last_hidden_state

    def pool_image(self, patches: torch.Tensor) -> torch.Tensor:
        """Unit-norm image embeddings (b, d) of unnormalised patches: mean, LayerNorm, linear."""
        pooled = tower_parts(self.vision_model).norm(patches.mean(dim=1))
        return F.normalize(self.visual_projection(pooled).float(), dim=-1)

    def pool_text(self, words: torch.Tensor) -> torch.Tensor:
        """Unit-norm text embeddings (b, d) of unnormalised tokens: last position, LayerNorm, linear."""
        pooled = self.text_model.final_layer_norm(words[:, -1])
        return F.normalize(self.text_model.head(pooled).float(), dim=-1)

    def embed_images(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Unit-norm fp32 embeddings (b, d) of normalised pixels (b, 3, h, w)."""
        return self.pool_image(self.patches(pixel_values))

    def embed_texts(self, ids: torch.Tensor) -> torch.Tensor:
        """Unit-norm fp32 embeddings (b, d) of ids in the contrastive layout (b, l)."""
        return self.pool_text(self.words(ids))

    def forward(self, pixel_values: torch.Tensor, web_ids: torch.Tensor, sub_ids: torch.Tensor) -> ClipsOutput:
        """Everything the objective needs. Both texts go through the tower in one pass."""
        with torch.no_grad():  # clamping the parameter, not its exponential, leaves a gradient to come back with
            self.logit_scale.clamp_(max=math.log(MAX_SCALE))
        patches = self.patches(pixel_values)
        words = self.words(torch.cat([web_ids, sub_ids]))
        texts = self.pool_text(words)
        pairs = len(web_ids)
        return ClipsOutput(
            image=self.pool_image(patches),
            web=texts[:pairs],
            sub=texts[pairs:],
            scale=self.logit_scale.exp()[0],
            caption_logits=None if self.captioner is None else self.captioner(patches, words[:pairs]),
        )
