"""Tables of the report as data, shared by the Markdown and the HTML renderer."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from clips_eval.reporting.cells import MISSING, NONE, Column, Row, Table, duration, interval, number, percent
from clips_eval.reporting.encoder import WAYS
from clips_eval.reporting.numbers import OWN_TASKS, provenance, recall_chance, recall_span
from clips_eval.reporting.read import RECALLS, STAGES, Retrieval, Run, ZeroShot

PAPER_NOTE = (
    "Marked “paper”: published numbers of the CLIPS paper (arXiv 2411.16828), from other data, other models and a far "
    "larger scale. They are not comparable with this run and are shown for orientation."
)


def load_paper() -> dict[str, Any]:
    """Load the paper's results, which ship with the package."""
    from importlib.resources import files

    return json.loads((files("clips_eval.reporting") / "data" / "paper_results.json").read_text(encoding="utf-8"))


def retrieval_table(run: Run, paper: dict[str, Any]) -> Table:
    """Return recall@k of this run, of chance, of other encoders and of the paper's."""
    names = {"i2t": "I→T", "t2i": "T→I"}
    columns = [Column(name="Encoder")] + [
        Column(name=f"{names[key[:3]]} R@{key.partition('_r')[2]}") for key in RECALLS
    ]  # fmt: skip
    retrieval = run.retrieval
    if retrieval is None:
        rows = [Row(cells=["This run", *[MISSING] * len(RECALLS)])]
        notes = []
    else:
        chance = [recall_chance(retrieval, key) for key in RECALLS]
        rows = [
            Row(cells=["This run", *[percent(retrieval.recalls[key]) for key in RECALLS]]),
            Row(cells=["95 %", *[interval(recall_span(retrieval, key)) for key in RECALLS]], kind="control"),
            Row(cells=["Chance", *[NONE if share is None else percent(share) for share in chance]], kind="control"),
        ]
        captions = "" if retrieval.n_texts is None else f" and {retrieval.n_texts:,} captions"
        notes = [f"This run: {retrieval.n_images:,} images{captions} ({retrieval.data})."]
    notes = [
        "Recall@k in %. I→T: an image counts if one of its captions is among the k best. T→I: a caption counts if its "
        "image is.",
        *notes,
        PAPER_NOTE + " The paper's numbers are zero-shot retrieval on COCO (5,000 images) and Flickr30K (1,000).",
    ]
    for title, other in run.encoders.items():
        rows += _other_encoder(title, other)
    if any(
        retrieval is None or other.about.get("data") != retrieval.about.get("data") for other in run.encoders.values()
    ):
        notes.insert(1, "Not every encoder here was measured on the same data.")
    return Table(columns=columns, rows=rows + _paper_retrieval(paper), notes=notes)


def _other_encoder(title: str, retrieval: Retrieval) -> list[Row]:
    recalls = [percent(retrieval.recalls[key]) for key in RECALLS]
    ends = [interval(recall_span(retrieval, key)) for key in RECALLS]
    return [
        Row(cells=[f"{title}, {retrieval.n_images:,} images", *recalls]),
        Row(cells=["95 %", *ends], kind="control"),
    ]


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


def embedding_table(retrieval: Retrieval) -> Table | None:
    """Return ranks, multi-positive scores, recall by length and object, and geometry; None if not measured."""
    about = retrieval.about
    if "geometry" not in about:
        return None
    rows = [
        Row(cells=["Median rank", *(_spanned(about["median_rank"], way, _rank) for way in WAYS)]),
        Row(cells=["mAP@R, own captions", *(_spanned(about["map_at_r"], way, percent) for way in WAYS)]),
    ]
    if about.get("multi_positive"):
        several = [about["multi_positive"][way] for way in WAYS]
        counts = f"n = {several[0]['n']:,} images, {several[1]['n']:,} captions"
        for key, title in (
            ("r1", "R@1, any right answer"),
            ("r5", "R@5, any right answer"),
            ("map_at_r", "mAP@R, all"),
        ):
            rows.append(Row(cells=[f"{title} ({counts})", *(_spanned(scores, key, percent) for scores in several)]))
    for group in about.get("by_length", []):
        title = f"R@5, captions of {group['words'][0]} to {group['words'][1]} words (n = {group['n']:,})"
        rows.append(Row(cells=[title, NONE, _spanned(group, "t2i_r5", percent)]))
    for group in about.get("by_object", []):
        title = f"R@5, “{group['object']}” (n = {group['n_images']:,} images, {group['n_texts']:,} captions)"
        rows.append(Row(cells=[title, *(_spanned(group, f"{way}_r5", percent) for way in WAYS)]))
    geometry = about["geometry"]
    notes = [
        f"Embeddings: modality gap {geometry['modality_gap']:.3f} (distance of the means), alignment "
        f"{geometry['alignment']:.3f}, uniformity {geometry['uniformity_images']:.2f} of images and "
        f"{geometry['uniformity_texts']:.2f} of texts (Wang & Isola 2020; lower is better).",
    ]
    if "intervals" in about["median_rank"]:
        notes.insert(0, "In brackets: 95 % interval, bootstrap over images with all their captions.")
    return Table(columns=[Column(name=name) for name in ("Measure", "I→T", "T→I")], rows=rows, notes=notes)


def _rank(value: float) -> str:
    return f"{value:,.0f}"


def _spanned(values: dict[str, Any], key: str, show: Callable[[float], str]) -> str:
    """Format a number with its interval if known: 41.2 (39.8–42.7)."""
    span = values.get("intervals", {}).get(key) or {"low": None}
    return show(values[key]) + ("" if span["low"] is None else f" ({show(span['low'])}–{show(span['high'])})")


def zeroshot_table(zeroshot: ZeroShot) -> Table:
    """Return zero-shot accuracies of this run with intervals and chance."""
    columns = [Column(name=name) for name in ("Encoder", "Top-1", "Top-5", "Mean per class")]
    chance, near = percent(1 / zeroshot.n_classes), percent(min(1.0, 5 / zeroshot.n_classes))
    top5 = NONE if zeroshot.top5 is None else percent(zeroshot.top5)
    ends = [interval(zeroshot.intervals.get(key)) for key in ("top1", "top5", "mean_per_class")]
    rows = [
        Row(cells=["This run", percent(zeroshot.top1), top5, percent(zeroshot.mean_per_class)]),
        Row(cells=["95 %", *ends], kind="control"),
        Row(cells=["Chance", chance, NONE if zeroshot.top5 is None else near, chance], kind="control"),
    ]
    notes = [
        "Accuracy in %. An image gets the class with the nearest mean prompt embedding. 95 %: bootstrap over images.",
        f"{zeroshot.n_images:,} images, {zeroshot.n_classes:,} classes, {zeroshot.n_texts:,} prompts"
        f" ({zeroshot.data}).",
    ]
    return Table(columns=columns, rows=rows, notes=notes)


def steps_table(run: Run) -> Table:
    """Return time, memory and command of each pipeline step."""
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


def provenance_table(run: Run) -> Table:
    """Return digests, versions, hardware and commands of each part."""
    columns = [
        Column(name=name)
        for name in ("Part", "Weights or recipe, SHA-256", "Seed", "Versions", "Hardware", "Time", "Command")
    ]
    rows = []
    for part, source in provenance(run).items():
        versions, hardware = source.get("versions", {}), source.get("hardware", {})
        gpus = ", ".join(hardware.get("gpus", []))
        cells = [
            part,
            str(source.get("sha256") or source.get("recipe_sha256") or NONE)[:16],
            str(source.get("seed", source.get("recipe", {}).get("seed", NONE))),
            ", ".join(f"{name} {version}" for name, version in versions.items()) or NONE,
            f"{hardware['cpus']} CPUs{', ' + gpus if gpus else ''}" if hardware else NONE,
            duration(source["seconds"]) if "seconds" in source else NONE,
            source.get("command", NONE),
        ]
        rows.append(Row(cells=cells))
    notes = ["The digest is that of the resolved recipe for training, and that of the weights for measurements."]
    return Table(columns=columns, rows=rows, notes=notes if rows else [])


def missing_parts(run: Run) -> list[str]:
    """Return what was not measured, with the command that would measure it."""
    root = run.root
    absent = {
        f"Retrieval: `clips-mllm retrieve {root}/encoder --data TEST.json`": run.retrieval is None,
        f"Benchmarks of the MLLM: `clips-mllm evaluate {root}/finetune --config RECIPE.yaml`": run.lmms is None,
        f"Shuffled-image control: `clips-mllm evaluate {root}/finetune --config RECIPE.yaml --control shuffled`": (
            "shuffled" not in run.controls
        ),
        f"Example answers: the samples file named in {root}/finetune/lmms.json": (
            run.lmms is not None and not run.lmms.samples
        ),
        f"Times and commands: {root}/steps": not run.steps,
    }
    have = {curve.stage for curve in run.curves}
    curves = [f"Training curve of {stage}: {root}/{stage}/metrics.jsonl" for stage in STAGES if stage not in have]
    tasks = run.lmms.tasks if run.lmms else {}
    unmeasured = [task for task, _ in OWN_TASKS.values() if run.lmms and task not in tasks]
    names = [f"Benchmark {task}: not in {root}/finetune/lmms.json" for task in unmeasured]
    reasons = {**run.lmms.skipped, **run.lmms.failed} if run.lmms else {}
    left_out = [f"Benchmark {task}: {reason}" for task, reason in reasons.items()]
    names = [name for name in names if not any(name.startswith(f"Benchmark {task}:") for task in reasons)]
    return [text for text, gone in absent.items() if gone] + names + left_out + curves
