"""Two runs on the same documents: the difference of every metric, its interval, a paired test and a verdict."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

from clips_eval.report_benchmarks import Benchmarks, Sample
from clips_eval.report_cells import NONE, Table, plain_table
from clips_eval.report_read import RECALLS, Run
from clips_eval.retrieval_scores import hit_scores, query_clusters
from clips_eval.uncertainty import Difference, Scores, holm, paired
from vision_tower.errors import UserError

# More of these is neither better nor worse; the last is a property of the questions.
NEITHER_WAY = frozenset({"n", "yes_ratio", "target_yes_ratio"})


@dataclass(frozen=True, kw_only=True)
class Compared:
    """One metric of two runs."""

    task: str
    metric: str
    ours: float
    theirs: float
    difference: Difference


def compare_runs(ours: Run, theirs: Run) -> list[Compared]:
    """Every metric that both runs have on the same documents; p-values adjusted over all of them.

    Raises:
        UserError: the runs share no metric whose documents are known and the same.
    """
    found = [*_retrieval(ours, theirs), *_benchmarks(ours, theirs)]
    if not found:
        raise UserError(
            f"{theirs.root}: shares no metric with {ours.root} whose single answers are known and are about the same "
            "documents; measure both with this version, on the same data"
        )
    adjusted = holm([one.difference for one in found])
    return [
        Compared(**{**one.__dict__, "difference": difference}) for one, difference in zip(found, adjusted, strict=True)
    ]


def scores_of(found: Benchmarks, task: str, metric: str) -> Scores | None:
    """The metric document by document; None where the file does not tell."""
    rows = [sample for sample in found.samples if sample.task == task]
    parts = [sample.scores.get(metric) for sample in rows]
    if not rows or any(part is None for part in parts) or any(sample.cluster is None for sample in rows):
        return None
    known = [part for part in parts if part is not None]
    return Scores(
        numerators=[part[0] for part in known],
        denominators=[part[1] for part in known],
        clusters=[str(sample.cluster) for sample in rows],
        strata=[part[2] for part in known] if len(known[0]) > 2 else None,
    )


def _benchmarks(ours: Run, theirs: Run) -> Iterable[Compared]:
    if ours.lmms is None or theirs.lmms is None:
        return
    for task, metrics in ours.lmms.tasks.items():
        if not _same_documents(ours.lmms, theirs.lmms, task):
            continue
        for metric in metrics:
            if metric in NEITHER_WAY:
                continue
            a, b = (scores_of(found, task, metric) for found in (ours.lmms, theirs.lmms))
            if a is not None and b is not None:
                yield Compared(
                    task=task,
                    metric=metric,
                    ours=metrics[metric],
                    theirs=theirs.lmms.tasks[task][metric],
                    difference=paired(a, b),
                )


def _same_documents(ours: Benchmarks, theirs: Benchmarks, task: str) -> bool:
    def about(sample: Sample) -> tuple[Any, ...]:
        return sample.doc_id, sample.target, sample.cluster

    return task in theirs.tasks and [about(sample) for sample in ours.samples if sample.task == task] == [
        about(sample) for sample in theirs.samples if sample.task == task
    ]


def _retrieval(ours: Run, theirs: Run) -> Iterable[Compared]:
    a, b = ours.retrieval, theirs.retrieval
    if a is None or b is None or "hits" not in a.about or a.about.get("data_sha256") != b.about.get("data_sha256"):
        return
    for key in RECALLS:
        if key in a.about["hits"] and key in b.about.get("hits", {}):
            clusters = query_clusters(a.about, key)
            left, right = (hit_scores(run.about["hits"][key], clusters) for run in (a, b))
            yield Compared(
                task="retrieval", metric=key, ours=a.recalls[key], theirs=b.recalls[key], difference=paired(left, right)
            )


def as_tree(compared: list[Compared], other: Run) -> dict[str, Any]:
    """For report.json."""
    rows = [{**asdict(one), "verdict": one.difference.verdict} for one in compared]
    return {"run": str(other.root), "metrics": rows}


def against_table(tree: dict[str, Any]) -> Table:
    """Better, worse or no difference, metric by metric."""
    names = ("Metric", "Verdict", "This run", "Other", "Difference", "95 %", "p")
    rows = []
    for row in tree["metrics"]:
        found = row["difference"]
        share = abs(row["ours"]) <= 1 and abs(row["theirs"]) <= 1
        scale = 100 if share else 1
        sign = {"better": "▲ better", "worse": "▼ worse"}.get(row["verdict"], row["verdict"])
        cells = [
            f"{row['task'].removeprefix('clips_')}: {row['metric']}",
            sign,
            f"{scale * row['ours']:.1f}",
            f"{scale * row['theirs']:.1f}",
            f"{scale * found['value']:+.1f}",
            f"{scale * found['low']:+.1f} to {scale * found['high']:+.1f}",
            f"{found['adjusted']:.3f}" if found["adjusted"] is not None else NONE,
        ]
        rows.append(cells)
    notes = [
        f"Other: {tree['run']}. Differences on the same documents; 95 %: bootstrap that draws pictures, the same for "
        "both. p: two-sided permutation test by picture, after Holm's correction over all rows; a verdict is given "
        "below 0.05. One training each: a difference between two trainings, not yet between two ways of training."
    ]
    return plain_table(names, rows, notes)
