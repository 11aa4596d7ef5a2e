"""Tables of the report: columns, rows and number formatting.

Scores are shown in percent. Rows of kind "paper" and columns with `paper=True` hold numbers of the CLIPS paper.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

MISSING = "not measured"
NONE = "–"


@dataclass(frozen=True, kw_only=True)
class Column:
    """A table column; `paper` marks its numbers as those of the CLIPS paper."""

    name: str
    paper: bool = False


@dataclass(frozen=True, kw_only=True)
class Row:
    """A table row of formatted cells. `kind` is "ours", "control" or "paper"."""

    cells: list[str]
    kind: str = "ours"


@dataclass(frozen=True, kw_only=True)
class Table:
    """A table with footnotes."""

    columns: list[Column]
    rows: list[Row]
    notes: list[str] = field(default_factory=list)


def plain_table(names: Sequence[str], rows: Iterable[Sequence[str]], notes: Sequence[str] = ()) -> Table:
    """Build a table without the paper's numbers."""
    columns = [Column(name=name) for name in names]
    return Table(columns=columns, rows=[Row(cells=list(cells)) for cells in rows], notes=list(notes))


def percent(share: float | None) -> str:
    """Format a fraction as percent with one decimal, or MISSING for None."""
    return MISSING if share is None else f"{100 * share:.1f}"


def duration(seconds: float) -> str:
    """Format seconds: 42 s, 3 min 05 s, 1 h 02 min."""
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.0f} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def interval(ends: tuple[float, float] | None) -> str:
    """Format an interval in percent, or a dash for None."""
    return NONE if ends is None else f"{100 * ends[0]:.1f}–{100 * ends[1]:.1f}"


def count(n: int | None) -> str:
    """Format an integer with thousands separators, or a dash for None."""
    return NONE if n is None else f"{n:,}"


def number(value: float | None) -> str:
    """Format a number in its own unit with one decimal, or a dash for None."""
    return NONE if value is None else f"{value:,.1f}"
