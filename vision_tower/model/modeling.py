"""The pretraining model: stock vision tower, stock text tower, and captioner.

pixels (b, 3, h, w) -> a stock tower  -> patches (b, p, wv) -- mean, LayerNorm, linear --> image (b, d)
texts  (b, l)       -> SiglipTextModel -> tokens  (b, l, wt) -- last, LayerNorm, linear --> texts (b, d)
[patches | web tokens | q queries] -> Captioner -> loss of the full synthetic caption
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel, SiglipTextModel

from vision_tower.model.captioner import Captioner
from vision_tower.model.config import ClipsConfig
from vision_tower.model.positions import sincos_positions
from vision_tower.model.towers import build_tower, has_class_token, patch_tokens, tower_parts
from vision_tower.text.objectives import STREAMS
from vision_tower.text.tokenizer import IGNORED

MAX_SCALE = 100.0


@dataclasses.dataclass
class ClipsOutput:
    """Unit-norm embeddings (b, d), texts by stream; the clamped logit scale; the captioner's summed cross entropy."""

    image: torch.Tensor
    texts: dict[str, torch.Tensor]
    scale: torch.Tensor
    caption_sum: torch.Tensor | None


class ClipsModel(PreTrainedModel):
    """Two stock towers and the captioner."""

    config_class = ClipsConfig
    base_model_prefix = "clips"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _no_split_modules: ClassVar[list[str]] = ["SiglipEncoderLayer", "ViTLayer", "CaptionerLayer"]

    def __init__(self, config: ClipsConfig) -> None:
        super().__init__(config)
        self.vision_model = build_tower(config.vision_config)
        self.text_model = SiglipTextModel._from_config(config.text_config)
        self.visual_projection = nn.Linear(config.vision_config.hidden_size, config.projection_dim, bias=False)
        self.captioner = Captioner(config) if config.captioner_layers else None
        # One element, not a scalar: DeepSpeed cannot broadcast a tensor without dimensions.
        self.logit_scale = nn.Parameter(torch.tensor([math.log(1 / 0.07)]))
        self.post_init()
        self._freeze_fixed_parameters()

    def _freeze_fixed_parameters(self) -> None:
        """Freeze the biases of patch embedding and text projection, which CLIPS lacks, and fixed image positions."""
        for parameter in self.absent_parameters():
            parameter.requires_grad_(False)
        tower_parts(self.vision_model).positions.requires_grad_(self.config.positions == "learned")

    def absent_parameters(self) -> list[nn.Parameter]:
        """Return parameters present in the stock classes but unused by CLIPS (zero, frozen)."""
        return [*tower_parts(self.vision_model).absent, self.text_model.head.bias]

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, Captioner):
            # In CoCa, queries are position embeddings added to token embeddings, which they must not dominate.
            nn.init.normal_(module.queries, std=0.01 if self.config.teacher_forced else 1.0)
            nn.init.normal_(module.head.weight, std=module.head.in_features**-0.5)
        elif isinstance(module, ClipsModel):
            nn.init.normal_(module.visual_projection.weight, std=module.visual_projection.in_features**-0.5)

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """Load as in transformers, then freeze the fixed parameters again, because loading makes all trainable."""
        loaded = super().from_pretrained(*args, **kwargs)
        (loaded[0] if isinstance(loaded, tuple) else loaded)._freeze_fixed_parameters()
        return loaded

    @classmethod
    def from_scratch(cls, config: ClipsConfig) -> ClipsModel:
        """Build a freshly initialized model, with sin-cos positions and zeros in the unused parameters."""
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
        """Return the patch tokens of the last block, neither normalized nor projected, (b, p, wv)."""
        return patch_tokens(self.vision_model, pixel_values)

    def words(self, ids: torch.Tensor) -> torch.Tensor:
        """Return the text tokens of the last block, not normalized, (b, l, wt).

        With masked padding, `ids` may be trimmed to the longest text: `[CLS]` keeps the last position of the context.
        """
        seen = self._seen(ids)
        if seen is None:
            embeddings, mask = self.text_model.embeddings(input_ids=ids), None
        else:
            positions = torch.arange(ids.shape[1], device=ids.device)
            positions[-1] = self.config.text_config.max_position_embeddings - 1
            embeddings = self.text_model.embeddings(input_ids=ids, position_ids=positions[None])
            # An additive mask, because only some attention implementations accept a boolean one.
            mask = torch.zeros(seen.shape, dtype=embeddings.dtype, device=ids.device)
            mask = mask.masked_fill(~seen, torch.finfo(mask.dtype).min)[:, None, None]
        return self.text_model.encoder(inputs_embeds=embeddings, attention_mask=mask).last_hidden_state

    def _seen(self, ids: torch.Tensor) -> torch.Tensor | None:
        """Return the positions that may be attended to, (b, l) bool; None if all may."""
        return None if self.config.padding == "attended" else ids != self.config.text_config.pad_token_id

    def pool_image(self, patches: torch.Tensor) -> torch.Tensor:
        """Pool patch tokens to unit-norm image embeddings (b, d): mean, LayerNorm, linear."""
        pooled = tower_parts(self.vision_model).norm(patches.mean(dim=1))
        return F.normalize(self.visual_projection(pooled).float(), dim=-1)

    def pool_text(self, words: torch.Tensor) -> torch.Tensor:
        """Pool text tokens to unit-norm text embeddings (b, d): last position, LayerNorm, linear."""
        pooled = self.text_model.final_layer_norm(words[:, -1])
        return F.normalize(self.text_model.head(pooled).float(), dim=-1)

    def embed_images(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Embed normalized pixels (b, 3, h, w) to unit-norm fp32 embeddings (b, d)."""
        return self.pool_image(self.patches(pixel_values))

    def embed_texts(self, ids: torch.Tensor) -> torch.Tensor:
        """Embed ids in the contrastive layout (b, l) to unit-norm fp32 embeddings (b, d)."""
        return self.pool_text(self.words(ids))

    def forward(
        self,
        pixel_values: torch.Tensor,
        web_ids: torch.Tensor | None = None,
        sub_ids: torch.Tensor | None = None,
        mix_ids: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
    ) -> ClipsOutput:
        """Compute the inputs of all loss terms. All texts pass through the tower in one batch.

        Args:
            pixel_values: (b, 3, h, w).
            web_ids: web captions in the contrastive layout, (b, l).
            sub_ids: parts of the synthetic captions, (b, l).
            mix_ids: mixed captions, (b, l).
            labels: target ids of the captioner, (b, at most its queries); None skips the captioner.
        """
        with torch.no_grad():  # clamp the parameter, not its exponential: at the limit it still gets a gradient
            self.logit_scale.clamp_(max=math.log(MAX_SCALE))
        patches = self.patches(pixel_values)
        inputs = dict(zip(STREAMS, (web_ids, sub_ids, mix_ids), strict=True))
        streams = {name: ids for name, ids in inputs.items() if ids is not None}
        words = self.words(torch.cat(list(streams.values())))  # web comes first
        pairs = len(pixel_values)
        texts = dict(zip(streams, self.pool_text(words).split(pairs), strict=True))
        return ClipsOutput(
            image=self.pool_image(patches),
            texts=texts,
            scale=self.logit_scale.exp()[0],
            caption_sum=None if labels is None else self.caption_sum(patches, words[:pairs], web_ids, labels),
        )

    def caption_sum(
        self, patches: torch.Tensor, words: torch.Tensor, ids: torch.Tensor | None, labels: torch.Tensor
    ) -> torch.Tensor:
        """Return the captioner's summed cross entropy; the vocabulary layer is computed at targets only.

        Args:
            patches: of `patches`.
            words: tokens of the web captions; unused with teacher forcing.
            ids: ids of the web captions; unused with teacher forcing.
            labels: target ids, (b, q).
        """
        assert self.captioner is not None
        length = labels.shape[1]
        if self.config.teacher_forced:
            hidden = self.captioner(patches, earlier=self._previous_tokens(labels), length=length)
        else:
            assert ids is not None
            hidden = self.captioner(patches, words=words, seen=self._seen(ids), length=length)
        is_target = labels != IGNORED
        return self.captioner.head(hidden[is_target], labels[is_target])

    def _previous_tokens(self, labels: torch.Tensor) -> torch.Tensor:
        """Return the embeddings of `[bos]` and of all targets except the last, (b, q, wt)."""
        ids = labels.roll(1, dims=1)
        ids[:, 0] = self.config.text_config.bos_token_id
        # Ids after [eos] are IGNORED, which is negative; their outputs have no loss.
        return self.text_model.embeddings.token_embedding(ids.clamp(min=0))
