"""Keys and values of what was read before, so that a later turn only reads what is new."""

from __future__ import annotations

import dataclasses
from collections import OrderedDict
from collections.abc import Callable

import torch
from transformers import DynamicCache

from clips_mllm.talk.prompt import Prompt, Shown

Layers = list[tuple[torch.Tensor, torch.Tensor]]


@dataclasses.dataclass
class Prefix:
    """What was read, and each layer's keys and values for it, (1, heads, positions, width)."""

    keys: list[int | str]
    layers: Layers


class Prefixes:
    """The prefixes that were used last, up to `budget` positions in all. The oldest is forgotten first."""

    def __init__(self, budget: int) -> None:
        self.budget = budget
        self.kept: list[Prefix] = []

    def longest(self, prompt: Prompt) -> tuple[DynamicCache, int]:
        """A cache of its own for `prompt`, filled as far as some kept prefix agrees with it, and how far that is."""
        best, length = None, 0
        for prefix in self.kept:
            shared = prompt.shared(prefix.keys)
            if shared > length:
                best, length = prefix, shared
        if best is None:
            return DynamicCache(), 0
        self.kept.remove(best)
        self.kept.append(best)
        return cache_of([(key[..., :length, :], value[..., :length, :]) for key, value in best.layers]), length

    def keep(self, prefix: Prefix) -> None:
        """Remember, in place of those that it continues."""
        self.kept = [old for old in self.kept if old.keys != prefix.keys[: len(old.keys)]]
        self.kept.append(prefix)
        total = sum(len(old.keys) for old in self.kept)
        while total > self.budget and self.kept:
            total -= len(self.kept.pop(0).keys)


def cache_of(layers: Layers) -> DynamicCache:
    """A cache with copies of these keys and values."""
    return DynamicCache(layers)


def layers_of(cache: DynamicCache) -> Layers:
    """Each layer's keys and values."""
    return [(layer.keys, layer.values) for layer in cache.layers]


class Features:
    """Projected patches of the images shown last, (patches, width) each: no image runs through the tower twice."""

    def __init__(self, encode: Callable[[list[Shown]], list[torch.Tensor]], most: int = 64) -> None:
        self.encode = encode
        self.most = most
        self.kept: OrderedDict[str, torch.Tensor] = OrderedDict()

    def of(self, images: list[Shown]) -> list[torch.Tensor]:
        """Features of each, in order; those not seen before are encoded together."""
        new = {image.key: image for image in images if image.key not in self.kept}
        if new:
            self.kept.update(zip(new, self.encode(list(new.values())), strict=True))
        found = []
        for image in images:
            self.kept.move_to_end(image.key)
            found.append(self.kept[image.key])
        while len(self.kept) > self.most:
            self.kept.popitem(last=False)
        return found
