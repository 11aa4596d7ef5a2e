"""Content of report.json, with intervals and chance levels."""

from __future__ import annotations

import math
from typing import Any

from clips_eval.reporting.benchmarks import Benchmarks
from clips_eval.reporting.read import RECALLS, Retrieval, Run, ZeroShot
from clips_eval.stats.json_files import count_in, number_in
from clips_eval.stats.uncertainty import wilson

SCHEMA_VERSION = 3  # of data/report.schema.json
# Tasks of the sample world: report name to (task in lmms.json, metrics that report.json guarantees).
OWN_TASKS = {
    "easy_vqa": ("clips_easy_vqa", ("accuracy", "open_accuracy", "yes_no_accuracy")),
    "pope_random": ("clips_pope_random", ("accuracy", "f1")),
    "pope_popular": ("clips_pope_popular", ("accuracy", "f1")),
    "pope_adversarial": ("clips_pope_adversarial", ("accuracy", "f1")),
    "mmbench": ("clips_mmbench", ("accuracy",)),
}
# Accuracy of guessing: POPE is balanced yes/no, MMBench has up to four options.
CHANCE = {"pope_random": 0.5, "pope_popular": 0.5, "pope_adversarial": 0.5, "mmbench": 0.25}

CIDER = frozenset({"nocaps_CIDEr", "coco_CIDEr", "flickr_CIDEr", "textcaps_CIDEr"})


def numbers(run: Run, against: dict[str, Any] | None = None) -> dict[str, Any]:
    """Return the content of report.json. Scores are fractions; what was not measured is None.

    Args:
        against: comparison with another run, from `against.as_tree`.
    Raises:
        UserError: a guaranteed metric is missing in lmms.json or is not a fraction.
    """
    return {
        "schema_version": SCHEMA_VERSION,
        "encoder": {"retrieval": _retrieval(run.retrieval), "zeroshot": _zeroshot(run.zeroshot)},
        "mllm": _mllm(run),
        "steps": [
            {
                "name": step.name,
                "command": step.command,
                "seconds": step.seconds,
                "peak_memory_bytes": step.peak_memory_bytes,
            }
            for step in run.steps
        ],
        "seconds": {step.name: step.seconds for step in run.steps},
        "commands": {step.name: step.command for step in run.steps},
        "intervals": _intervals(run),
        "controls": {control: dict(found.tasks) for control, found in run.controls.items()},
        "wordings": {str(wording): dict(found.tasks) for wording, found in run.wordings.items()},
        "skipped": dict(run.lmms.skipped | run.lmms.failed) if run.lmms else {},
        "baselines": {
            "mllm": {title: dict(found.tasks) for title, found in run.baselines.items()},
            "encoder": {title: _retrieval(found) for title, found in run.encoders.items()},
        },
        "against": against,
        "provenance": provenance(run),
    }


def _intervals(run: Run) -> dict[str, Any]:
    """Return {"retrieval": {metric: [low, high]}, "zeroshot": ..., task: ...}."""
    found: dict[str, Any] = {}
    if run.retrieval is not None:
        found["retrieval"] = {key: list(recall_span(run.retrieval, key)) for key in RECALLS}
    if run.zeroshot is not None and run.zeroshot.intervals:
        found["zeroshot"] = {key: None if ends is None else list(ends) for key, ends in run.zeroshot.intervals.items()}
    names = {task_of(name): name for name in OWN_TASKS}
    for task, metrics in (run.lmms.tasks if run.lmms else {}).items():
        name = names.get(task, task)
        spans = {metric: span(run.lmms, name, metric) for metric in metrics if metric != "n"}
        found[name] = {metric: None if ends is None else list(ends) for metric, ends in spans.items()}
    return found


def provenance(run: Run) -> dict[str, Any]:
    """Return commands, digests, versions, seeds and hardware of each part."""
    trained = ("command", "ranks", "git", "seed", "recipe_sha256", "versions", "hardware")
    parts: dict[str, Any] = {
        stage: {key: tree[key] for key in trained if key in tree} for stage, tree in run.provenance.items()
    }
    keys = ("command", "sha256", "data_sha256", "engine", "mode", "recipe", "versions", "hardware", "seconds")
    measured: dict[str, Benchmarks | Retrieval | ZeroShot | None] = {"retrieval": run.retrieval}
    measured |= {"zeroshot": run.zeroshot, "benchmarks": run.lmms}
    measured |= run.controls
    measured |= {f"wording {wording}": found for wording, found in run.wordings.items()}
    measured |= {f"baseline {title}": found for title, found in (run.baselines | run.encoders).items()}
    for name, found in measured.items():
        if found is not None:
            parts[name] = {key: found.about[key] for key in keys if key in found.about}
    return parts


def _retrieval(retrieval: Retrieval | None) -> dict[str, Any] | None:
    return (
        None
        if retrieval is None
        else {key: retrieval.recalls[key] for key in RECALLS} | {"n_images": retrieval.n_images}
    )


def _zeroshot(zeroshot: ZeroShot | None) -> dict[str, Any] | None:
    names = ("top1", "top5", "mean_per_class", "n_images", "n_classes")
    return None if zeroshot is None else {name: getattr(zeroshot, name) for name in names}


def _mllm(run: Run) -> dict[str, dict[str, Any] | None]:
    table = {name: _own_task(run, name) for name in OWN_TASKS}
    own = {task for task, _ in OWN_TASKS.values()}
    for task, metrics in (run.lmms.tasks if run.lmms else {}).items():
        if task not in own:
            # lmms-eval has a pope_random too; keep it apart from ours.
            table[f"stock_{task}" if task in OWN_TASKS else task] = dict(metrics)
    return table


def _own_task(run: Run, name: str) -> dict[str, Any] | None:
    task, metrics = OWN_TASKS[name]
    if run.lmms is None or task not in run.lmms.tasks:
        return None
    file, found, place = run.root / "finetune" / "lmms.json", run.lmms.tasks[task], f"tasks.{task}"
    table: dict[str, Any] = {key: number_in(file, found, key, place, fraction=True) for key in metrics}
    table["n"] = count_in(file, found, "n", place)
    if name == "easy_vqa":
        table["shuffled_accuracy"] = under(run, "shuffled", name, "accuracy")
    return table


def under(run: Run, control: str, name: str, metric: str) -> float | None:
    """Return the metric under a control, or None if it was not measured."""
    task, found = task_of(name), run.controls.get(control)
    if found is None or metric not in found.tasks.get(task, {}):
        return None
    file = run.root / "finetune" / f"lmms_{control}.json"
    return number_in(file, found.tasks[task], metric, f"tasks.{task}", fraction=name in OWN_TASKS)


def worded(run: Run, name: str, metric: str) -> list[float]:
    """Return the metric in all three wordings, or an empty list unless all were measured."""
    task = task_of(name)
    passes = [run.lmms, *(run.wordings.get(wording) for wording in (1, 2))]
    values = [found.tasks[task][metric] for found in passes if found and metric in found.tasks.get(task, {})]
    return values if len(values) == len(passes) else []


def span(benchmarks: Benchmarks | None, name: str, metric: str) -> tuple[float, float] | None:
    """Return the 95 % interval of a metric: bootstrap over images if measured, else Wilson's; None if unknown."""
    task = task_of(name)
    if benchmarks is None or metric not in benchmarks.tasks.get(task, {}):
        return None
    known = benchmarks.intervals.get(task, {}).get(metric)
    if known is not None:
        return None if known.low is None or known.high is None else (known.low, known.high)
    n, share = size(benchmarks, name, metric), benchmarks.tasks[task][metric]
    return wilson(share, n) if n and 0 <= share <= 1 else None


def recall_span(retrieval: Retrieval, key: str) -> tuple[float, float]:
    """Return the 95 % interval of a recall: bootstrap over images if measured, else Wilson's."""
    known = retrieval.about.get("intervals", {}).get(key)
    if known is not None:
        return known["low"], known["high"]
    return wilson(retrieval.recalls[key], retrieval.n_images)


def is_share(metric: str, value: float) -> bool:
    """Return True if a score is shown in percent: fractions, and CIDEr, which papers report times 100."""
    return 0 <= value <= 1 or metric in CIDER


def task_of(name: str) -> str:
    """Return lmms-eval's task name for a report name."""
    return OWN_TASKS[name][0] if name in OWN_TASKS else name


def size(benchmarks: Benchmarks | None, name: str, metric: str) -> int | None:
    """Return the number of answers behind a proportion; None for other metrics or if unknown."""
    task = OWN_TASKS[name][0] if name in OWN_TASKS else name
    if benchmarks is None or task not in benchmarks.tasks:
        return None
    if metric == "accuracy":
        return int(benchmarks.tasks[task].get("n", 0)) or None
    if metric in ("open_accuracy", "yes_no_accuracy"):
        closed = [
            sample.target.strip().lower() in ("yes", "no") for sample in benchmarks.samples if sample.task == task
        ]
        return (sum(closed) if metric == "yes_no_accuracy" else len(closed) - sum(closed)) or None
    return None


def recall_chance(retrieval: Retrieval, key: str) -> float | None:
    """Return recall@k of a random order if each image has the same number of captions; None if unknown."""
    way, k = key.split("_r")
    if way == "t2i":
        return min(1.0, int(k) / retrieval.n_images)
    if retrieval.n_texts is None:
        return None
    own = round(retrieval.n_texts / retrieval.n_images)
    miss = (
        math.comb(retrieval.n_texts - own, int(k)) / math.comb(retrieval.n_texts, int(k))
        if retrieval.n_texts >= int(k)
        else 0.0
    )
    return 1 - miss
