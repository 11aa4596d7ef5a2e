"""How far a score can be trusted: 95 % intervals and paired tests, resampled by image.

Questions about one image share its luck, so what is drawn again is images with all their questions (a bootstrap by
cluster: Cameron, Gelbach & Miller 2008). Every metric here is a ratio of sums, which makes a resample one product:

    value = sum over strata of (sum of numerators / sum of denominators)

A resample in which a stratum has nothing to divide by has no value, and is left out: of open accuracy, one without an
open question.

    accuracy          right / 1
    open accuracy     right and open / open
    F1                2 tp / ((said yes) + (is yes))
    MME               points of a question / 1, a stratum for each category

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
MOST = 40_000  # rounds of a permutation test where the first RESAMPLES find nothing as extreme
CHUNK = 250  # resamples at a time: C of them are held for each
Verdict = Literal["better", "worse", "no difference"]


class Undefined(ValueError):
    """A metric has no value, as a precision without a "yes"."""


@dataclass(frozen=True, kw_only=True)
class Scores:
    """A metric, document by document; `value` is the ratio above.

    Args:
        numerators, denominators: N numbers each.
        clusters: N names, equal for documents that show the same image.
        strata: N names, where the metric adds up ratios of parts.
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
    """95 % of the resamples lie from `low` to `high`; both None where nothing can be said.

    `n` and `clusters` are the documents, and their images, that the metric counts.
    """

    low: float | None
    high: float | None
    n: int
    clusters: int


@dataclass(frozen=True, kw_only=True)
class Difference:
    """Of one run less another on the same documents.

    `p` is two-sided; `adjusted` is it after Holm's correction for the number of metrics that were compared. `lower`
    says that less of the metric is better.
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
        """Of the run against the other, at the 5 % level."""
        if (self.p if self.adjusted is None else self.adjusted) >= 0.05:
            return "no difference"
        return "better" if (self.value < 0) == self.lower else "worse"


def value(scores: Scores) -> float:
    """The metric itself; 0 where it has no value, as a precision without a "yes"."""
    import numpy as np

    top, bottom = _sums(scores)
    found = float(_ratio(top, bottom, np.ones((1, len(top))))[0])
    return 0.0 if math.isnan(found) else found


def interval(scores: Scores, *, resamples: int = RESAMPLES, seed: int = 0) -> Interval:
    """Percentile bootstrap over clusters.

    Where all clusters score alike (0 %, 100 %, a single image) no resample differs, though the truth may: there it is
    Wilson's interval over the clusters, for a value that is a share, and nothing for others.
    """
    import numpy as np

    top, bottom = _sums(scores)
    count, clusters = _documents(scores), int((bottom.sum(axis=1) > 0).sum())
    drawn = np.concatenate([_ratio(top, bottom, part) for part in _draws(len(top), resamples, seed)])
    drawn = drawn[np.isfinite(drawn)]
    if not len(drawn):  # such as a precision without a "yes"
        return Interval(low=None, high=None, n=count, clusters=clusters)
    low, high = np.quantile(drawn, (0.025, 0.975))
    if high - low > 1e-12:
        return Interval(low=float(low), high=float(high), n=count, clusters=clusters)
    if not all(0 <= part <= whole for part, whole in zip(scores.numerators, scores.denominators, strict=True)):
        return Interval(low=None, high=None, n=count, clusters=clusters)
    least, most = wilson(value(scores), clusters)
    return Interval(low=least, high=most, n=count, clusters=clusters)


def paired(ours: Scores, theirs: Scores, *, resamples: int = RESAMPLES, seed: int = 0) -> Difference:
    """The difference on the same documents.

    Its interval draws images, the same for both; its p-value exchanges the two runs image by image at random (a
    permutation test). Where R rounds find nothing as extreme it goes on, until one does or MOST are done: with many
    comparisons Holm's correction would make nothing of 1 / (R + 1).

    Raises:
        ValueError: the two do not hold the same documents.
        Undefined: the metric has no value for one of them.
    """
    import numpy as np

    if list(ours.clusters) != list(theirs.clusters) or ours.strata != theirs.strata:
        raise ValueError("the two runs answer different documents")
    (top, bottom), (top_b, bottom_b) = _sums(ours), _sums(theirs)

    def difference(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        """`a` and `b`: how often each cluster counts on our side and on theirs, (R, C) of (ours, theirs)."""
        left = _ratio(np.vstack([top, top_b]), np.vstack([bottom, bottom_b]), np.hstack([a, b]))
        right = _ratio(np.vstack([top, top_b]), np.vstack([bottom, bottom_b]), np.hstack([b, a]))
        return left - right

    clusters = len(top)
    once, none = np.ones((1, clusters)), np.zeros((1, clusters))
    observed = float(difference(once, none)[0])
    if math.isnan(observed):
        raise Undefined("it has no value for one of the two")
    drawn = np.concatenate([difference(part, 0 * part) for part in _draws(clusters, resamples, seed)])
    rng = np.random.default_rng([seed, 1])
    extreme = rounds = valid = 0
    while rounds < resamples or (not extreme and rounds < MOST):
        kept = rng.integers(0, 2, (CHUNK if rounds >= resamples else min(CHUNK, resamples - rounds), clusters))
        exchanged = difference(kept.astype(float), 1.0 - kept)
        rounds += len(kept)
        valid += int(np.isfinite(exchanged).sum())
        extreme += int((np.abs(exchanged) >= abs(observed) - 1e-12).sum())
    low, high = np.quantile(drawn[np.isfinite(drawn)], (0.025, 0.975))
    return Difference(
        value=observed,
        low=float(low),
        high=float(high),
        p=(extreme + 1) / (valid + 1),
        n=_documents(ours),
        clusters=clusters,
    )


def holm(found: Sequence[Difference]) -> list[Difference]:
    """The same with Holm's correction (1979): the chance of even one false verdict among them stays below 5 %."""
    order = sorted(range(len(found)), key=lambda place: found[place].p)
    adjusted, most = [0.0] * len(found), 0.0
    for rank, place in enumerate(order):
        most = max(most, min(1.0, (len(found) - rank) * found[place].p))
        adjusted[place] = most
    return [replace(one, adjusted=p) for one, p in zip(found, adjusted, strict=True)]


def wilson(share: float, n: int, z: float = 1.96) -> tuple[float, float]:
    """Wilson's score interval of a proportion, 95 % by default (E. B. Wilson 1927).

    It stays inside [0, 1] and is honest at 0 %, at 100 % and for small n, where share ± z·s.e. is not.
    """
    centre = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return max(0.0, centre - half), min(1.0, centre + half)


def _documents(scores: Scores) -> int:
    """Those that the metric counts: open accuracy does not count yes/no questions."""
    return sum(1 for bottom in scores.denominators if bottom)


def _sums(scores: Scores) -> tuple[np.ndarray, np.ndarray]:
    """Numerators and denominators summed by cluster and stratum, (C, S) each."""
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


def _ratio(top: np.ndarray, bottom: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """(R,) values, NaN where there is none; `weights` (R, C) say how often each cluster counts."""
    import numpy as np

    counted = bottom.sum(axis=0) > 0  # MME's perception counts none of cognition's categories
    if not counted.any():
        return np.full(len(weights), np.nan)
    above, below = weights @ top[:, counted], weights @ bottom[:, counted]
    return np.divide(above, below, out=np.full_like(above, np.nan), where=below > 0).sum(axis=1)


def _draws(clusters: int, resamples: int, seed: int) -> Iterator[np.ndarray]:
    """How often each of the clusters is drawn, (CHUNK, C) at a time."""
    import numpy as np

    rng = np.random.default_rng([seed, 0])
    for start in range(0, resamples, CHUNK):
        size = min(CHUNK, resamples - start)
        yield rng.multinomial(clusters, np.full(clusters, 1 / clusters), size).astype(float)
