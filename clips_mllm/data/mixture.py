"""Mixtures of sources: the samples of an epoch by weight and cap, fixed by the seed."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from clips_mllm.data.recipe import InstructionSource


def mix(sources: Sequence[InstructionSource], sizes: Sequence[int], seed: int) -> np.ndarray | None:
    """Return an epoch's indices into the concatenated sources, (n,) int64; None if it is all of them once.

    A source appears `weight` times, with at most `cap` samples: complete passes and a random part, in file order.
    """
    if all(source.weight == 1 and not 0 < source.cap < size for source, size in zip(sources, sizes, strict=True)):
        return None
    chosen: list[np.ndarray] = []
    begin = 0
    for number, (source, size) in enumerate(zip(sources, sizes, strict=True)):
        passes, rest = divmod(share(source, size), size)
        partial = np.sort(np.random.default_rng([seed, number]).permutation(size)[:rest])
        chosen += [begin + np.arange(size)] * passes + [begin + partial]
        begin += size
    return np.concatenate(chosen)


def share(source: InstructionSource, size: int) -> int:
    """Return the number of samples per epoch from a source of `size` samples."""
    count = max(round(source.weight * size), 1)
    return min(count, source.cap) if source.cap else count
