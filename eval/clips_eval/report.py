"""`clips-mllm report RUN`: everything a run measured, on one page.

RUN --report_read--> Run --report_numbers--> report.json
                         --report_sections (tables, plots, gallery)--> report.md, report.html
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vision_tower.common.errors import UserError, run_command
from vision_tower.common.files import write_text
from vision_tower.common.recipe import parse_recipe

LEAD = "From image-text pairs to answers about images: what this run measured, and how to measure it again."


@dataclass(frozen=True, kw_only=True)
class ReportRecipe:
    """Write report.json, report.md and report.html from what a run folder holds.

    Args:
        run: the run folder, such as runs/quickstart.
        against: another run folder; each metric on the same documents is marked better, worse or no difference.
        baselines: lmms.json files of other models, each a column beside this run's, and retrieval.json files of other
            encoders, each a row below it.
        fail_if_worse: end with an error if any metric is worse than in the run of --against, or is not there.
    """

    run: Path
    against: Path | None = None
    baselines: tuple[Path, ...] = ()
    fail_if_worse: bool = False


def main(argv: list[str]) -> None:
    """Run the command.

    Raises:
        UserError: no run in the folder, a malformed file in it, runs without a common metric, or a metric that is
            worse where that was to fail.
    """
    recipe = parse_recipe(ReportRecipe, argv, command="report", positional=("run",))
    if recipe.fail_if_worse and recipe.against is None:
        raise UserError("worse than what? give the other run by --against FOLDER", key="--fail_if_worse")

    from clips_eval.reporting import html as report_html
    from clips_eval.reporting import markdown as report_markdown
    from clips_eval.reporting.against import as_tree, compare_runs
    from clips_eval.reporting.card import metadata
    from clips_eval.reporting.numbers import numbers
    from clips_eval.reporting.read import read_run
    from clips_eval.reporting.sections import sections
    from clips_eval.reporting.tables import missing_parts
    from clips_eval.stats.json_files import write_json

    run = read_run(recipe.run, recipe.baselines)
    against = None
    if recipe.against is not None:
        other = read_run(recipe.against)
        against = as_tree(*compare_runs(run, other), other)
    # All three are rendered before the first is written, so that a malformed file leaves no half a report.
    tree, parts = numbers(run, against), sections(run, against)
    title = f"clips-mllm: {run.root.resolve().name}"
    markdown = report_markdown.render([metadata(run), f"# {title}", "Plots and images are in report.html."], parts)
    page = report_html.render(title, LEAD, parts, tiles=report_html.run_tiles(run))
    write_json(recipe.run / "report.json", tree)
    write_text(recipe.run / "report.md", markdown)
    write_text(recipe.run / "report.html", page)
    for part in missing_parts(run):
        print(f"not measured: {part}")
    print("\n".join([*summary(tree), *_verdicts(against)]))
    for row in run.chat:
        print(f"{row.image}\n  asked:    {' '.join(row.question.split())}\n  answered: {row.answer or '(empty)'}")
    print(f"written: {recipe.run}/report.html, report.md, report.json")
    if recipe.fail_if_worse and against is not None:
        _refuse_worse(recipe, against)


def _refuse_worse(recipe: ReportRecipe, against: dict[str, Any]) -> None:
    worse = [f"{row['task']} {row['metric']}" for row in against["metrics"] if row["verdict"] == "worse"]
    lost = [f"{one['name']} ({one['reason']})" for one in against["not_compared"] if one["lost"]]
    told = [f"worse in {', '.join(worse)}"] if worse else []
    told += [f"not to be compared in {', '.join(lost)}"] if lost else []
    if told:
        raise UserError(f"against {recipe.against} {' and '.join(told)}", file=recipe.run, remedy="see its report.md")


def summary(tree: dict[str, Any]) -> list[str]:
    """The scores of report.json as lines for the terminal; what was not measured has no line."""
    tables = {**tree["encoder"], **tree["mllm"]}
    lines = []
    for name, table in tables.items():
        scores = {key: value for key, value in (table or {}).items() if isinstance(value, float)}
        if scores:
            shown = "  ".join(f"{key} {_shown(value)}" for key, value in scores.items())
            lines.append(f"{name:<17} {shown}")
    return lines


def _shown(value: float) -> str:
    """Shares in per cent; points and judges' scores as they are."""
    return f"{value:.1%}" if 0 <= value <= 1 else f"{value:,.1f}"


def _verdicts(against: dict[str, Any] | None) -> list[str]:
    if against is None:
        return []
    rest = [f"not compared   {one['name']}: {one['reason']}" for one in against["not_compared"]]
    return rest + [
        f"{row['verdict']:<14} {row['task']} {row['metric']}: {row['difference']['value']:+.4f} "
        f"({row['difference']['low']:+.4f} to {row['difference']['high']:+.4f})"
        for row in against["metrics"]
    ]


if __name__ == "__main__":
    sys.exit(run_command(main))
