"""From a run to report.json, and the statistics beside the numbers: intervals and chance levels."""

from __future__ import annotations

import math
from typing import Any

from clips_eval.report_files import count_in, number_in
from clips_eval.report_read import RECALLS, Benchmarks, Retrieval, Run, ZeroShot

SCHEMA_VERSION = 1
# Our own tasks: the name in lmms.json and the metrics that report.json promises.
OWN_TASKS = {
    "easy_vqa": ("clips_easy_vqa", ("accuracy", "open_accuracy", "yes_no_accuracy")),
    "pope_random": ("clips_pope_random", ("accuracy", "f1")),
    "pope_popular": ("clips_pope_popular", ("accuracy", "f1")),
    "pope_adversarial": ("clips_pope_adversarial", ("accuracy", "f1")),
    "mmbench": ("clips_mmbench", ("accuracy",)),
}
# A guess that never looks: POPE is balanced yes/no by construction, MMBench has up to four options.
CHANCE = {"pope_random": 0.5, "pope_popular": 0.5, "pope_adversarial": 0.5, "mmbench": 0.25}


def numbers(run: Run) -> dict[str, Any]:
    """The content of report.json; what was not measured is null. All scores are fractions.

    Raises:
        UserError: a promised metric is missing in lmms.json or not a fraction.
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
    }


def _retrieval(found: Retrieval | None) -> dict[str, Any] | None:
    return None if found is None else {key: found.recalls[key] for key in RECALLS} | {"n_images": found.n_images}


def _zeroshot(found: ZeroShot | None) -> dict[str, Any] | None:
    names = ("top1", "top5", "mean_per_class", "n_images", "n_classes")
    return None if found is None else {name: getattr(found, name) for name in names}


def _mllm(run: Run) -> dict[str, dict[str, Any] | None]:
    table = {name: _own_task(run, name) for name in OWN_TASKS}
    own = {task for task, _ in OWN_TASKS.values()}
    for task, metrics in (run.lmms.tasks if run.lmms else {}).items():
        if task not in own:
            # lmms-eval has a pope_random too; it must not pass for ours.
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
        table["shuffled_accuracy"] = shuffled(run, name, "accuracy")
    return table


def shuffled(run: Run, name: str, metric: str) -> float | None:
    """The same metric of the same model given other documents' pictures; None where it was not measured."""
    task = OWN_TASKS[name][0] if name in OWN_TASKS else name
    if run.shuffled is None or metric not in run.shuffled.tasks.get(task, {}):
        return None
    file = run.root / "finetune" / "lmms_shuffled.json"
    return number_in(file, run.shuffled.tasks[task], metric, f"tasks.{task}", fraction=name in OWN_TASKS)


def size(found: Benchmarks | None, name: str, metric: str) -> int | None:
    """How many answers a proportion rests on; None for what is no proportion, or where it is not known."""
    task = OWN_TASKS[name][0] if name in OWN_TASKS else name
    if found is None or task not in found.tasks:
        return None
    if metric == "accuracy":
        return int(found.tasks[task].get("n", 0)) or None
    if metric in ("open_accuracy", "yes_no_accuracy"):
        closed = [sample.target.strip().lower() in ("yes", "no") for sample in found.samples if sample.task == task]
        return (sum(closed) if metric == "yes_no_accuracy" else len(closed) - sum(closed)) or None
    return None


def wilson(share: float, n: int, z: float = 1.96) -> tuple[float, float]:
    """Wilson's score interval of a proportion, 95 % by default (E. B. Wilson 1927).

    It stays inside [0, 1] and is honest at 0 %, at 100 % and for small n, where share ± z·s.e. is not.
    """
    centre = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return max(0.0, centre - half), min(1.0, centre + half)


def recall_chance(found: Retrieval, key: str) -> float | None:
    """Recall@k of a random order, given that each picture has the same number of captions; None if that is unknown."""
    way, k = key.split("_r")
    if way == "t2i":
        return min(1.0, int(k) / found.n_images)
    if found.n_texts is None:
        return None
    own = round(found.n_texts / found.n_images)
    miss = math.comb(found.n_texts - own, int(k)) / math.comb(found.n_texts, int(k)) if found.n_texts >= int(k) else 0.0
    return 1 - miss
