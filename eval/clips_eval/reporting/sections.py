"""Sections of the report, shared by the Markdown and the HTML renderer."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from clips_eval.reporting.against import against_table
from clips_eval.reporting.cells import MISSING, Table
from clips_eval.reporting.gallery import Card, answer_cards, chat_cards, retrieval_cards
from clips_eval.reporting.mllm import mllm_table
from clips_eval.reporting.plots import Plot, benchmark_plot, curve_plots, inverse_plot, retrieval_plot
from clips_eval.reporting.read import Run
from clips_eval.reporting.tables import (
    embedding_table,
    load_paper,
    missing_parts,
    provenance_table,
    retrieval_table,
    steps_table,
    zeroshot_table,
)


@dataclass(frozen=True, kw_only=True)
class Section:
    """A heading with its content.

    Attributes:
        level: heading level: 2, or 3 for a subsection.
        lines: list items, with commands in backticks; a text version of the plots or cards if there are any.
        wide: use wide cards.
    """

    title: str
    level: int = 2
    table: Table | None = None
    lines: list[str] = field(default_factory=list)
    plots: list[Plot] = field(default_factory=list)
    cards: list[Card] = field(default_factory=list)
    wide: bool = False


def sections(run: Run, against: dict[str, Any] | None = None) -> list[Section]:
    """Return the sections of the report in order."""
    found = [*_encoder(run), *_mllm(run)]
    if against is not None:
        found.append(Section(title="Against another run", table=against_table(against)))
    found.append(Section(title="Training", lines=_curve_lines(run) or [MISSING], plots=curve_plots(run)))
    steps = steps_table(run) if run.steps else None
    found.append(Section(title="Steps", table=steps, lines=[] if steps else [MISSING]))
    if (provenance := provenance_table(run)).rows:
        found.append(Section(title="Provenance", table=provenance))
    if missing := missing_parts(run):
        found.append(Section(title="Not measured", lines=missing))
    return found


def _encoder(run: Run) -> list[Section]:
    plots = [plot for plot in (retrieval_plot(run), inverse_plot(run)) if plot is not None]
    found = [Section(title="Encoder: retrieval", table=retrieval_table(run, load_paper()), plots=plots)]
    if run.retrieval and (further := embedding_table(run.retrieval)):
        found.append(Section(title="Beyond recall", level=3, table=further))
    by_text, by_image = retrieval_cards(run)
    if by_text:
        title = "Text to image: the five best images, the correct one outlined"
        found.append(Section(title=title, level=3, cards=by_text, wide=True))
    if by_image:
        title = "Image to text: the five best captions, correct ones in green with a tick"
        found.append(Section(title=title, level=3, cards=by_image, wide=True))
    if run.zeroshot:
        found.append(Section(title="Encoder: zero-shot classification", table=zeroshot_table(run.zeroshot)))
    return found


def _mllm(run: Run) -> list[Section]:
    plot = benchmark_plot(run)
    plots = [] if plot is None else [plot]
    found = [Section(title="Multimodal LLM: benchmarks", table=mllm_table(run, load_paper()), plots=plots)]
    if run.chat:
        lines = [f"**{_inline(row.question)}** {_inline(row.answer) or '(empty)'}" for row in run.chat]
        found.append(Section(title="Example questions", level=3, lines=lines, cards=chat_cards(run)))
    if answers := answer_cards(run):
        title = "Right and wrong answers of each task, chosen by position"
        found.append(Section(title=title, level=3, cards=answers))
    return found


def _curve_lines(run: Run) -> list[str]:
    lines = []
    for curve in run.curves:
        for name, points in curve.losses.items():
            (first, start), (last, end) = points[0], points[-1]
            lines.append(f"{curve.stage}, {name}: {start:.3f} at step {first}, {end:.3f} at step {last}")
    return lines


def _inline(text: str) -> str:
    return " ".join(text.split())
