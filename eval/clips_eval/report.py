"""`clips-mllm report RUN`: everything a run measured, on one page.

RUN --report_read--> Run --report_numbers--> report.json
                         --report_tables---> report.md, report.html (with report_plots, report_gallery)
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vision_tower.errors import run_command
from vision_tower.files import write_text
from vision_tower.recipe import parse_recipe


@dataclass(frozen=True, kw_only=True)
class ReportRecipe:
    """Write report.json, report.md and report.html from what a run folder holds.

    Args:
        run: the run folder, such as runs/quickstart.
    """

    run: Path


def main(argv: list[str]) -> None:
    """Run the command.

    Raises:
        UserError: no run in the folder, or a malformed file in it.
    """
    recipe = parse_recipe(ReportRecipe, argv, command="report", positional=("run",))

    from clips_eval import report_html, report_markdown
    from clips_eval.report_files import write_json
    from clips_eval.report_numbers import numbers
    from clips_eval.report_read import read_run
    from clips_eval.report_tables import missing_parts

    run = read_run(recipe.run)
    # All three are rendered before the first is written, so that a malformed file leaves no half a report.
    tree, markdown, page = numbers(run), report_markdown.render(run), report_html.render(run)
    write_json(recipe.run / "report.json", tree)
    write_text(recipe.run / "report.md", markdown)
    write_text(recipe.run / "report.html", page)
    for part in missing_parts(run):
        print(f"not measured: {part}")
    print("\n".join(summary(tree)))
    for row in run.chat:
        print(f"{row.image}\n  asked:    {' '.join(row.question.split())}\n  answered: {row.answer or '(empty)'}")
    print(f"written: {recipe.run}/report.html, report.md, report.json")


def summary(tree: dict[str, Any]) -> list[str]:
    """The scores of report.json as lines for the terminal; what was not measured has no line."""
    tables = {**tree["encoder"], **tree["mllm"]}
    lines = []
    for name, table in tables.items():
        scores = {key: value for key, value in (table or {}).items() if isinstance(value, float)}
        if scores:
            shown = "  ".join(f"{key} {value:.1%}" for key, value in scores.items())
            lines.append(f"{name:<17} {shown}")
    return lines


if __name__ == "__main__":
    sys.exit(run_command(main))
