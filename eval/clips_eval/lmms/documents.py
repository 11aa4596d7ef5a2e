"""Decompose a task's metrics into terms per document: numerators and denominators of ratios of sums.

The decomposition is known for this project's tasks, POPE and MME. Any other metric is assumed to be the mean of its
documents' scores. In all cases the terms must reproduce the value that lmms-eval reports; otherwise the metric has no
interval.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from clips_eval.stats.uncertainty import Scores, value
from clips_eval.tasks import MMBENCH_COLUMNS, OWN_TASKS

Row = Mapping[str, Any]
Terms = tuple[float, float]  # numerator and denominator of one document
NOT_COUNTED: Terms = (0.0, 0.0)


@dataclass(frozen=True, kw_only=True)
class Metric:
    """Terms of one metric for each document of a task; the samples file keeps them."""

    terms: list[Terms]
    strata: list[str] | None = None

    def scores(self, clusters: Sequence[str]) -> Scores:
        """Add the documents' images, for intervals."""
        return Scores(
            numerators=[numerator for numerator, _ in self.terms],
            denominators=[denominator for _, denominator in self.terms],
            clusters=clusters,
            strata=self.strata,
        )


def by_document(task: str, metric: str, rows: Sequence[Any], reported: float) -> Metric | None:
    """Return the metric's terms, or None if they are unknown.

    Args:
        metric: its name in lmms.json.
        rows: what lmms-eval logged for the metric, a number or a mapping per document.
        reported: value of the metric that the terms must reproduce.
    """
    found = _terms(task, metric, rows)
    if found is None:
        return None
    computed = value(found.scores([str(index) for index in range(len(rows))]))
    return found if math.isclose(computed, reported, rel_tol=1e-6, abs_tol=1e-6) else None


def _terms(task: str, metric: str, rows: Sequence[Any]) -> Metric | None:
    if metric in ("mme_perception_score", "mme_cognition_score"):
        return _mme(rows)
    if task in OWN_TASKS and OWN_TASKS[task] is MMBENCH_COLUMNS:
        return _circular(rows)
    if not any(isinstance(row, Mapping) for row in rows):
        return Metric(terms=[NOT_COUNTED if row is None else (float(row), 1.0) for row in rows])
    if not all(row is None or isinstance(row, Mapping) for row in rows):
        return None
    terms_of = TERMS.get(metric, lambda row: (float(row["score"]), 1.0))
    try:
        return Metric(terms=[NOT_COUNTED if row is None else terms_of(row) for row in rows])
    except (KeyError, TypeError, ValueError):  # a mapping without these keys, as captioning tasks log
        return None


def _of_kind(kind: str) -> Callable[[Row], Terms]:
    return lambda row: (float(row["score"]), 1.0) if row["kind"] == kind else NOT_COUNTED


def _predicted(row: Row) -> float:
    return float(row["prediction"] == "yes")


def _actual(row: Row) -> float:
    return float(row["ground_truth"] == "yes")


TERMS: dict[str, Callable[[Row], Terms]] = {
    "open_accuracy": _of_kind("open"),
    "yes_no_accuracy": _of_kind("yes_no"),
    "precision": lambda row: (_predicted(row) * _actual(row), _predicted(row)),
    "recall": lambda row: (_predicted(row) * _actual(row), _actual(row)),
    "f1": lambda row: (2.0 * _predicted(row) * _actual(row), _predicted(row) + _actual(row)),
    "yes_ratio": lambda row: (_predicted(row), 1.0),
    "target_yes_ratio": lambda row: (_actual(row), 1.0),
}


def _circular(rows: Sequence[Row]) -> Metric:
    """MMBench's circular evaluation: a question is correct if all its rotations are; counted at the first of them."""
    correct: dict[int, bool] = {}
    for row in rows:
        question = row["index"] % 1_000_000
        correct[question] = correct.get(question, True) and row["score"] == 1.0
    counted: set[int] = set()
    terms: list[Terms] = []
    for row in rows:
        question = row["index"] % 1_000_000
        terms.append(NOT_COUNTED if question in counted else (float(correct[question]), 1.0))
        counted.add(question)
    return Metric(terms=terms)


def _mme(rows: Sequence[Row | None]) -> Metric:
    """MME: per category, 100 * accuracy + 100 * share of images with both questions correct; summed over categories."""
    total: dict[tuple[str, str], float] = {}
    for row in rows:
        if row is not None:
            image = (row["category"], str(row["question_id"]))
            total[image] = total.get(image, 0.0) + row["score"]
    terms: list[Terms] = []
    counted: set[tuple[str, str]] = set()
    for row in rows:
        image = ("", "") if row is None else (row["category"], str(row["question_id"]))
        if row is None or image in counted:
            terms.append(NOT_COUNTED)
        else:
            terms.append((50.0 * total[image] + 100.0 * (total[image] == 2), 1.0))
            counted.add(image)
    return Metric(terms=terms, strata=["" if row is None else row["category"] for row in rows])
