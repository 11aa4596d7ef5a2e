"""The captioner: learnable queries that read the image and a prompt, and say the full synthetic caption.

    CLIPS    [patches | web tokens | queries]                 all pieces at once, no teacher forcing
    CoCa     [patches | queries + pieces before them]         teacher-forced, the baseline

The combination mask of CLIPS: the prefix sees all of itself and no query; query t sees the prefix and queries <= t.
Shapes: b pairs, p prefix rows, q queries, w width, v vocabulary.
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
    """The stock block under the combination mask, without the (p + q, p + q) matrix that the mask would be.

    The prefix attends to itself with no mask; the queries attend to everything with (q, p + q). In the last layer only
    the queries go on: the prefix is needed as keys and values there, and no further.
    """

    def forward(  # type: ignore[override]
        self, hidden: torch.Tensor, prefix: int, last: bool, seen: torch.Tensor | None = None
    ) -> torch.Tensor:
        """(b, p + q, w) -> the same, or (b, q, w) in the last layer.

        Args:
            prefix: p.
            seen: which rows of the prefix may be attended to, (b, p) bool; all without it.
        """
        start = prefix if last else 0
        hidden = hidden[:, start:] + self._attend(self.layer_norm1(hidden), prefix, start, seen)
        return hidden + self.mlp(self.layer_norm2(hidden))

    def _attend(self, hidden: torch.Tensor, prefix: int, start: int, seen: torch.Tensor | None) -> torch.Tensor:
        attention = self.self_attn

        def heads(rows: torch.Tensor) -> torch.Tensor:
            return rows.unflatten(-1, (-1, attention.head_dim)).transpose(1, 2)

        keys, values = heads(attention.k_proj(hidden)), heads(attention.v_proj(hidden))
        asking = heads(attention.q_proj(hidden[:, start:]))
        queries = asking[:, :, prefix - start :]
        allowed = torch.ones(queries.shape[2], keys.shape[2], dtype=torch.bool, device=hidden.device).tril(prefix)
        within = None if seen is None else seen[:, None, None]
        if within is not None:
            allowed = allowed & F.pad(within, (0, queries.shape[2]), value=True)
        answers = [attend(queries, keys, values, allowed)]
        if start < prefix:
            inside = asking[:, :, :prefix]
            before = keys[:, :, :prefix], values[:, :, :prefix]
            answers.insert(0, attend(inside, *before, within))
        return attention.out_proj(torch.cat(answers, dim=2).transpose(1, 2).flatten(2))


class CaptionHead(nn.Linear):
    """The vocabulary layer with its loss: the logits of a whole batch are never held.

    Logits and loss are fp32, as published. The products behind them in the backward pass are in the precision of the
    run, as those of every other layer.
    """

    def forward(self, hidden: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        """Sum of cross entropies of (n, w) states and their n labels."""
        device = hidden.device.type
        mixed = torch.is_autocast_enabled(device)
        backward = torch.get_autocast_dtype(device) if mixed else self.weight.dtype
        with torch.autocast(device, enabled=False):
            return summed_cross_entropy(hidden.float(), self.weight.float(), labels, backward)


class Captioner(nn.Module):
    """Queries to states before the vocabulary layer, which is `head`."""

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
        """Normed fp32 states (b, q, w) of the first `length` queries.

        Queries see only earlier ones, so those behind the longest target change nothing and need not be computed.

        Args:
            patches: unnormalised image tokens, (b, patches, wv).
            words: unnormalised tokens of the web caption, (b, l, wt): the prompt of CLIPS.
            seen: which of the words may be attended to, (b, l) bool; all without it.
            earlier: embeddings of the piece before each target, (b, length, wt): teacher forcing.
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
        bos_token_id=None,  # it has no vocabulary of its own, and the defaults would draw a warning
        eos_token_id=None,
    )
