"""Softmax attention with the fastest implementation of the device.

PyTorch's fused CPU kernel is optimized for long sequences. At the 50 to 250 positions of pretraining, its bf16 forward
and backward passes take several times as long as plain matrix products (docs/log.md).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from transformers import PreTrainedModel


def attend(
    queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, allowed: torch.Tensor | None = None
) -> torch.Tensor:
    """Compute attention of queries (b, h, q, d) over keys and values (b, h, k, d); returns (b, h, q, d).

    Args:
        allowed: bool mask, broadcast to (b, h, q, k): True allows attention. None allows all.
    """
    if not prefers_plain(queries.device, queries.dtype):
        return F.scaled_dot_product_attention(queries, keys, values, attn_mask=allowed)
    scores = (queries * queries.shape[-1] ** -0.5) @ keys.transpose(-1, -2)
    if allowed is not None:
        scores = scores.masked_fill(~allowed, -torch.inf)
    return scores.softmax(dim=-1) @ values


def prefers_plain(device: torch.device, dtype: torch.dtype) -> bool:
    """Return True if plain matrix products are faster than the fused kernel."""
    return device.type == "cpu" and dtype == torch.bfloat16


def choose_attention(model: PreTrainedModel, device: torch.device, dtype: torch.dtype) -> None:
    """Set the implementation of the stock towers for training in `dtype`. Checkpoints do not contain it."""
    if prefers_plain(device, dtype):
        model.set_attn_implementation("eager")
