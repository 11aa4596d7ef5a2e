"""95 % confidence intervals of scores and paired tests between two runs, resampled by image.

Answers about the same image are correlated, so the bootstrap draws images with all their questions (cluster bootstrap:
Cameron, Gelbach & Miller 2008). Every metric here is a ratio of sums, which makes a resample one matrix product:

    value = sum over strata of (sum of numerators / sum of denominators)

    metric            numerator / denominator of a document
    accuracy          correct / 1
    open accuracy     (correct and open) / open
    F1                2 tp / (predicted yes + is yes)
    MME               points of the question / 1, one stratum per category

A resample has no value if a stratum has denominator 0, such as open accuracy without an open question; it is left out.

Shapes: N documents, C clusters, S strata, R resamples.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    import numpy as np

RESAMPLES = 2000
MAX_PERMUTATIONS = 40_000  # if the first RESAMPLES permutations have no difference as large as the observed one
CHUNK = 250  # resamples at a time; memory is CHUNK * C numbers
MIN_CLUSTERS = 6  # of a median; min and max of five samples cover it with probability 1 - 2 / 2^5 = 93.75 % only
Verdict = Literal["better", "worse", "no difference"]


class Undefined(ValueError):
    """A metric without a value, such as precision if the model never answers yes."""


@dataclass(frozen=True, kw_only=True)
class Scores:
    """A metric as numerators and denominators per document; see the formula at the top of this module.

    Args:
        numerators, denominators: N numbers each.
        clusters: N names, equal for documents about the same image.
        strata: N names; None for a single stratum.
    """

    numerators: Sequence[float]
    denominators: Sequence[float]
    clusters: Sequence[str]
    strata: Sequence[str] | None = None

    def __post_init__(self) -> None:
        sizes = {len(self.numerators), len(self.denominators), len(self.clusters)}
        assert len(sizes) == 1 and (self.strata is None or len(self.strata) in sizes)


@dataclass(frozen=True, kw_only=True)
class Interval:
    """95 % confidence interval; both ends are None if it is unknown.

    `n` documents have a denominator above 0; they show `clusters` images.
    """

    low: float | None
    high: float | None
    n: int
    clusters: int


@dataclass(frozen=True, kw_only=True)
class Difference:
    """Our value minus theirs on the same documents, with its interval.

    Args:
        p: two-sided p-value of the permutation test.
        adjusted: `p` after Holm's correction for several metrics; None before it.
        lower: True if a lower value of the metric is better.
    """

    value: float
    low: float
    high: float
    p: float
    n: int
    clusters: int
    adjusted: float | None = None
    lower: bool = False

    @property
    def verdict(self) -> Verdict:
        """Verdict on our run at the 5 % level."""
        if (self.p if self.adjusted is None else self.adjusted) >= 0.05:
            return "no difference"
        return "better" if (self.value < 0) == self.lower else "worse"


def value(scores: Scores) -> float:
    """Return the metric's value, 0 if it is undefined."""
    import numpy as np

    numerators, denominators = _sums(scores)
    ratio = float(_ratio(numerators, denominators, np.ones((1, len(numerators))))[0])
    return 0.0 if math.isnan(ratio) else ratio


def interval(scores: Scores, *, resamples: int = RESAMPLES, seed: int = 0) -> Interval:
    """Return the percentile-bootstrap interval over clusters.

    If all resamples are equal (a score of 0 % or 100 %, a single image), the bootstrap would claim certainty. Then a
    proportion has Wilson's interval over the clusters, and any other metric has none.
    """
    import numpy as np

    numerators, denominators = _sums(scores)
    n, clusters = _count(scores), int((denominators.sum(axis=1) > 0).sum())
    values = np.concatenate(
        [_ratio(numerators, denominators, weights) for weights in _draws(len(numerators), resamples, seed)]
    )
    values = values[np.isfinite(values)]
    if not len(values):
        return Interval(low=None, high=None, n=n, clusters=clusters)
    low, high = np.quantile(values, (0.025, 0.975))
    if high - low > 1e-12:
        return Interval(low=float(low), high=float(high), n=n, clusters=clusters)
    if not all(0 <= top <= bottom for top, bottom in zip(scores.numerators, scores.denominators, strict=True)):
        return Interval(low=None, high=None, n=n, clusters=clusters)
    low, high = wilson(value(scores), clusters)
    return Interval(low=low, high=high, n=n, clusters=clusters)


def median_interval(
    values: Sequence[float], clusters: Sequence[str], *, resamples: int = RESAMPLES, seed: int = 0
) -> Interval:
    """Return the percentile-bootstrap interval of the median, drawing clusters (Efron & Tibshirani 1993, section 13.3).

    The order-statistic interval is not used: it assumes independent values, and captions of one image are not. Both
    ends are None below MIN_CLUSTERS. They can be equal, since ranks are integers and many share a value.

    Args:
        values: N numbers, at least one.
        clusters: N names, equal for values of the same image.
    """
    import numpy as np

    order = np.argsort(np.asarray(values, dtype=float), kind="stable")
    ordered = np.asarray(values, dtype=float)[order]
    names, cluster = np.unique(np.asarray(clusters)[order], return_inverse=True)
    count = len(names)
    if count < MIN_CLUSTERS:
        return Interval(low=None, high=None, n=len(ordered), clusters=count)
    rng = np.random.default_rng([seed, 2])
    medians = []
    for _ in range(resamples):
        drawn = np.bincount(rng.integers(0, count, count), minlength=count)
        medians.append(_weighted_median(ordered, drawn[cluster]))
    low, high = np.quantile(medians, (0.025, 0.975))
    return Interval(low=float(low), high=float(high), n=len(ordered), clusters=count)


def paired(ours: Scores, theirs: Scores, *, resamples: int = RESAMPLES, seed: int = 0) -> Difference:
    """Compare two runs on the same documents.

    The interval draws the same images for both runs. The p-value is that of a permutation test, which swaps the two
    runs at random image by image. If R permutations have no difference as large as the observed one, it continues until
    one has or MAX_PERMUTATIONS are done: after Holm's correction for many metrics 1 / (R + 1) could not be significant.

    Raises:
        ValueError: the two runs have different documents.
        Undefined: the metric has no value for one of them.
    """
    import numpy as np

    if list(ours.clusters) != list(theirs.clusters) or ours.strata != theirs.strata:
        raise ValueError("the two runs answer different documents")
    (top, bottom), (top_b, bottom_b) = _sums(ours), _sums(theirs)

    def difference(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        """Return (R,) differences; `a` and `b` (R, C) are the weights of our and their clusters on the left side."""
        left = _ratio(np.vstack([top, top_b]), np.vstack([bottom, bottom_b]), np.hstack([a, b]))
        right = _ratio(np.vstack([top, top_b]), np.vstack([bottom, bottom_b]), np.hstack([b, a]))
        return left - right

    clusters = len(top)
    once, none = np.ones((1, clusters)), np.zeros((1, clusters))
    observed = float(difference(once, none)[0])
    if math.isnan(observed):
        raise Undefined("it has no value for one of the two")
    resampled = np.concatenate([difference(weights, 0 * weights) for weights in _draws(clusters, resamples, seed)])
    rng = np.random.default_rng([seed, 1])
    extreme = rounds = valid = 0
    while rounds < resamples or (not extreme and rounds < MAX_PERMUTATIONS):
        kept = rng.integers(0, 2, (CHUNK if rounds >= resamples else min(CHUNK, resamples - rounds), clusters))
        permuted = difference(kept.astype(float), 1.0 - kept)
        rounds += len(kept)
        valid += int(np.isfinite(permuted).sum())
        extreme += int((np.abs(permuted) >= abs(observed) - 1e-12).sum())
    low, high = np.quantile(resampled[np.isfinite(resampled)], (0.025, 0.975))
    return Difference(
        value=observed,
        low=float(low),
        high=float(high),
        p=(extreme + 1) / (valid + 1),
        n=_count(ours),
        clusters=clusters,
    )


def holm(differences: Sequence[Difference]) -> list[Difference]:
    """Set `adjusted` by Holm's correction (1979): the chance of any false verdict among all stays below 5 %."""
    order = sorted(range(len(differences)), key=lambda index: differences[index].p)
    adjusted, largest = [0.0] * len(differences), 0.0
    for rank, index in enumerate(order):
        largest = max(largest, min(1.0, (len(differences) - rank) * differences[index].p))
        adjusted[index] = largest
    return [replace(one, adjusted=p) for one, p in zip(differences, adjusted, strict=True)]


def wilson(share: float, n: int, z: float = 1.96) -> tuple[float, float]:
    """Return Wilson's score interval of a proportion, 95 % by default (E. B. Wilson 1927).

    Unlike share ± z * standard error it stays inside [0, 1] and keeps its coverage at 0 %, at 100 % and for small n.
    """
    center = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return max(0.0, center - half), min(1.0, center + half)


def _count(scores: Scores) -> int:
    """Count the documents with a denominator above 0; open accuracy does not count yes/no questions."""
    return sum(1 for denominator in scores.denominators if denominator)


def _sums(scores: Scores) -> tuple[np.ndarray, np.ndarray]:
    """Sum numerators and denominators by cluster and stratum, (C, S) each."""
    import numpy as np

    _, cluster = np.unique(np.asarray(scores.clusters), return_inverse=True)
    names = scores.strata if scores.strata is not None else [""] * len(scores.clusters)
    _, stratum = np.unique(np.asarray(names), return_inverse=True)
    sums = []
    for values in (scores.numerators, scores.denominators):
        table = np.zeros((cluster.max() + 1, stratum.max() + 1))
        np.add.at(table, (cluster, stratum), np.asarray(values, dtype=float))
        sums.append(table)
    return sums[0], sums[1]


def _ratio(numerators: np.ndarray, denominators: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Return (R,) values, NaN if undefined; `weights` (R, C) is how often each cluster was drawn."""
    import numpy as np

    used = denominators.sum(axis=0) > 0  # MME's perception score does not use cognition's categories
    if not used.any():
        return np.full(len(weights), np.nan)
    above, below = weights @ numerators[:, used], weights @ denominators[:, used]
    return np.divide(above, below, out=np.full_like(above, np.nan), where=below > 0).sum(axis=1)


def _draws(clusters: int, resamples: int, seed: int) -> Iterator[np.ndarray]:
    """Yield how often each cluster is drawn, at most (CHUNK, C) at a time."""
    import numpy as np

    rng = np.random.default_rng([seed, 0])
    for start in range(0, resamples, CHUNK):
        size = min(CHUNK, resamples - start)
        yield rng.multinomial(clusters, np.full(clusters, 1 / clusters), size).astype(float)


def _weighted_median(ordered: np.ndarray, counts: np.ndarray) -> float:
    """Return the median of sorted values (N,) repeated `counts` (N,) times; the mean of the middle two if even."""
    ends = counts.cumsum()
    total = int(ends[-1])
    lower, upper = ends.searchsorted([(total - 1) // 2, total // 2], side="right")
    return float(ordered[lower] + ordered[upper]) / 2
