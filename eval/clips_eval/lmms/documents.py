"""A task's metrics document by document: numerators and denominators of ratios of sums (see `uncertainty`).

What a metric is made of is known for the tasks of this project, for POPE and for MME. For any other the guess is that
it is the mean of its documents' scores. Guess or knowledge, it must give back the value that lmms-eval reports; where
it does not, the metric has no interval, and that is said.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from clips_eval.stats.uncertainty import Scores, value
from clips_eval.tasks import MMBENCH_COLUMNS, OWN_TASKS

Row = Mapping[str, Any]
Parts = tuple[float, float]  # of one document: numerator, denominator


@dataclass(frozen=True, kw_only=True)
class Metric:
    """One metric over a task's documents; `scores` without clusters is what the samples file keeps."""

    parts: list[Parts]
    strata: list[str] | None = None

    def scores(self, clusters: Sequence[str]) -> Scores:
        """For the intervals."""
        return Scores(
            numerators=[top for top, _ in self.parts],
            denominators=[bottom for _, bottom in self.parts],
            clusters=clusters,
            strata=self.strata,
        )


def by_document(task: str, metric: str, rows: Sequence[Any], reported: float) -> Metric | None:
    """What the metric's documents contribute, or None where that is not known.

    Args:
        metric: by its name in lmms.json.
        rows: what lmms-eval logged for the metric, a number or a mapping for each document.
        reported: the metric's value, which the parts must give back.
    """
    found = _known(task, metric, rows)
    if found is None:
        return None
    got = value(found.scores([str(place) for place in range(len(rows))]))
    return found if math.isclose(got, reported, rel_tol=1e-6, abs_tol=1e-6) else None


def _known(task: str, metric: str, rows: Sequence[Any]) -> Metric | None:
    if metric in ("mme_perception_score", "mme_cognition_score"):
        return _mme(rows)
    if task in OWN_TASKS and OWN_TASKS[task] is MMBENCH_COLUMNS:
        return _circular(rows)
    if not any(isinstance(row, Mapping) for row in rows):
        return Metric(parts=[_plain(row) for row in rows])
    if not all(row is None or isinstance(row, Mapping) for row in rows):
        return None
    part = PARTS.get(metric, _right)
    try:
        return Metric(parts=[(0.0, 0.0) if row is None else part(row) for row in rows])
    except (KeyError, TypeError, ValueError):  # a mapping of another kind, as captions' are
        return None


def _plain(row: Any) -> Parts:
    return (0.0, 0.0) if row is None else (float(row), 1.0)


def _right(row: Row) -> Parts:
    return float(row["score"]), 1.0


def _of_kind(kind: str) -> Callable[[Row], Parts]:
    return lambda row: (float(row["score"]), 1.0) if row["kind"] == kind else (0.0, 0.0)


def _found(row: Row) -> bool:
    return row["prediction"] == "yes" and row["ground_truth"] == "yes"


PARTS: dict[str, Callable[[Row], Parts]] = {
    "open_accuracy": _of_kind("open"),
    "yes_no_accuracy": _of_kind("yes_no"),
    "precision": lambda row: (float(_found(row)), float(row["prediction"] == "yes")),
    "recall": lambda row: (float(_found(row)), float(row["ground_truth"] == "yes")),
    "f1": lambda row: (2.0 * _found(row), float(row["prediction"] == "yes") + float(row["ground_truth"] == "yes")),
    "yes_ratio": lambda row: (float(row["prediction"] == "yes"), 1.0),
    "target_yes_ratio": lambda row: (float(row["ground_truth"] == "yes"), 1.0),
}


def _circular(rows: Sequence[Row]) -> Metric:
    """MMBench: a question is right if all its rotations are; it counts once, at the first of them."""
    right: dict[int, bool] = {}
    for row in rows:
        question = row["index"] % 1_000_000
        right[question] = right.get(question, True) and row["score"] == 1.0
    counted: set[int] = set()
    parts: list[Parts] = []
    for row in rows:
        question = row["index"] % 1_000_000
        parts.append((0.0, 0.0) if question in counted else (float(right[question]), 1.0))
        counted.add(question)
    return Metric(parts=parts)


def _mme(rows: Sequence[Row | None]) -> Metric:
    """MME: accuracy and accuracy on both questions of an image, 100 points each, added up over the categories."""
    total: dict[tuple[str, str], float] = {}
    for row in rows:
        if row is not None:
            key = (row["category"], str(row["question_id"]))
            total[key] = total.get(key, 0.0) + row["score"]
    parts: list[Parts] = []
    counted: set[tuple[str, str]] = set()
    for row in rows:
        key = ("", "") if row is None else (row["category"], str(row["question_id"]))
        if row is None or key in counted:
            parts.append((0.0, 0.0))
        else:
            parts.append((50.0 * total[key] + 100.0 * (total[key] == 2), 1.0))
            counted.add(key)
    return Metric(parts=parts, strata=["" if row is None else row["category"] for row in rows])
