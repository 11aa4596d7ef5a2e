"""Exchange the images of a task for the shuffled control."""

from __future__ import annotations

import random
from collections.abc import Iterable


def derangement(names: Iterable[str], seed: int) -> dict[str, str]:
    """Map every distinct name to another one: a random cycle through all names (Sattolo's algorithm).

    Depends on the set of names and on the seed, not on their order.

    Raises:
        ValueError: there is only one name.
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
