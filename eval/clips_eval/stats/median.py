"""The median of numbers that share the luck of their images, and how far it can be trusted.

Shapes: N numbers, C clusters.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from clips_eval.stats.uncertainty import RESAMPLES, Interval

if TYPE_CHECKING:
    import numpy as np

FEWEST = 6  # clusters; of five the lowest to the highest cover the median with 1 - 2 / 2^5 = 93.75 % only


def median_interval(
    values: Sequence[float], clusters: Sequence[str], *, resamples: int = RESAMPLES, seed: int = 0
) -> Interval:
    """Percentile bootstrap of the median (Efron & Tibshirani 1993, section 13.3), drawing clusters with all they hold.

    Not the order-statistic interval, which takes the N numbers for independent: captions of one image are not. Both
    ends are None below six clusters. They may be equal: ranks are whole numbers, and most may have the same.

    Args:
        values: N numbers, at least one.
        clusters: N names, equal for what shares an image.
    """
    import numpy as np

    order = np.argsort(np.asarray(values, dtype=float), kind="stable")
    ordered = np.asarray(values, dtype=float)[order]
    names, cluster = np.unique(np.asarray(clusters)[order], return_inverse=True)
    count = len(names)
    if count < FEWEST:
        return Interval(low=None, high=None, n=len(ordered), clusters=count)
    rng = np.random.default_rng([seed, 2])
    drawn = []
    for _ in range(resamples):
        times = np.bincount(rng.integers(0, count, count), minlength=count)
        drawn.append(_median(ordered, times[cluster]))
    low, high = np.quantile(drawn, (0.025, 0.975))
    return Interval(low=float(low), high=float(high), n=len(ordered), clusters=count)


def _median(ordered: np.ndarray, times: np.ndarray) -> float:
    """Of sorted numbers (N,) of which each stands there `times` (N,) times; the mean of the middle two if even."""
    ends = times.cumsum()
    total = int(ends[-1])
    lower, upper = ends.searchsorted([(total - 1) // 2, total // 2], side="right")
    return float(ordered[lower] + ordered[upper]) / 2
