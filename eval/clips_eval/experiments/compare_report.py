"""compare.json, compare.md and compare.html: towers against the first one, over documents and over seeds.

Two questions, two tests. Would other questions give the same sign? Each metric's mean over the seeds is compared on the
same documents (`uncertainty.paired`, Holm over all rows). Would another training? The difference of each seed,
and Student's interval of their mean; the towers themselves are not trained again, and that spread is not in it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace

from clips_eval.experiments.ablate_results import judge, mean
from clips_eval.experiments.compare_recipe import CompareRecipe, cell
from clips_eval.reporting import html as report_html
from clips_eval.reporting import markdown as report_markdown
from clips_eval.reporting.against import NEITHER_WAY, lower_is_better, scores_of, shown_p
from clips_eval.reporting.cells import Table, plain_table
from clips_eval.reporting.read import RECALLS, Run, read_run
from clips_eval.reporting.sections import Section
from clips_eval.retrieval.scores import hit_scores, query_clusters
from clips_eval.stats.json_files import write_json
from clips_eval.stats.uncertainty import Difference, Scores, Undefined, holm, paired, value
from vision_tower.common.errors import UserError
from vision_tower.common.files import write_text

FOOT = (
    "Over documents: permutation test by image of the mean over the seeds, Holm-corrected over all rows; "
    "would other questions give the same sign? Over seeds: Student's 95 % interval of the mean of the seeds' "
    "differences; would another training of the two stages? The towers were trained once each."
)
OVER_SEEDS = {"held": "better", "did not hold": "worse", "undecided": "no difference"}


@dataclass(frozen=True, kw_only=True)
class Row:
    """One metric of a tower against the first: values by seed, and both tests."""

    tower: str
    task: str
    metric: str
    first: list[float]
    values: list[float]
    documents: Difference
    seeds: str  # better, worse, no difference; "one seed" where there is no spread

    @property
    def gain(self) -> list[float]:
        """By seed."""
        return [ours - theirs for ours, theirs in zip(self.values, self.first, strict=True)]


@dataclass(frozen=True, kw_only=True)
class LeftOut:
    """A metric of a tower that cannot be held against the first's."""

    tower: str
    task: str
    metric: str
    reason: str


def write_report(recipe: CompareRecipe, command: str) -> str:
    """Write all three files; returns the Markdown.

    Raises:
        UserError: runs that do not answer the same documents.
    """
    rows, rest = compare_towers(recipe)
    first, *others = (run.name for run in recipe.runs)
    seeds = f"{len(recipe.seeds)} seed{'s' if len(recipe.seeds) > 1 else ''}"
    title = "Towers compared"
    lead = f"Same LLM, data and steps; {seeds} of both stages. In % or points, the mean over seeds; against `{first}`."
    parts = [Section(title=name, table=_table(first, name, rows, rest)) for name in others]
    text = report_markdown.render([f"# {title}", lead, f"`{command}`"], parts, [FOOT])
    tree = {
        "first": recipe.runs[0].name,
        "seeds": recipe.seeds,
        "command": command,
        "rows": [{**asdict(row), "verdict": row.documents.verdict, "gain": row.gain} for row in rows],
        "not_compared": [asdict(one) for one in rest],
    }
    write_json(recipe.output_dir / "compare.json", tree)
    write_text(recipe.output_dir / "compare.md", text)
    page = report_html.render(title, f"{lead} `{command}`", parts, foot=FOOT)
    write_text(recipe.output_dir / "compare.html", page)
    return text


def compare_towers(recipe: CompareRecipe) -> tuple[list[Row], list[LeftOut]]:
    """Every metric of every other tower, p-values adjusted over all of them; and what cannot be compared."""
    runs = {run: [read_run(cell(recipe, run, seed)) for seed in recipe.seeds] for run in recipe.runs}
    first, *others = recipe.runs
    found = [row for other in others for row in _against(runs[first], runs[other], other.name)]
    rows = [row for row in found if isinstance(row, Row)]
    if not rows:
        raise UserError(
            "no metric whose single answers are known", file=recipe.output_dir, remedy="see the runs' lmms.json"
        )
    adjusted = holm([row.documents for row in rows])
    rows = [replace(row, documents=documents) for row, documents in zip(rows, adjusted, strict=True)]
    return rows, [row for row in found if isinstance(row, LeftOut)]


def _against(theirs: Sequence[Run], ours: Sequence[Run], tower: str) -> Iterator[Row | LeftOut]:
    for task, metric in _metrics(ours[0]):
        a, b = ([_scores(run, task, metric) for run in runs] for runs in (ours, theirs))
        left, right = ([one for one in some if one is not None] for some in (a, b))
        if len(left) < len(a) or len(right) < len(b):
            yield LeftOut(tower=tower, task=task, metric=metric, reason="is not known document by document in some run")
            continue
        try:
            found = paired(_over_seeds(left), _over_seeds(right))
        except Undefined:
            yield LeftOut(tower=tower, task=task, metric=metric, reason="has no value in some run")
            continue
        except ValueError as error:
            raise UserError(f"{task}: {error}", file=tower, remedy="measure all runs on the same data") from error
        lower = task != "retrieval" and ours[0].lmms is not None and lower_is_better(ours[0].lmms, task, metric)
        values, first = [value(one) for one in left], [value(one) for one in right]
        yield Row(
            tower=tower,
            task=task,
            metric=metric,
            first=first,
            values=values,
            documents=replace(found, n=round(found.n / len(left)), lower=lower),
            # The tower is the same for every seed.
            seeds="–" if task == "retrieval" else _over_trainings(values, first, lower),
        )


def _over_trainings(values: Sequence[float], first: Sequence[float], lower: bool) -> str:
    gains = [(y - x if lower else x - y) for x, y in zip(values, first, strict=True)]
    return "one seed" if len(gains) < 2 else OVER_SEEDS[judge(gains)]


def _metrics(run: Run) -> list[tuple[str, str]]:
    found = [("retrieval", key) for key in RECALLS] if run.retrieval is not None else []
    tasks = run.lmms.tasks if run.lmms else {}
    return found + [
        (task, metric) for task, metrics in tasks.items() for metric in metrics if metric not in NEITHER_WAY
    ]


def _scores(run: Run, task: str, metric: str) -> Scores | None:
    if task == "retrieval":
        about = run.retrieval.about if run.retrieval else {}
        return hit_scores(about["hits"][metric], query_clusters(about, metric)) if "hits" in about else None
    return scores_of(run.lmms, task, metric) if run.lmms else None


def _over_seeds(seeds: Sequence[Scores]) -> Scores:
    """Every seed's documents, whose value is the mean of the seeds' values: of ratios too, such as a precision.

    A seed is a stratum that counts by one over their number; an image stands for its documents in all of them.

    Raises:
        ValueError: the seeds answer different documents.
    """
    first, *others = seeds
    if any(one.clusters != first.clusters or one.strata != first.strata for one in others):
        raise ValueError("the seeds answer different documents")
    strata = first.strata or [""] * len(first.clusters)
    return Scores(
        numerators=[part / len(seeds) for one in seeds for part in one.numerators],
        denominators=[part for one in seeds for part in one.denominators],
        clusters=[name for one in seeds for name in one.clusters],
        strata=[f"{seed} {name}" for seed in range(len(seeds)) for name in strata],
    )


def _table(first: str, tower: str, rows: Sequence[Row], rest: Sequence[LeftOut]) -> Table:
    """One tower against the first."""
    names = ["metric", first, tower, "difference", "95 %, documents", "p", "over documents", "by seed", "over seeds"]
    notes = [
        f"Not compared: {one.task.removeprefix('clips_')}: {one.metric} {one.reason}."
        for one in rest
        if one.tower == tower
    ]
    return plain_table(names, [_cells(row) for row in rows if row.tower == tower], notes)


def _cells(row: Row) -> list[str]:
    found = row.documents
    spread = mean(row.gain).error if len(row.gain) > 1 else 0.0
    scale = 100 if max(map(abs, [*row.first, *row.values])) <= 1 else 1  # points are shown as they are
    return [
        f"{row.task.removeprefix('clips_')}: {row.metric}",
        f"{scale * sum(row.first) / len(row.first):.1f}",
        f"{scale * sum(row.values) / len(row.values):.1f}",
        f"{scale * found.value:+.1f}",
        f"{scale * found.low:+.1f} to {scale * found.high:+.1f}",
        shown_p(found.adjusted),
        found.verdict,
        ", ".join(f"{scale * gain:+.1f}" for gain in row.gain) + (f" (± {scale * spread:.1f})" if spread else ""),
        row.seeds,
    ]
