"""Softmax attention, by what is fastest on the device.

PyTorch's fused kernel for CPUs is made for long sequences. At the 50 to 250 positions of pretraining, forward and
backward in bf16 take several times as long as plain matrix products (docs/log.md).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from transformers import PreTrainedModel


def attend(
    queries: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, allowed: torch.Tensor | None = None
) -> torch.Tensor:
    """(b, h, q, d) from queries of that shape and keys and values (b, h, k, d).

    Args:
        allowed: bool, broadcast to (b, h, q, k): who may attend to whom; without it everybody.
    """
    if not plain(queries.device, queries.dtype):
        return F.scaled_dot_product_attention(queries, keys, values, attn_mask=allowed)
    scores = (queries * queries.shape[-1] ** -0.5) @ keys.transpose(-1, -2)
    if allowed is not None:
        scores = scores.masked_fill(~allowed, -torch.inf)
    return scores.softmax(dim=-1) @ values


def plain(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether plain products are faster than the fused kernel."""
    return device.type == "cpu" and dtype == torch.bfloat16


def choose_attention(model: PreTrainedModel, device: torch.device, dtype: torch.dtype) -> None:
    """The same choice for the stock towers of a model that trains in `dtype`. It is not written into checkpoints."""
    if plain(device, dtype):
        model.set_attn_implementation("eager")
