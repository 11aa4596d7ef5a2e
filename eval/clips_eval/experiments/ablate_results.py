"""Statistics of the grid: means with standard errors, and verdicts on the paper's directions."""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Literal

from clips_eval.experiments.ablate_grid import AblateRecipe, Setting, length_curves, objective_bars

Verdict = Literal["held", "did not hold", "undecided"]

# Two-sided 95 % quantiles of Student's t by degrees of freedom; beyond the table, the normal quantile.
_T95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)
_NORMAL95 = 1.96

Scores = Mapping[Setting, Sequence[float]]  # one value per seed, in the order of the recipe


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mean:
    """A mean over seeds and its standard error."""

    value: float
    error: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Direction:
    """A claim of the paper, and the measured difference that it predicts to be positive."""

    claim: str
    measured: str
    difference: Mean
    verdict: Verdict


def mean(values: Sequence[float]) -> Mean:
    """Return mean and standard error of at least two values."""
    return Mean(value=statistics.fmean(values), error=statistics.stdev(values) / math.sqrt(len(values)))


def judge(differences: Sequence[float]) -> Verdict:
    """Return whether the 95 % interval of the mean difference is above zero, below it, or contains it."""
    found = mean(differences)
    freedom = len(differences) - 1
    reach = (_T95[freedom - 1] if freedom <= len(_T95) else _NORMAL95) * found.error
    if found.value - reach > 0:
        return "held"
    return "did not hold" if found.value + reach < 0 else "undecided"


def directions(recipe: AblateRecipe, scores: Scores) -> list[Direction]:
    """Return verdicts on the paper's claims (arXiv 2411.16828: figure 1, comparison with CLIPA and CoCa)."""
    return [*_of_length(recipe, scores), *_of_objectives(recipe, scores)]


def _of_length(recipe: AblateRecipe, scores: Scores) -> list[Direction]:
    """Claims: cut synthetic captions beat uncut ones; uncut web captions beat cut ones."""
    found = []
    for name, curve in length_curves(recipe).items():
        *shorter, uncut = curve
        kind = "web captions, truncated" if name == "web" else f"synthetic captions, {name}"
        short = [statistics.fmean(values) for values in zip(*(scores[setting] for setting in shorter), strict=True)]
        gains = [cut - full for cut, full in zip(short, scores[uncut], strict=True)]
        sign = -1 if name == "web" else 1
        claim = f"{kind}: {'uncut beats cut' if name == 'web' else 'cut beats uncut'}"
        lengths = ", ".join(str(setting.budget) for setting in shorter)
        order = f"uncut - mean of {lengths}" if name == "web" else f"mean of {lengths} - uncut"
        found.append(_direction(claim, order, [sign * gain for gain in gains]))
    return found


def _of_objectives(recipe: AblateRecipe, scores: Scores) -> list[Direction]:
    bars = objective_bars(recipe)
    pairs = [("clips", "coca"), ("clips", "clipa-mix"), ("clips", "clip-web"), ("clipa-mix", "clip-web")]
    return [
        _direction(
            f"{better} beats {worse}",
            f"{better} - {worse}",
            [a - b for a, b in zip(scores[bars[better]], scores[bars[worse]], strict=True)],  # type: ignore[index]
        )
        for better, worse in pairs
        if better in bars and worse in bars
    ]


def _direction(claim: str, measured: str, differences: Sequence[float]) -> Direction:
    return Direction(claim=claim, measured=measured, difference=mean(differences), verdict=judge(differences))
