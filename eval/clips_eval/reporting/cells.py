"""What the report's tables are made of: columns, rows, and how a number is shown.

Scores are shown in per cent. Rows of kind "paper" and columns with `paper=True` hold the CLIPS paper's numbers.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

MISSING = "not measured"
NONE = "–"


@dataclass(frozen=True, kw_only=True)
class Column:
    """A heading; `paper` marks the column's numbers as the paper's."""

    name: str
    paper: bool = False


@dataclass(frozen=True, kw_only=True)
class Row:
    """Cells as shown; `kind` says whose they are."""

    cells: list[str]
    kind: str = "ours"  # ours | control | paper


@dataclass(frozen=True, kw_only=True)
class Table:
    """One table; `notes` are the sentences below it."""

    columns: list[Column]
    rows: list[Row]
    notes: list[str] = field(default_factory=list)


def plain_table(names: Sequence[str], rows: Iterable[Sequence[str]], notes: Sequence[str] = ()) -> Table:
    """Headings and cells of this run's alone."""
    columns = [Column(name=name) for name in names]
    return Table(columns=columns, rows=[Row(cells=list(cells)) for cells in rows], notes=list(notes))


def percent(share: float | None) -> str:
    """A fraction in per cent with one decimal; the mark for a missing number if None."""
    return MISSING if share is None else f"{100 * share:.1f}"


def duration(seconds: float) -> str:
    """Seconds as people read them: 42 s, 3 min 05 s, 1 h 02 min."""
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.0f} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def interval(ends: tuple[float, float] | None) -> str:
    """The ends in per cent, or a dash where they are not known."""
    return NONE if ends is None else f"{100 * ends[0]:.1f}–{100 * ends[1]:.1f}"


def count(n: int | None) -> str:
    """A whole number with thousands separated; a dash if None."""
    return NONE if n is None else f"{n:,}"


def number(value: float | None) -> str:
    """A number in its own unit with one decimal; a dash if None."""
    return NONE if value is None else f"{value:,.1f}"
