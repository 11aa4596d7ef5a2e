"""Which samples of which sources an epoch has: weights and caps, chosen once by the seed."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from clips_mllm.data.recipe import InstructionSource


def mix(sources: Sequence[InstructionSource], sizes: Sequence[int], seed: int) -> np.ndarray | None:
    """Places of an epoch's samples in the line of all sources, (n,) int64; None where it is the line itself.

    A source comes `weight` times, at most `cap` samples of it: whole passes, and a random part of one, in file order.
    """
    if all(source.weight == 1 and not 0 < source.cap < size for source, size in zip(sources, sizes, strict=True)):
        return None
    chosen: list[np.ndarray] = []
    begin = 0
    for number, (source, size) in enumerate(zip(sources, sizes, strict=True)):
        passes, rest = divmod(share(source, size), size)
        some = np.sort(np.random.default_rng([seed, number]).permutation(size)[:rest])
        chosen += [begin + np.arange(size)] * passes + [begin + some]
        begin += size
    return np.concatenate(chosen)


def share(source: InstructionSource, size: int) -> int:
    """Samples of an epoch from a source that holds `size`."""
    count = max(round(source.weight * size), 1)
    return min(count, source.cap) if source.cap else count
