"""The pretraining model: a stock vision tower, a stock text tower and the captioner.

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
    """Unit-norm embeddings (b, d), texts by stream, the clamped logit scale, and the sum of the captioner's losses."""

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
            # Positions of pieces, in CoCa, must not drown the pieces.
            nn.init.normal_(module.queries, std=0.01 if self.config.teacher_forced else 1.0)
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
        """The last block's text tokens, not normalised, (b, l, wt). Padding is attended to, as published, or masked.

        Masked, `ids` may be trimmed to the longest text: `[CLS]` keeps the last position of the whole context.
        """
        seen = self._seen(ids)
        if seen is None:
            embeddings, mask = self.text_model.embeddings(input_ids=ids), None
        else:
            positions = torch.arange(ids.shape[1], device=ids.device)
            positions[-1] = self.config.text_config.max_position_embeddings - 1
            embeddings = self.text_model.embeddings(input_ids=ids, position_ids=positions[None])
            # Added to the scores: of all attention implementations only some take a bool.
            mask = torch.zeros(seen.shape, dtype=embeddings.dtype, device=ids.device)
            mask = mask.masked_fill(~seen, torch.finfo(mask.dtype).min)[:, None, None]
        return self.text_model.encoder(inputs_embeds=embeddings, attention_mask=mask).last_hidden_state

    def _seen(self, ids: torch.Tensor) -> torch.Tensor | None:
        """Which positions may be attended to, (b, l) bool; None where all may."""
        return None if self.config.padding == "attended" else ids != self.config.text_config.pad_token_id

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

    def forward(
        self,
        pixel_values: torch.Tensor,
        web_ids: torch.Tensor | None = None,
        sub_ids: torch.Tensor | None = None,
        mix_ids: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
    ) -> ClipsOutput:
        """Everything an objective needs. All texts go through the tower in one pass.

        Args:
            pixel_values: (b, 3, h, w).
            web_ids: web captions in the contrastive layout, (b, l); so are `sub_ids` and `mix_ids`.
            labels: the captioner's targets, (b, at most its queries); without them it does not run.
        """
        with torch.no_grad():  # clamping the parameter, not its exponential, leaves a gradient to come back with
            self.logit_scale.clamp_(max=math.log(MAX_SCALE))
        patches = self.patches(pixel_values)
        given = dict(zip(STREAMS, (web_ids, sub_ids, mix_ids), strict=True))
        streams = {name: ids for name, ids in given.items() if ids is not None}
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
        """Sum of the captioner's cross entropies; the vocabulary layer runs where there are targets, and only there.

        Args:
            words: tokens of the web captions, whose ids are `ids`; a teacher-forced captioner reads neither.
        """
        assert self.captioner is not None
        length = labels.shape[1]
        if self.config.teacher_forced:
            hidden = self.captioner(patches, earlier=self._earlier_pieces(labels), length=length)
        else:
            assert ids is not None
            hidden = self.captioner(patches, words=words, seen=self._seen(ids), length=length)
        wanted = labels != IGNORED
        return self.captioner.head(hidden[wanted], labels[wanted])

    def _earlier_pieces(self, labels: torch.Tensor) -> torch.Tensor:
        """Embeddings of `[bos]` and of every target but the last, (b, q, wt)."""
        ids = labels.roll(1, dims=1)
        ids[:, 0] = self.config.text_config.bos_token_id
        return self.text_model.embeddings.token_embedding(ids.clamp(min=0))  # what follows [eos] trains nothing
