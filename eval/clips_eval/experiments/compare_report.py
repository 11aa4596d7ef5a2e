"""Write compare.json, compare.md and compare.html: each tower against the first, over documents and over seeds.

Test over documents: would other questions give the same sign? The mean over seeds is compared on the same documents
(`uncertainty.paired`, Holm over all rows). Test over seeds: would another training? Student's interval of the mean of
the per-seed differences. The towers are trained once each, so their own spread is not included.
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
    "Over documents: permutation test over images of the mean over seeds, Holm-corrected over all rows (would other "
    "questions give the same sign?). Over seeds: Student's 95 % interval of the mean per-seed difference (would "
    "another training of the two stages?). The towers were trained once each."
)
OVER_SEEDS = {"held": "better", "did not hold": "worse", "undecided": "no difference"}


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """One metric of a tower against the first: values per seed, and both tests."""

    tower: str
    task: str
    metric: str
    first: list[float]
    values: list[float]
    documents: Difference
    seeds: str  # better, worse, no difference, or "one seed"

    @property
    def gain(self) -> list[float]:
        """Differences per seed."""
        return [ours - theirs for ours, theirs in zip(self.values, self.first, strict=True)]


@dataclass(frozen=True, kw_only=True)
class LeftOut:
    """A metric that cannot be compared."""

    tower: str
    task: str
    metric: str
    reason: str


def write_report(recipe: CompareRecipe, command: str) -> str:
    """Write all three files and return the Markdown.

    Raises:
        UserError: the runs answered different documents.
    """
    rows, rest = compare_towers(recipe)
    first, *others = (run.name for run in recipe.runs)
    seeds = f"{len(recipe.seeds)} seed{'s' if len(recipe.seeds) > 1 else ''}"
    title = "Towers compared"
    lead = f"Same LLM, data and steps; {seeds} of both stages. Mean over seeds in % or points, against `{first}`."
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


def compare_towers(recipe: CompareRecipe) -> tuple[list[Comparison], list[LeftOut]]:
    """Return the comparisons, with p-values adjusted over all of them (Holm), and what cannot be compared."""
    runs = {run: [read_run(cell(recipe, run, seed)) for seed in recipe.seeds] for run in recipe.runs}
    first, *others = recipe.runs
    found = [row for other in others for row in _against(runs[first], runs[other], other.name)]
    rows = [row for row in found if isinstance(row, Comparison)]
    if not rows:
        raise UserError("no metric with single answers", file=recipe.output_dir, remedy="see the lmms.json of the runs")
    adjusted = holm([row.documents for row in rows])
    rows = [replace(row, documents=documents) for row, documents in zip(rows, adjusted, strict=True)]
    return rows, [row for row in found if isinstance(row, LeftOut)]


def _against(theirs: Sequence[Run], ours: Sequence[Run], tower: str) -> Iterator[Comparison | LeftOut]:
    for task, metric in _metrics(ours[0]):
        a, b = ([_scores(run, task, metric) for run in runs] for runs in (ours, theirs))
        left, right = ([one for one in some if one is not None] for some in (a, b))
        if len(left) < len(a) or len(right) < len(b):
            yield LeftOut(tower=tower, task=task, metric=metric, reason="has no per-document scores in some run")
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
        yield Comparison(
            tower=tower,
            task=task,
            metric=metric,
            first=first,
            values=values,
            documents=replace(found, n=round(found.n / len(left)), lower=lower),
            # The encoder is the same for all seeds.
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
    """Combine the seeds into one score whose value is the mean of their values, also for ratios such as precision.

    Each seed is a stratum with weight 1 / number of seeds; an image is resampled with its documents in all seeds.

    Raises:
        ValueError: the seeds answered different documents.
    """
    first, *others = seeds
    if any(one.clusters != first.clusters or one.strata != first.strata for one in others):
        raise ValueError("the seeds answered different documents")
    strata = first.strata or [""] * len(first.clusters)
    return Scores(
        numerators=[part / len(seeds) for one in seeds for part in one.numerators],
        denominators=[part for one in seeds for part in one.denominators],
        clusters=[name for one in seeds for name in one.clusters],
        strata=[f"{seed} {name}" for seed in range(len(seeds)) for name in strata],
    )


def _table(first: str, tower: str, rows: Sequence[Comparison], rest: Sequence[LeftOut]) -> Table:
    """Return the table of one tower against the first."""
    names = ["metric", first, tower, "difference", "95 %, documents", "p", "over documents", "by seed", "over seeds"]
    notes = [
        f"Not compared: {one.task.removeprefix('clips_')}: {one.metric} {one.reason}."
        for one in rest
        if one.tower == tower
    ]
    return plain_table(names, [_cells(row) for row in rows if row.tower == tower], notes)


def _cells(row: Comparison) -> list[str]:
    found = row.documents
    spread = mean(row.gain).error if len(row.gain) > 1 else 0.0
    scale = 100 if max(map(abs, [*row.first, *row.values])) <= 1 else 1  # points keep their unit
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
