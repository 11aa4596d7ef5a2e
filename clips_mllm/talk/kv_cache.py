"""Key-value caches: the batch that is being decoded, and prefixes kept for later turns.

Shapes: b rows, h key-value heads, n positions, d head width. Rows of the batch are padded on the left and the padding
is masked, so each row gets the tokens it would get alone, up to rounding.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch.nn import functional
from transformers import DynamicCache

from clips_mllm.talk.prompt import Prompt

Layers = list[tuple[torch.Tensor, torch.Tensor]]  # keys and values of each layer, (b, h, n, d)


def layers_of(cache: DynamicCache) -> Layers:
    """Return the keys and values of each layer."""
    return [(layer.keys, layer.values) for layer in cache.layers]


@dataclasses.dataclass
class Prefix:
    """Keys and values of positions that were read, with b = 1, and the identity of each position."""

    keys: list[int | str]
    layers: Layers


class PrefixCache:
    """The most recently used prefixes, up to `budget` positions in total."""

    def __init__(self, budget: int) -> None:
        self.budget = budget
        self.entries: list[Prefix] = []

    def longest(self, prompt: Prompt) -> tuple[DynamicCache, int]:
        """Return a new cache filled with the longest known prefix of `prompt`, and the prefix's length."""
        best, length = None, 0
        for prefix in self.entries:
            shared = prompt.shared_length(prefix.keys)
            if shared > length:
                best, length = prefix, shared
        if best is None:
            return DynamicCache(), 0
        self.entries.remove(best)
        self.entries.append(best)
        return DynamicCache([(key[..., :length, :], value[..., :length, :]) for key, value in best.layers]), length

    def add(self, prefix: Prefix) -> None:
        """Add a prefix; it replaces the entries that it extends. Evict the oldest entries beyond the budget."""
        self.entries = [old for old in self.entries if old.keys != prefix.keys[: len(old.keys)]]
        self.entries.append(prefix)
        total = sum(len(entry.keys) for entry in self.entries)
        while total > self.budget and self.entries:
            total -= len(self.entries.pop(0).keys)


class DecodingBatch:
    """Keys and values of b rows, and the mask (b, n) of their padding. Rows join and leave between two tokens."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.cache: DynamicCache | None = None
        self.mask = torch.ones(0, 0, dtype=torch.long)

    def add(self, layers: Layers) -> None:
        """Append a row, with b = 1."""
        length = layers[0][0].shape[-2]
        ones = torch.ones(1, length, dtype=torch.long, device=layers[0][0].device)
        if self.cache is None:
            self.cache, self.mask = DynamicCache(layers), ones
            return
        longest = max(self.mask.shape[1], length)
        pairs = zip(layers_of(self.cache), layers, strict=True)
        self.cache = DynamicCache(
            [(_stack(old[0], new[0], longest), _stack(old[1], new[1], longest)) for old, new in pairs]
        )
        self.mask = torch.cat([functional.pad(mask, (longest - mask.shape[1], 0)) for mask in (self.mask, ones)])

    def step(self, tokens: list[int], lengths: list[int]) -> torch.Tensor:
        """Read the next token of each row.

        Args:
            tokens: b token ids.
            lengths: positions read before in each row.
        Returns:
            Logits (b, vocabulary).
        """
        device = self.mask.device
        self.mask = functional.pad(self.mask, (0, 1), value=1)
        padded = self.mask.shape[1] > min(lengths) + 1
        out = self.model(
            input_ids=torch.tensor(tokens, device=device)[:, None],
            position_ids=torch.tensor(lengths, device=device)[:, None],
            attention_mask=self.mask if padded else None,
            past_key_values=self.cache,
            logits_to_keep=1,
        )
        return out.logits[:, -1]

    def row(self, index: int) -> Layers:
        """Return a copy of one row without its padding, with b = 1."""
        assert self.cache is not None
        start = self.mask.shape[1] - int(self.mask[index].sum())
        return [
            (key[index : index + 1, :, start:].clone(), value[index : index + 1, :, start:].clone())
            for key, value in layers_of(self.cache)
        ]

    def keep(self, rows: list[int]) -> None:
        """Remove all other rows, and the padding that only they needed."""
        assert self.cache is not None
        if not rows:
            self.cache, self.mask = None, self.mask[:0, :0]
            return
        selected = torch.tensor(rows, device=self.mask.device)
        self.mask = self.mask[selected]
        start = self.mask.shape[1] - int(self.mask.sum(1).max())
        self.mask = self.mask[:, start:]
        self.cache = DynamicCache(
            [(key[selected][:, :, start:], value[selected][:, :, start:]) for key, value in layers_of(self.cache)]
        )


def _stack(old: torch.Tensor, new: torch.Tensor, length: int) -> torch.Tensor:
    """Pad both to `length` positions on the left, and concatenate their rows."""
    return torch.cat([functional.pad(part, (0, 0, length - part.shape[-2], 0)) for part in (old, new)])
