"""Render report sections as Markdown, for terminals, pull requests and model cards."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from clips_eval.reporting.cells import Table

if TYPE_CHECKING:
    from clips_eval.reporting.sections import Section


def render(head: Sequence[str], sections: Sequence[Section], foot: Sequence[str] = ()) -> str:
    """Return Markdown: `head` paragraphs, the tables and lines of each section, `foot` paragraphs."""
    parts = list(head)
    for section in sections:
        if section.table or section.lines:
            parts.append(f"{'#' * section.level} {section.title}")
        if section.table:
            parts.append(table(section.table))
        if section.lines:
            parts.append("\n".join(f"- {line}" for line in section.lines))
    return "\n\n".join([*parts, *foot]) + "\n"


def table(content: Table) -> str:
    """Render a table; the paper's rows and columns are marked "(paper)"."""
    head = [f"{column.name} (paper)" if column.paper else column.name for column in content.columns]
    lines = [_line(head), _line(["---"] + ["---:"] * (len(head) - 1))]
    for row in content.rows:
        mark = " (paper)" if row.kind == "paper" else ""
        cells = [
            f"`{cell}`" if column.name == "Command" else cell
            for cell, column in zip(row.cells, content.columns, strict=True)
        ]  # fmt: skip
        lines.append(_line([cells[0] + mark, *cells[1:]]))
    return "\n".join([*lines, *(f"\n{note}" for note in content.notes)])


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
