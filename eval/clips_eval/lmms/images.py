"""Identify evaluation images by a digest of their pixels, and exchange them for the shuffled control.

A benchmark asks many questions about few images (POPE: 18 about each of 500), so the tower runs once per digest.
"""

from __future__ import annotations

import random
from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    pass


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
