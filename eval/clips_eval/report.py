"""`clips-mllm report RUN`: write a report of everything a run measured.

RUN --read--> Run --numbers--> report.json
                  --sections (tables, plots, gallery)--> report.md, report.html
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vision_tower.common.errors import UserError, run_command
from vision_tower.common.files import write_text
from vision_tower.common.recipe import parse_recipe

LEAD = "What this run measured, with the commands to measure it again."


@dataclass(frozen=True, kw_only=True)
class ReportRecipe:
    """Write report.json, report.md and report.html from the results in a run folder.

    Args:
        run: run folder with encoder/, align/ and finetune/, or some of them.
        against: another run folder; metrics on the same documents are marked better, worse or no difference.
        baselines: lmms.json files of other models (one column each) and retrieval.json files of other encoders (one row
            each).
        fail_if_worse: exit with an error if a metric is worse than in --against, or is missing.
    """

    run: Path
    against: Path | None = None
    baselines: tuple[Path, ...] = ()
    fail_if_worse: bool = False


def main(argv: list[str]) -> None:
    """Run the command.

    Raises:
        UserError: nothing to report, a malformed file, no common metric, or a worse metric with `fail_if_worse`.
    """
    recipe = parse_recipe(ReportRecipe, argv, command="report", positional=("run",))
    if recipe.fail_if_worse and recipe.against is None:
        raise UserError("needs another run to compare with", key="--fail_if_worse", remedy="add --against FOLDER")

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
    # Render everything before writing, so that a malformed file leaves no partial report.
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
    problems = [f"worse in {', '.join(worse)}"] if worse else []
    problems += [f"not comparable in {', '.join(lost)}"] if lost else []
    if problems:
        raise UserError(f"against {recipe.against}: {' and '.join(problems)}", file=recipe.run, remedy="see report.md")


def summary(tree: dict[str, Any]) -> list[str]:
    """Return the scores of report.json as lines for the terminal."""
    tables = {**tree["encoder"], **tree["mllm"]}
    lines = []
    for name, table in tables.items():
        scores = {key: value for key, value in (table or {}).items() if isinstance(value, float)}
        if scores:
            shown = "  ".join(f"{key} {_shown(value)}" for key, value in scores.items())
            lines.append(f"{name:<17} {shown}")
    return lines


def _shown(value: float) -> str:
    """Format fractions as percent; other scores keep their unit."""
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
