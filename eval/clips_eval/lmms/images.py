"""Images of an evaluation: which are the same, which one is shown instead, and features that are computed once.

A benchmark asks many questions about few images (POPE: 18 about each of 500), so images are known by the digest of
their pixels, and the tower runs once for each.
"""

from __future__ import annotations

import hashlib
import random
from collections import OrderedDict
from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor


def pixel_digest(image: Image) -> str:
    """A name for what the image shows: equal for equal pixels, whatever file they came from."""
    digest = hashlib.blake2b(f"{image.mode}{image.size}".encode(), digest_size=16)
    digest.update(image.tobytes())
    return digest.hexdigest()


def derangement(names: Iterable[str], seed: int) -> dict[str, str]:
    """Map every distinct name to another one: a random cycle through all of them (Sattolo's algorithm).

    A function of the set of names and of the seed, not of their order.

    Raises:
        ValueError: a single name, which has no other to go to.
    """
    before = sorted(set(names))
    if len(before) == 1:
        raise ValueError("one image cannot be exchanged for another")
    after = before.copy()
    rng = random.Random(seed)
    for last in range(len(after) - 1, 0, -1):
        other = rng.randrange(last)
        after[last], after[other] = after[other], after[last]
    return dict(zip(before, after, strict=True))


class FeatureCache:
    """Image features by digest, on the CPU; the least recently used go when `budget` bytes are exceeded."""

    def __init__(self, budget: int) -> None:
        self.budget = budget
        self.size = 0
        self._features: OrderedDict[str, Tensor] = OrderedDict()

    def get(self, digest: str) -> Tensor | None:
        """The features of an image, (tokens, width), or None."""
        if digest in self._features:
            self._features.move_to_end(digest)
        return self._features.get(digest)

    def put(self, digest: str, features: Tensor) -> None:
        """Keep (tokens, width)."""
        assert digest not in self._features
        # `features` is a view of a batch: without the copy it would keep the whole batch alive.
        kept = features.detach().to("cpu", copy=True)
        self._features[digest] = kept
        self.size += kept.nbytes
        while self.size > self.budget:
            _, gone = self._features.popitem(last=False)
            self.size -= gone.nbytes
