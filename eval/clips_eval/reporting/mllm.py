"""Benchmark table of the report: this run with its controls, baselines and the paper's numbers."""

from __future__ import annotations

from typing import Any

from clips_eval.reporting.benchmarks import Benchmarks
from clips_eval.reporting.cells import MISSING, NONE, Column, Row, Table, count, interval, number, percent
from clips_eval.reporting.numbers import CHANCE, OWN_TASKS, is_share, numbers, size, span, task_of, under, worded
from clips_eval.reporting.read import CONTROLS, Run
from clips_eval.reporting.tables import PAPER_NOTE

LABELS = {
    ("easy_vqa", "accuracy"): "easy-VQA",
    ("easy_vqa", "open_accuracy"): "easy-VQA, open questions",
    ("easy_vqa", "yes_no_accuracy"): "easy-VQA, yes/no questions",
    ("pope_random", "accuracy"): "POPE, random",
    ("pope_popular", "accuracy"): "POPE, popular",
    ("pope_adversarial", "accuracy"): "POPE, adversarial",
    ("mmbench", "accuracy"): "MMBench",
}
# Columns of the paper: (lmms-eval task, metric, label). The paper has one POPE score, lmms-eval has five.
PAPER_TASKS = {
    "pope": ("", "", "POPE (one score)"),
    "gqa": ("gqa", "exact_match", "GQA"),
    "mmmu": ("mmmu_val", "mmmu_acc", "MMMU"),
    "mmvet": ("mmvet", "gpt_eval_score", "MM-Vet"),
    "chartqa": ("chartqa", "relaxed_overall", "ChartQA"),
    "textvqa": ("textvqa_val", "exact_match", "TextVQA"),
    "nocaps": ("nocaps_val", "nocaps_CIDEr", "NoCaps (CIDEr)"),
    "mme_perception": ("mme", "mme_perception_score", "MME perception (points)"),
    "mme_cognition": ("mme", "mme_cognition_score", "MME cognition (points)"),
}
PAPER_KEYS = {(task, metric): key for key, (task, metric, _) in PAPER_TASKS.items() if task}


CONTROL_NAMES = {"shuffled": "Shuffled", "blank": "Blank", "no_image": "No image"}
WORDINGS = "Wordings"

Cells = dict[str, str]  # column to text; missing columns show a dash


def mllm_table(run: Run, paper: dict[str, Any]) -> Table:
    """Return the table of all benchmarks with interval, controls, chance, baselines and the paper's columns."""
    theirs = paper["llava_1_5_llama3"]
    tree = numbers(run)["mllm"]
    others = {task: metrics for task, metrics in tree.items() if task not in OWN_TASKS and metrics is not None}
    rows: list[tuple[Cells, str]] = []
    if not others or any(tree[name] is not None for name in OWN_TASKS):
        for (name, metric), label in LABELS.items():
            rows.append((_own_cells(run, tree[name], name, metric, label), "ours"))
    rows.append((_paper_cells(theirs, "pope") | {"Benchmark": PAPER_TASKS["pope"][2]}, "paper"))
    for task, metrics in others.items():
        for metric in (metric for metric in metrics if metric != "n"):
            key = PAPER_KEYS.get((task, metric))
            rows.append((_stock_cells(run, task, metric, metrics) | _paper_cells(theirs, key), "ours"))
    shown = {PAPER_KEYS.get((task, metric)) for task, metrics in others.items() for metric in metrics} | {"pope"}
    for key in (key for key in PAPER_TASKS if key not in shown):
        cells = {"Benchmark": PAPER_TASKS[key][2], "Score": MISSING}
        rows.append((cells | _paper_cells(theirs, key), "paper"))
    columns = [Column(name=name) for name in _columns(run)] + [Column(name=name, paper=True) for name in theirs["rows"]]
    table = [Row(cells=[cells.get(column.name, NONE) for column in columns], kind=kind) for cells, kind in rows]
    return Table(columns=columns, rows=table, notes=_notes(run))


def _columns(run: Run) -> list[str]:
    """Return column names. The shuffled control is always shown; other controls only if measured."""
    controls = [CONTROL_NAMES[control] for control in CONTROLS if control == "shuffled" or control in run.controls]
    wordings = [WORDINGS] if len(run.wordings) == 2 else []
    return ["Benchmark", "Score", "95 %", "F1", *controls, *wordings, "Chance", "n", "Images", *run.baselines]


def _own_cells(run: Run, found: dict[str, Any] | None, name: str, metric: str, label: str) -> Cells:
    if found is None:
        return {"Benchmark": label, "Score": MISSING}
    cells = {
        "Benchmark": label,
        "Score": percent(found[metric]),
        "95 %": interval(span(run.lmms, name, metric)),
        "n": count(size(run.lmms, name, metric)),
        "Images": _images(run, name, metric),
    }
    if "f1" in found:
        cells["F1"] = percent(found["f1"])
    if name in CHANCE:
        cells["Chance"] = percent(CHANCE[name])
    return cells | _comparisons(run, name, metric, share=True)


def _stock_cells(run: Run, task: str, metric: str, metrics: dict[str, float]) -> Cells:
    """Return the cells of a stock lmms-eval metric; points and CIDEr are shown in their own unit."""
    share = is_share(metric, metrics[metric])
    ends = span(run.lmms, task, metric)
    known = run.lmms.intervals.get(task, {}).get(metric) if run.lmms else None
    cells = {
        "Benchmark": task if metric == "accuracy" else f"{task}: {metric}",
        "Score": _show(metrics[metric], share),
        "n": count(known.n if known else size(run.lmms, task, "accuracy")),
        "Images": _images(run, task, metric),
    }
    if ends is not None:
        cells["95 %"] = interval(ends) if share else f"{ends[0]:,.1f}–{ends[1]:,.1f}"
    return cells | _comparisons(run, task, metric, share=share)


def _comparisons(run: Run, name: str, metric: str, *, share: bool) -> Cells:
    """Return the cells of controls, wordings and baselines of a metric."""
    cells: Cells = {}
    for control, title in CONTROL_NAMES.items():
        value = under(run, control, name, metric)
        cells[title] = MISSING if value is None else _show(value, share)
    if values := worded(run, name, metric):
        cells[WORDINGS] = f"{_show(min(values), share)}–{_show(max(values), share)}"
    for title, found in run.baselines.items():
        other = found.tasks.get(task_of(name), {}).get(metric)
        cells[title] = NONE if other is None else _show(other, share) + _interval_suffix(found, name, metric, share)
        theirs, ours = (one.tasks.get(task_of(name), {}).get("n") if one else None for one in (found, run.lmms))
        if other is not None and theirs != ours:
            cells[title] += f", n = {theirs:,.0f}" if theirs else ", n unknown"
    return cells


def _images(run: Run, name: str, metric: str) -> str:
    """Return the number of images that the interval resamples."""
    found = run.lmms.intervals.get(task_of(name), {}).get(metric) if run.lmms else None
    return NONE if found is None else count(found.clusters)


def _interval_suffix(benchmarks: Benchmarks, name: str, metric: str, share: bool) -> str:
    ends = span(benchmarks, name, metric)
    return "" if ends is None or not share else f" ({interval(ends)})"


def _show(value: float, share: bool) -> str:
    return percent(value) if share else number(value)


def main_metric(task: str, metrics: dict[str, float]) -> str | None:
    """Return the headline metric of a task: the paper's if defined, else the first proportion, else None."""
    shares = [metric for metric, value in metrics.items() if metric != "n" and 0 <= value <= 1]
    return next((metric for metric in shares if (task, metric) in PAPER_KEYS), shares[0] if shares else None)


def _paper_cells(theirs: dict[str, Any], key: str | None) -> Cells:
    if key is None:
        return {}
    place = theirs["columns"].index(key)
    return {name: number(values[place]) for name, values in theirs["rows"].items()}


def _notes(run: Run) -> list[str]:
    notes = [
        "Scores in %. Shuffled: the same model with another question's image. Chance: guessing (POPE is balanced, "
        "MMBench has up to four options).",
        _interval_note(run),
        PAPER_NOTE
        + " The paper uses LLaVA-1.5 with LLaMA-3 on the full benchmarks and reports one POPE score for all splits.",
    ]
    if {"blank", "no_image"} & set(run.controls):
        notes.insert(1, "Blank: an image of the mean color. No image: the question alone.")
    if len(run.wordings) == 2:
        notes.insert(1, "Wordings: lowest and highest score over three ways to ask for the answer format.")
    easy = task_of("easy_vqa")
    for control, found in run.controls.items():
        if run.lmms and easy in run.lmms.tasks and easy in found.tasks:
            real, other = run.lmms.tasks[easy].get("n"), found.tasks[easy].get("n")
            if real != other:
                notes.append(f"easy-VQA: the control {control} has n = {other}, the model n = {real}: other questions.")
    return notes


def _interval_note(run: Run) -> str:
    by_image = run.lmms is not None and bool(run.lmms.intervals)
    how = "bootstrap over images with all their questions" if by_image else "Wilson interval over n answers"
    return f"95 %: {how}; it covers the sampling of questions, not the training."
