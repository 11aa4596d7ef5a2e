"""report.md: the same tables as plain Markdown, for terminals, pull requests, diffs, and as a model card."""

from __future__ import annotations

from typing import Any

from clips_eval.report_against import against_table
from clips_eval.report_card import metadata
from clips_eval.report_cells import MISSING, Table
from clips_eval.report_mllm import mllm_table
from clips_eval.report_read import Run
from clips_eval.report_tables import (
    embedding_table,
    load_paper,
    missing_parts,
    provenance_table,
    retrieval_table,
    steps_table,
    zeroshot_table,
)


def render(run: Run, against: dict[str, Any] | None = None) -> str:
    """A model card in the hub's format: metadata, then the tables; the paper's rows and columns say "(paper)"."""
    paper = load_paper()
    parts = [metadata(run), f"# clips-mllm: {run.root.resolve().name}", "Plots and pictures are in report.html."]
    parts += ["## Encoder: retrieval", _table(retrieval_table(run, paper))]
    if run.retrieval and (further := embedding_table(run.retrieval)):
        parts += ["### Beyond recall", _table(further)]
    if run.zeroshot:
        parts += ["## Encoder: zero-shot classification", _table(zeroshot_table(run.zeroshot))]
    parts += ["## Multimodal LLM: benchmarks", _table(mllm_table(run, paper))]
    if against is not None:
        parts += ["## Against another run", _table(against_table(against))]
    if run.chat:
        lines = [f"- **{_inline(row.question)}** {_inline(row.answer) or '(empty)'}" for row in run.chat]
        parts += ["## Asked at the end of the run", "\n".join(lines)]
    if run.curves:
        parts += ["## Training", "\n".join(_curve_lines(run))]
    parts += ["## Steps", _table(steps_table(run)) if run.steps else MISSING]
    if run.environments or run.lmms or run.retrieval:
        parts += ["## Provenance", _table(provenance_table(run))]
    if missing := missing_parts(run):
        parts += ["## Not measured", "\n".join(f"- {part}" for part in missing)]
    return "\n\n".join(parts) + "\n"


def _curve_lines(run: Run) -> list[str]:
    lines = []
    for curve in run.curves:
        for name, points in curve.losses.items():
            (first, start), (last, end) = points[0], points[-1]
            lines.append(f"- {curve.stage}, {name}: {start:.3f} at step {first}, {end:.3f} at step {last}")
    return lines


def _table(table: Table) -> str:
    head = [f"{column.name} (paper)" if column.paper else column.name for column in table.columns]
    lines = [_line(head), _line(["---"] + ["---:"] * (len(head) - 1))]
    for row in table.rows:
        mark = " (paper)" if row.kind == "paper" else ""
        cells = [
            f"`{cell}`" if column.name == "Command" else cell
            for cell, column in zip(row.cells, table.columns, strict=True)
        ]  # fmt: skip
        lines.append(_line([cells[0] + mark, *cells[1:]]))
    return "\n".join([*lines, *(f"\n{note}" for note in table.notes)])


def _line(cells: list[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _inline(text: str) -> str:
    return " ".join(text.split())
