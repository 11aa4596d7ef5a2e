"""Convert lmms-eval's results: plain metric names, fractions, one row per document, images for the gallery."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clips_eval.lmms.documents import by_document
from clips_eval.stats.uncertainty import interval
from clips_eval.tasks import OWN_TASKS
from vision_tower.common.errors import UserError

if TYPE_CHECKING:
    from lmms_eval.api.task import Task

POPE_NAMES = {
    "pope_accuracy": "accuracy",
    "pope_precision": "precision",
    "pope_recall": "recall",
    "pope_f1_score": "f1",
    "pope_yes_ratio": "yes_ratio",
}
# lmms-eval's own POPE reports the yes ratio of the ground truth, ours that of the answers.
STOCK_POPE_NAMES = POPE_NAMES | {"pope_yes_ratio": "target_yes_ratio"}
RENAMED: dict[str, dict[str, str]] = {
    **dict.fromkeys(OWN_TASKS, POPE_NAMES),
    **dict.fromkeys(("pope", "pope_random", "pope_pop", "pope_adv"), STOCK_POPE_NAMES),
    "mmbench_en_dev_static": {"gpt_eval_score": "accuracy"},
}
PERCENT = {("mmbench_en_dev_static", "gpt_eval_score")}


def task_scores(task: str, results: Mapping[str, Any], expected: int) -> dict[str, float]:
    """Return {metric: value, ..., "n": documents} of one task.

    Raises:
        UserError: lmms-eval returned no score, or another number of documents than requested.
    """
    found = len(results.get("samples", {}).get(task, ()))
    if found != expected:
        raise UserError(f"task {task}: only {found} of {expected} documents scored", remedy="see the messages above")
    scores: dict[str, float] = {}
    for key, value in results["results"][task].items():
        metric, _, _ = key.partition(",")
        if "," not in key or "_stderr" in metric or not _is_score(value):
            continue
        percent = (task, metric) in PERCENT
        scores[_own_name(task, metric)] = float(value) / (100 if percent else 1)
    if not scores:
        raise UserError(f"task {task}: lmms-eval returned no metric", remedy="see the messages above")
    return {**scores, "n": expected}


def sample_rows(task: str, results: Mapping[str, Any], clusters: Mapping[int, str]) -> list[dict[str, Any]]:
    """Return one row per document in the data's order; `save_gallery` sets "image", `add_intervals` adds "scores".

    Args:
        clusters: name of the document's image by doc_id.
    """
    samples = _in_order(task, results)
    metrics = list(dict.fromkeys(key.partition(",")[0] for key in results["results"][task] if "," in key))
    return [
        {
            "task": task,
            "doc_id": sample["doc_id"],
            "prompt": sample["arguments"][0],
            "answer": _text(sample["filtered_resps"]).strip(),
            "target": sample["target"],
            "correct": _correct(sample, metrics),
            "cluster": clusters[sample["doc_id"]],
            "image": None,
        }
        for sample in samples
    ]


def add_intervals(
    task: str, results: Mapping[str, Any], scores: Mapping[str, float], rows: Sequence[dict[str, Any]], seed: int
) -> dict[str, dict[str, Any]]:
    """Return {metric: {low, high, n, clusters}}; add each row's terms of every metric to it as "scores".

    A metric whose terms are unknown has low and high null.
    """
    samples = _in_order(task, results)
    names = {_own_name(task, key.partition(",")[0]): key.partition(",")[0] for key in results["results"][task]}
    intervals: dict[str, dict[str, Any]] = {}
    for row in rows:
        row["scores"] = {}
    for metric in (metric for metric in scores if metric != "n"):
        found = by_document(task, metric, [sample.get(names[metric]) for sample in samples], scores[metric])
        if found is None:
            images = {row["cluster"] for row in rows}
            intervals[metric] = {"low": None, "high": None, "n": len(rows), "clusters": len(images)}
            continue
        intervals[metric] = asdict(interval(found.scores([row["cluster"] for row in rows]), seed=seed))
        for index, (row, terms) in enumerate(zip(rows, found.terms, strict=True)):
            row["scores"][metric] = [*terms] if found.strata is None else [*terms, found.strata[index]]
    return intervals


def metric_names(task: Task) -> list[str]:
    """Return the names that the task's metrics have in lmms.json."""
    return [_own_name(task.config.task, metric) for metric in task.aggregation()]


def lower_is_better(task: str, metrics: Sequence[Mapping[str, Any]] | None) -> list[str]:
    """Return the metrics for which lower values are better, by their names in lmms.json.

    Args:
        metrics: the task's `metric_list`.
    """
    return [_own_name(task, entry["metric"]) for entry in metrics or () if entry.get("higher_is_better") is False]


def _in_order(task: str, results: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    return sorted(results["samples"][task], key=lambda sample: sample["doc_id"])


def _own_name(task: str, metric: str) -> str:
    return RENAMED.get(task, {}).get(metric, metric)


def save_gallery(rows: Sequence[dict[str, Any]], task: Task, folder: Path, each: int) -> None:
    """Save the images of `each` correct and `each` wrong answers and set the rows' "image".

    Paths are relative to the folder's parent, which also holds the samples file.
    """
    for row in [
        *_spread([row for row in rows if row["correct"] is True], each),
        *_spread([row for row in rows if row["correct"] is False], each),
    ]:
        visuals = task.doc_to_visual(task.eval_docs[row["doc_id"]]) or []
        if not visuals or not hasattr(visuals[0], "save"):
            continue
        folder.mkdir(parents=True, exist_ok=True)
        file = folder / f"{row['task']}-{row['doc_id']}.png"
        visuals[0].save(file)
        row["image"] = str(file.relative_to(folder.parent))


def _spread(rows: Sequence[dict[str, Any]], count: int) -> list[dict[str, Any]]:
    """Return `count` evenly spaced rows: neighbors often ask about the same image."""
    return [rows[len(rows) * n // count] for n in range(count)] if len(rows) > count else list(rows)


def _is_score(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _text(responses: Sequence[Any]) -> str:
    first = responses[0]
    return first if isinstance(first, str) else str(first[0])


def _correct(sample: Mapping[str, Any], metrics: Sequence[str]) -> bool | None:
    """Return True if the first metric that scores single documents by 0 or 1 gives 1; None if there is none."""
    for metric in metrics:
        value = sample.get(metric)
        score = value.get("score") if isinstance(value, Mapping) else value
        if _is_score(score) and score in (0, 1):
            return score == 1
    return None
