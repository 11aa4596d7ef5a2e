"""The report's tables as data, so that Markdown and HTML can only show the same numbers."""

from __future__ import annotations

import json
from typing import Any

from clips_eval.report_cells import MISSING, NONE, Column, Row, Table, count, duration, interval, number, percent
from clips_eval.report_numbers import CHANCE, OWN_TASKS, numbers, recall_chance, shuffled, size
from clips_eval.report_read import RECALLS, STAGES, Run, ZeroShot

PAPER_NOTE = (
    "Marked “paper”: published numbers of the CLIPS paper (arXiv 2411.16828), from other data, other models and a far "
    "larger scale. They are not comparable with this run; they stand here for orientation."
)
LABELS = {
    ("easy_vqa", "accuracy"): "easy-VQA",
    ("easy_vqa", "open_accuracy"): "easy-VQA, open questions",
    ("easy_vqa", "yes_no_accuracy"): "easy-VQA, yes/no questions",
    ("pope_random", "accuracy"): "POPE, random",
    ("pope_popular", "accuracy"): "POPE, popular",
    ("pope_adversarial", "accuracy"): "POPE, adversarial",
    ("mmbench", "accuracy"): "MMBench",
}
# lmms-eval's task names of the paper's benchmarks. MME is in points, NoCaps in CIDEr, MM-Vet is a judge's score.
PAPER_TASKS = {
    "pope": ("pope", "POPE (one score)"),
    "gqa": ("gqa", "GQA"),
    "mmmu": ("mmmu_val", "MMMU"),
    "mmvet": ("mmvet", "MM-Vet"),
    "chartqa": ("chartqa", "ChartQA"),
    "textvqa": ("textvqa_val", "TextVQA"),
    "nocaps": ("nocaps_val", "NoCaps (CIDEr)"),
    "mme_perception": ("mme", "MME perception (points)"),
    "mme_cognition": ("mme", "MME cognition (points)"),
}


def load_paper() -> dict[str, Any]:
    """The paper's results, shipped with the package."""
    from importlib.resources import files

    return json.loads((files("clips_eval") / "data" / "paper_results.json").read_text(encoding="utf-8"))


def retrieval_table(run: Run, paper: dict[str, Any]) -> Table:
    """Recall@k of this run, of chance, and of the paper's encoders."""
    names = {"i2t": "I→T", "t2i": "T→I"}
    columns = [Column(name="Encoder")] + [
        Column(name=f"{names[key[:3]]} R@{key.partition('_r')[2]}") for key in RECALLS
    ]  # fmt: skip
    found = run.retrieval
    if found is None:
        rows = [Row(cells=["This run", *[MISSING] * len(RECALLS)])]
        notes = []
    else:
        chance = [recall_chance(found, key) for key in RECALLS]
        rows = [
            Row(cells=["This run", *[percent(found.recalls[key]) for key in RECALLS]]),
            Row(cells=["Chance", *[NONE if share is None else percent(share) for share in chance]], kind="control"),
        ]
        captions = "" if found.n_texts is None else f" and {found.n_texts:,} captions"
        notes = [f"This run: {found.n_images:,} images{captions} ({found.data})."]
    notes = [
        "Recall@k in %. I→T: an image counts if any of its captions is among its k best; T→I: a caption counts if its "
        "image is.",
        *notes,
        PAPER_NOTE + " Theirs is zero-shot retrieval on COCO (5,000 images) and Flickr30K (1,000).",
    ]
    return Table(columns=columns, rows=rows + _paper_retrieval(paper), notes=notes)


def _paper_retrieval(paper: dict[str, Any]) -> list[Row]:
    rows = []
    ours = paper["retrieval_zero_shot"]
    best = paper["state_of_the_art_r1"]
    for data, title in (("coco", "COCO"), ("flickr", "Flickr30K")):
        for size_name in ("S/16", "B/16", "L/16"):
            values = dict(zip(ours["columns"], ours["rows"][f"{size_name} CLIPS"], strict=True))
            cells = [f"{values[f'{data}_{key}']:.1f}" for key in RECALLS]
            rows.append(Row(cells=[f"CLIPS {size_name}, {title}", *cells], kind="paper"))
        values = dict(zip(best["columns"], best["rows"]["CLIPS H"], strict=True))
        only_first = [number(values.get(f"{data}_{key}")) for key in RECALLS]
        rows.append(Row(cells=[f"CLIPS H, {title}", *only_first], kind="paper"))
    return rows


def zeroshot_table(found: ZeroShot) -> Table:
    """Zero-shot accuracies of this run and of a guess."""
    columns = [Column(name=name) for name in ("Encoder", "Top-1", "95 %", "Top-5", "Mean per class")]
    chance, near = percent(1 / found.n_classes), percent(min(1.0, 5 / found.n_classes))
    top5 = NONE if found.top5 is None else percent(found.top5)
    ours = [percent(found.top1), interval(found.top1, found.n_images), top5, percent(found.mean_per_class)]
    rows = [
        Row(cells=["This run", *ours]),
        Row(cells=["Chance", chance, NONE, NONE if found.top5 is None else near, chance], kind="control"),
    ]
    notes = [
        "Accuracy in %. An image gets the class whose prompts' mean embedding is nearest; 95 %: Wilson interval.",
        f"{found.n_images:,} images, {found.n_classes:,} classes, {found.n_texts:,} prompts ({found.data}).",
    ]
    return Table(columns=columns, rows=rows, notes=notes)


def mllm_table(run: Run, paper: dict[str, Any]) -> Table:
    """Every benchmark of this run with its control, chance and interval; the paper's LLaVA-1.5 columns beside them."""
    theirs = paper["llava_1_5_llama3"]
    columns = [Column(name=name) for name in ("Benchmark", "Score", "95 %", "F1", "Shuffled", "Chance", "n")]
    columns += [Column(name=name, paper=True) for name in theirs["rows"]]
    width = len(theirs["rows"])
    tree = numbers(run)["mllm"]
    others = {task: metrics for task, metrics in tree.items() if task not in OWN_TASKS and metrics is not None}
    rows = []
    for name, metric in LABELS:
        rows.append(_own_row(run, tree, name, metric, width))
        if name == "pope_adversarial":
            rows.append(
                _paper_row(theirs, "pope")
            )  # beside ours, but its own row: one score for what we split in three
    for task, metrics in others.items():
        key = _paper_key(task, metrics)
        rows += [
            _passed_row(run, task, metric, metrics, _paper_cells(theirs, key, width))
            for metric in metrics
            if metric != "n"
        ]  # fmt: skip
    shown = {_paper_key(task, metrics) for task, metrics in others.items()} | {"pope"}
    rows += [_paper_row(theirs, key) for key in PAPER_TASKS if key not in shown]
    return Table(columns=columns, rows=rows, notes=_mllm_notes(run))


def _paper_key(task: str, metrics: dict[str, float]) -> str | None:
    """The paper's column for a stock task: only where it is one number on either side (MME has two, POPE several)."""
    keys = [key for key, (name, _) in PAPER_TASKS.items() if name == task]
    return keys[0] if len(keys) == 1 and len(metrics.keys() - {"n"}) == 1 else None


def _paper_row(theirs: dict[str, Any], key: str) -> Row:
    ours = NONE if key == "pope" else MISSING  # ours stands split by split in the rows above
    cells = [PAPER_TASKS[key][1], ours, *[NONE] * 5, *_paper_cells(theirs, key, len(theirs["rows"]))]
    return Row(cells=cells, kind="paper")


def _mllm_notes(run: Run) -> list[str]:
    notes = [
        "Scores in %. Shuffled: the same model given another question's picture; what it loses there is what it sees. "
        "Chance: a guess without looking (POPE is balanced, MMBench has up to four options).",
        "95 %: Wilson interval of a proportion over n answers; it covers the draw of questions, not of the training.",
        PAPER_NOTE
        + " Theirs is LLaVA-1.5 with LLaMA-3 on the full benchmarks; POPE there is one score for all splits.",
    ]
    easy = OWN_TASKS["easy_vqa"][0]
    if run.lmms and run.shuffled and easy in run.lmms.tasks and easy in run.shuffled.tasks:
        real, control = run.lmms.tasks[easy].get("n"), run.shuffled.tasks[easy].get("n")
        if real != control:
            notes.append(f"easy-VQA: the control has n = {control}, the model n = {real}: not the same questions.")
    return notes


def _own_row(run: Run, tree: dict[str, Any], name: str, metric: str, width: int) -> Row:
    found = tree[name]
    label = LABELS[name, metric]
    if found is None:
        return Row(cells=[label, MISSING, *[NONE] * (4 + 1 + width)])
    n = size(run.lmms, name, metric)
    f1 = percent(found["f1"]) if "f1" in found else NONE
    chance = percent(CHANCE[name]) if name in CHANCE else NONE
    control = percent(shuffled(run, name, metric))
    cells = [label, percent(found[metric]), interval(found[metric], n), f1, control, chance, count(n)]
    return Row(cells=[*cells, *[NONE] * width])


def _passed_row(run: Run, task: str, metric: str, metrics: dict[str, float], paper_cells: list[str]) -> Row:
    """A stock task: its metric may be no share at all (CIDEr, points), and then it is shown as it is."""
    value, n = metrics[metric], size(run.lmms, task, "accuracy")
    share = 0 <= value <= 1
    control = shuffled(run, task, metric)
    show = percent if share else number
    label = task if metric == "accuracy" else f"{task}: {metric}"
    rest = [
        interval(value, n) if metric == "accuracy" and share else NONE,
        NONE,
        MISSING if control is None else show(control),
        NONE,
        count(n),
    ]
    return Row(cells=[label, show(value), *rest, *paper_cells])


def _paper_cells(theirs: dict[str, Any], key: str | None, width: int) -> list[str]:
    if key is None:
        return [NONE] * width
    place = theirs["columns"].index(key)
    return [number(values[place]) for values in theirs["rows"].values()]


def steps_table(run: Run) -> Table:
    """Each step with its time, memory and command."""
    columns = [Column(name=name) for name in ("Step", "Time", "Peak memory", "Command")]
    rows = [
        Row(
            cells=[
                step.name,
                duration(step.seconds),
                MISSING if step.peak_memory_bytes is None else f"{step.peak_memory_bytes / 2**30:.2f} GiB",
                step.command,
            ]
        )
        for step in run.steps
    ]
    notes = [f"{duration(sum(step.seconds for step in run.steps))} in all."] if rows else []
    return Table(columns=columns, rows=rows, notes=notes)


def missing_parts(run: Run) -> list[str]:
    """What this report could not show, with the command that would measure it."""
    root = run.root
    absent = {
        f"Retrieval: `clips-mllm retrieve {root}/encoder --data TEST.json`": run.retrieval is None,
        f"Benchmarks of the MLLM: `clips-mllm evaluate {root}/finetune --config RECIPE.yaml`": run.lmms is None,
        f"Shuffled-image control: `clips-mllm evaluate {root}/finetune --config RECIPE.yaml --control shuffled`": (
            run.shuffled is None
        ),
        f"Answers to look at: the samples file that {root}/finetune/lmms.json names": (
            run.lmms is not None and not run.lmms.samples
        ),
        f"Times and commands: {root}/steps": not run.steps,
    }
    have = {curve.stage for curve in run.curves}
    curves = [f"Training curve of {stage}: {root}/{stage}/metrics.jsonl" for stage in STAGES if stage not in have]
    tasks = run.lmms.tasks if run.lmms else {}
    unmeasured = [task for task, _ in OWN_TASKS.values() if run.lmms and task not in tasks]
    names = [f"Benchmark {task}: not in {root}/finetune/lmms.json" for task in unmeasured]
    return [text for text, gone in absent.items() if gone] + names + curves
