"""Compare two runs on the same documents: difference, interval, paired test and verdict per metric."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from typing import Any

from clips_eval.reporting.benchmarks import Benchmarks, Sample
from clips_eval.reporting.cells import NONE, Table, plain_table
from clips_eval.reporting.read import RECALLS, Run
from clips_eval.retrieval.scores import hit_scores, query_clusters
from clips_eval.stats.uncertainty import Difference, Scores, Undefined, holm, paired
from vision_tower.common.errors import UserError

# Metrics without a better direction; target_yes_ratio is a property of the questions.
NEITHER_WAY = frozenset({"n", "yes_ratio", "target_yes_ratio"})


@dataclass(frozen=True, kw_only=True)
class Compared:
    """One metric of two runs."""

    task: str
    metric: str
    ours: float
    theirs: float
    difference: Difference


@dataclass(frozen=True, kw_only=True)
class NotCompared:
    """A metric of the other run that cannot be compared. `lost` if this run is the one that lacks it."""

    name: str
    reason: str
    lost: bool


def compare_runs(ours: Run, theirs: Run) -> tuple[list[Compared], list[NotCompared]]:
    """Compare every metric that both runs have on the same documents.

    Returns:
        The compared metrics, with p-values adjusted over all of them (Holm), and the metrics that were not compared.

    Raises:
        UserError: the runs share no metric with known, identical documents.
    """
    both = [*_retrieval(ours, theirs), *_benchmarks(ours, theirs)]
    found = [one for one in both if isinstance(one, Compared)]
    rest = [one for one in both if isinstance(one, NotCompared)]
    if not found:
        example = f" ({rest[0].name}: {rest[0].reason})" if rest else ""
        raise UserError(
            f"no metric with single answers about the same documents as {ours.root}{example}",
            file=theirs.root,
            remedy="measure both with this version on the same data",
        )
    adjusted = holm([one.difference for one in found])
    return [replace(one, difference=difference) for one, difference in zip(found, adjusted, strict=True)], rest


def scores_of(benchmarks: Benchmarks, task: str, metric: str) -> Scores | None:
    """Return the per-document scores of a metric, or None if the file does not have them."""
    rows = [sample for sample in benchmarks.samples if sample.task == task]
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


def lower_is_better(benchmarks: Benchmarks, task: str, metric: str) -> bool:
    """Return True if the task definition says that lower values are better."""
    return metric in benchmarks.about.get("lower_is_better", {}).get(task, ())


def _benchmarks(ours: Run, theirs: Run) -> Iterable[Compared | NotCompared]:
    if theirs.lmms is None:
        return
    for task, metrics in theirs.lmms.tasks.items():
        if ours.lmms is None or task not in ours.lmms.tasks:
            yield NotCompared(name=task, reason=_missing_reason(ours, task), lost=True)
        elif not _same_documents(ours.lmms, theirs.lmms, task):
            yield NotCompared(name=task, reason="the runs answered different documents", lost=True)
        else:
            for metric in (name for name in metrics if name not in NEITHER_WAY):
                yield _metric(ours.lmms, theirs.lmms, task, metric)


def _missing_reason(run: Run, task: str) -> str:
    if run.lmms is None:
        return "this run has no benchmarks"
    for event, reasons in (("failed", run.lmms.failed), ("was skipped", run.lmms.skipped)):
        if task in reasons:
            return f"it {event} in this run ({reasons[task]})"
    return "not measured in this run"


def _metric(ours: Benchmarks, theirs: Benchmarks, task: str, metric: str) -> Compared | NotCompared:
    name = f"{task} {metric}"
    if metric not in ours.tasks[task]:
        return NotCompared(name=name, reason="not measured in this run", lost=True)
    a, b = (scores_of(found, task, metric) for found in (ours, theirs))
    if a is None or b is None:
        return NotCompared(name=name, reason="it has no per-document scores", lost=False)
    try:
        found = paired(a, b)
    except Undefined as error:
        return NotCompared(name=name, reason=str(error), lost=False)
    return Compared(
        task=task,
        metric=metric,
        ours=ours.tasks[task][metric],
        theirs=theirs.tasks[task][metric],
        difference=replace(found, lower=lower_is_better(ours, task, metric)),
    )


def _same_documents(ours: Benchmarks, theirs: Benchmarks, task: str) -> bool:
    def about(sample: Sample) -> tuple[Any, ...]:
        return sample.doc_id, sample.target, sample.cluster

    return task in theirs.tasks and [about(sample) for sample in ours.samples if sample.task == task] == [
        about(sample) for sample in theirs.samples if sample.task == task
    ]


def _retrieval(ours: Run, theirs: Run) -> Iterable[Compared | NotCompared]:
    a, b = ours.retrieval, theirs.retrieval
    if b is None:
        return
    if a is None:
        yield NotCompared(name="retrieval", reason="not measured in this run", lost=True)
    elif "hits" not in a.about or "hits" not in b.about:
        yield NotCompared(name="retrieval", reason="it has no per-query results", lost=False)
    elif a.about.get("data_sha256") != b.about.get("data_sha256"):
        yield NotCompared(name="retrieval", reason="measured on other data", lost=True)
    else:
        for key in RECALLS:
            clusters = query_clusters(a.about, key)
            left, right = (hit_scores(run.about["hits"][key], clusters) for run in (a, b))
            yield Compared(
                task="retrieval", metric=key, ours=a.recalls[key], theirs=b.recalls[key], difference=paired(left, right)
            )


def as_tree(compared: list[Compared], rest: list[NotCompared], other: Run) -> dict[str, Any]:
    """Return the comparison as it is written to report.json."""
    rows = [{**asdict(one), "verdict": one.difference.verdict} for one in compared]
    return {"run": str(other.root), "metrics": rows, "not_compared": [asdict(one) for one in rest]}


def shown_p(p: float | None) -> str:
    """Format a p-value with three decimals; a permutation test cannot show p = 0."""
    if p is None:
        return NONE
    return f"{p:.3f}" if p > 0.001 else "≤ 0.001"


def against_table(tree: dict[str, Any]) -> Table:
    """Return the table of differences and verdicts."""
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
            shown_p(found["adjusted"]),
        ]
        rows.append(cells)
    notes = [
        f"Other: {tree['run']}. Differences on the same documents. 95 %: bootstrap over images, same draws for "
        "both runs. p: two-sided permutation test over images, Holm-corrected over all rows; verdicts at 0.05. A "
        "run is one training: this compares two trained models, not two training methods."
    ]
    notes += [f"Not compared: {one['name'].removeprefix('clips_')}: {one['reason']}." for one in tree["not_compared"]]
    return plain_table(names, rows, notes)
