"""Answers in the making, decoded together: rows join and leave between two tokens.

Shapes: b rows, h key-value heads, n positions, d width of a head. Rows are padded on the left; the padding is masked,
so that a row's tokens are those it would get alone, up to rounding.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch.nn import functional
from transformers import DynamicCache

from clips_mllm.talk.prefixes import Layers, cache_of, layers_of


@dataclasses.dataclass
class Cursor:
    """Where a row stands: the token to read next, and the number of positions read before it."""

    token: int
    length: int


class Batch:
    """Keys and values of b rows, each layer (b, h, n, d), and which of the n positions each row has, (b, n)."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.cache: DynamicCache | None = None
        self.mask = torch.ones(0, 0, dtype=torch.long)

    def add(self, layers: Layers) -> None:
        """Let a row join as the last; its keys and values are (1, h, positions, d)."""
        length = layers[0][0].shape[-2]
        ones = torch.ones(1, length, dtype=torch.long, device=layers[0][0].device)
        if self.cache is None:
            self.cache, self.mask = cache_of(layers), ones
            return
        most = max(self.mask.shape[1], length)
        pairs = zip(layers_of(self.cache), layers, strict=True)
        self.cache = cache_of([(_stack(old[0], new[0], most), _stack(old[1], new[1], most)) for old, new in pairs])
        self.mask = torch.cat([functional.pad(mask, (most - mask.shape[1], 0)) for mask in (self.mask, ones)])

    def step(self, cursors: list[Cursor]) -> torch.Tensor:
        """Read each row's next token; logits (b, vocabulary)."""
        device = self.mask.device
        self.mask = functional.pad(self.mask, (0, 1), value=1)
        padded = self.mask.shape[1] > min(cursor.length for cursor in cursors) + 1
        out = self.model(
            input_ids=torch.tensor([[cursor.token] for cursor in cursors], device=device),
            position_ids=torch.tensor([[cursor.length] for cursor in cursors], device=device),
            attention_mask=self.mask if padded else None,
            past_key_values=self.cache,
            logits_to_keep=1,
        )
        return out.logits[:, -1]

    def row(self, place: int) -> Layers:
        """A copy of one row's keys and values, without padding."""
        assert self.cache is not None
        first = self.mask.shape[1] - int(self.mask[place].sum())
        return [
            (key[place : place + 1, :, first:].clone(), value[place : place + 1, :, first:].clone())
            for key, value in layers_of(self.cache)
        ]

    def keep(self, places: list[int]) -> None:
        """Let all other rows leave, and the padding that only they needed."""
        assert self.cache is not None
        if not places:
            self.cache, self.mask = None, self.mask[:0, :0]
            return
        rows = torch.tensor(places, device=self.mask.device)
        self.mask = self.mask[rows]
        first = self.mask.shape[1] - int(self.mask.sum(1).max())
        self.mask = self.mask[:, first:]
        self.cache = cache_of(
            [(key[rows][:, :, first:], value[rows][:, :, first:]) for key, value in layers_of(self.cache)]
        )


def _stack(old: torch.Tensor, new: torch.Tensor, length: int) -> torch.Tensor:
    return torch.cat([functional.pad(part, (0, 0, length - part.shape[-2], 0)) for part in (old, new)])
