"""The captioner: learnable queries attend to image and prompt, and predict the full synthetic caption.

    CLIPS    [patches | web tokens | queries]                 all tokens in parallel, no teacher forcing
    CoCa     [patches | queries + previous tokens]            teacher-forced, the baseline

The combination mask of CLIPS: the prefix attends to itself only; query t attends to the prefix and to queries <= t.
Shapes: b pairs, p prefix rows, q queries, w width, v vocabulary, l text length.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import SiglipTextConfig
from transformers.models.siglip.modeling_siglip import SiglipEncoderLayer

from vision_tower.model.attention import attend
from vision_tower.model.losses import summed_cross_entropy

if TYPE_CHECKING:
    from vision_tower.model.config import ClipsConfig


class CaptionerLayer(SiglipEncoderLayer):
    """The stock block with the combination mask, computed without the dense (p + q, p + q) mask.

    The prefix attends to itself without a mask; the queries attend to all rows with a (q, p + q) mask. The last layer
    computes only the queries, because the prefix is used there as keys and values only.
    """

    def forward(  # type: ignore[override]
        self, hidden: torch.Tensor, prefix: int, last: bool, seen: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Map (b, p + q, w) to the same shape, or to (b, q, w) in the last layer.

        Args:
            prefix: number of prefix rows p.
            last: True in the last layer.
            seen: (b, p) bool, prefix rows that may be attended to; None allows all.
        """
        start = prefix if last else 0
        hidden = hidden[:, start:] + self._attend(self.layer_norm1(hidden), prefix, start, seen)
        return hidden + self.mlp(self.layer_norm2(hidden))

    def _attend(self, hidden: torch.Tensor, prefix: int, start: int, seen: torch.Tensor | None) -> torch.Tensor:
        attention = self.self_attn

        def heads(rows: torch.Tensor) -> torch.Tensor:
            return rows.unflatten(-1, (-1, attention.head_dim)).transpose(1, 2)

        keys, values = heads(attention.k_proj(hidden)), heads(attention.v_proj(hidden))
        projected = heads(attention.q_proj(hidden[:, start:]))
        queries = projected[:, :, prefix - start :]
        allowed = torch.ones(queries.shape[2], keys.shape[2], dtype=torch.bool, device=hidden.device).tril(prefix)
        prefix_mask = None if seen is None else seen[:, None, None]
        if prefix_mask is not None:
            allowed = allowed & F.pad(prefix_mask, (0, queries.shape[2]), value=True)
        outputs = [attend(queries, keys, values, allowed)]
        if start < prefix:
            outputs.insert(0, attend(projected[:, :, :prefix], keys[:, :, :prefix], values[:, :, :prefix], prefix_mask))
        return attention.out_proj(torch.cat(outputs, dim=2).transpose(1, 2).flatten(2))


class CaptionHead(nn.Linear):
    """Vocabulary layer fused with its loss, so that the logits of a batch are never held in memory at once.

    Logits and loss are fp32, as published. The matrix products of the backward pass use the precision of the run.
    """

    def forward(self, hidden: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        """Return the summed cross entropy of states (n, w) and labels (n,)."""
        device = hidden.device.type
        mixed = torch.is_autocast_enabled(device)
        backward = torch.get_autocast_dtype(device) if mixed else self.weight.dtype
        with torch.autocast(device, enabled=False):
            return summed_cross_entropy(hidden.float(), self.weight.float(), labels, backward)


class Captioner(nn.Module):
    """Computes the query states; `head` is the vocabulary layer with the loss."""

    def __init__(self, config: ClipsConfig) -> None:
        super().__init__()
        width = config.captioner_width
        self.image_projection = nn.Linear(config.vision_config.hidden_size, width, bias=False)
        self.text_projection = nn.Linear(config.text_config.hidden_size, width, bias=False)
        self.queries = nn.Parameter(torch.empty(config.captioner_queries, width))
        self.layers = nn.ModuleList(CaptionerLayer(_layer_config(config)) for _ in range(config.captioner_layers))
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.head = CaptionHead(width, config.text_config.vocab_size, bias=False)

    def forward(
        self,
        patches: torch.Tensor,
        *,
        words: torch.Tensor | None = None,
        seen: torch.Tensor | None = None,
        earlier: torch.Tensor | None = None,
        length: int | None = None,
    ) -> torch.Tensor:
        """Return the normalized fp32 states (b, q, w) of the first `length` queries.

        Queries attend only to earlier ones, so those after the longest target are not computed.

        Args:
            patches: image tokens before the final LayerNorm, (b, patches, wv).
            words: tokens of the web caption before the final LayerNorm, (b, l, wt): the prompt of CLIPS.
            seen: (b, l) bool, words that may be attended to; None allows all.
            earlier: embeddings of the token before each target, (b, length, wt), for teacher forcing.
            length: number of queries; None computes all.
        """
        prefix = self.image_projection(patches)
        if words is not None:
            prefix = torch.cat([prefix, self.text_projection(words)], dim=1)
        if seen is not None:
            seen = F.pad(seen, (patches.shape[1], 0), value=True)
        queries = self.queries[:length].to(prefix.dtype).expand(len(prefix), -1, -1)
        if earlier is not None:
            queries = queries + self.text_projection(earlier)
        hidden = torch.cat([prefix, queries], dim=1)
        for number, layer in enumerate(self.layers, start=1):
            hidden = layer(hidden, prefix.shape[1], number == len(self.layers), seen)
        with torch.autocast(hidden.device.type, enabled=False):
            return self.norm(hidden.to(self.norm.weight.dtype)).float()


def _layer_config(config: ClipsConfig) -> Any:
    return SiglipTextConfig(
        hidden_size=config.captioner_width,
        intermediate_size=config.captioner_mlp,
        num_hidden_layers=config.captioner_layers,
        num_attention_heads=config.captioner_heads,
        hidden_act="gelu_pytorch_tanh",
        layer_norm_eps=1e-6,
        attn_implementation=config._attn_implementation or "sdpa",
        bos_token_id=None,  # no vocabulary here; the default ids would cause a warning
        eos_token_id=None,
    )
