"""What the grid says: means with standard errors, and whether the paper's directions held here."""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Literal

from clips_eval.experiments.ablate_grid import AblateRecipe, Setting, length_curves, objective_bars

Verdict = Literal["held", "did not hold", "undecided"]

# Two-sided 95 % quantiles of Student's t by degrees of freedom; beyond the table the normal one is near enough.
_T95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)
_NORMAL95 = 1.96

Scores = Mapping[Setting, Sequence[float]]  # by seed, in the recipe's order


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mean:
    """A mean over seeds and its standard error."""

    value: float
    error: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Direction:
    """A claim of the paper, and the difference here that it says is positive."""

    claim: str
    measured: str
    difference: Mean
    verdict: Verdict


def mean(values: Sequence[float]) -> Mean:
    """Mean and standard error of at least two values."""
    return Mean(value=statistics.fmean(values), error=statistics.stdev(values) / math.sqrt(len(values)))


def judge(differences: Sequence[float]) -> Verdict:
    """Whether a positive difference is there: the 95 % interval of its mean over seeds lies to one side of zero."""
    found = mean(differences)
    freedom = len(differences) - 1
    reach = (_T95[freedom - 1] if freedom <= len(_T95) else _NORMAL95) * found.error
    if found.value - reach > 0:
        return "held"
    return "did not hold" if found.value + reach < 0 else "undecided"


def directions(recipe: AblateRecipe, scores: Scores) -> list[Direction]:
    """The paper's directions (arXiv 2411.16828: figure 1 and the comparison with CLIPA and CoCa)."""
    return [*_of_length(recipe, scores), *_of_objectives(recipe, scores)]


def _of_length(recipe: AblateRecipe, scores: Scores) -> list[Direction]:
    """Short synthetic captions beat whole ones, cut in any way; web captions do not like to be cut."""
    found = []
    for name, curve in length_curves(recipe).items():
        *shorter, whole = curve
        kind = "web captions, truncated" if name == "web" else f"synthetic captions, {name}"
        short = [statistics.fmean(values) for values in zip(*(scores[setting] for setting in shorter), strict=True)]
        gains = [cut - full for cut, full in zip(short, scores[whole], strict=True)]
        sign = -1 if name == "web" else 1
        claim = f"{kind}: {'whole beats cut' if name == 'web' else 'cut beats whole'}"
        lengths = ", ".join(str(setting.budget) for setting in shorter)
        order = f"whole - mean of {lengths}" if name == "web" else f"mean of {lengths} - whole"
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
