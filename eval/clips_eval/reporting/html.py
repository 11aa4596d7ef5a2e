"""Render report sections as one self-contained HTML file, without scripts or requests."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from html import escape

from clips_eval.reporting.cells import MISSING, NONE, Table, duration, percent
from clips_eval.reporting.gallery import Card, Mark
from clips_eval.reporting.numbers import numbers
from clips_eval.reporting.plots import Plot
from clips_eval.reporting.read import Run
from clips_eval.reporting.sections import Section
from clips_eval.reporting.tables import PAPER_NOTE


def render(title: str, lead: str, sections: Sequence[Section], *, tiles: str = "", foot: str = "") -> str:
    """Return the HTML page."""
    from importlib.resources import files

    css = (files("clips_eval.reporting") / "data" / "report.css").read_text(encoding="utf-8")
    parts = [f'<h1>{escape(title)}</h1>\n<p class="lead">{_code(lead)}</p>', tiles, *map(_section, sections)]
    if foot:
        parts.append(f'<p class="note">{escape(foot)}</p>')
    body = "\n".join(part for part in parts if part)
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>\n{css}</style>\n</head>\n<body>\n<main>\n{body}\n</main>\n</body>\n</html>\n"
    )


def _section(section: Section) -> str:
    """Render a section; `lines` are the text fallback and are left out when plots or cards show the same."""
    parts = [f"<h{section.level}>{escape(section.title)}</h{section.level}>"]
    if section.table:
        parts.append(_table(section.table))
    if section.plots:
        parts.append(_plots(section.plots))
    if section.cards:
        parts.append(_cards(section.cards, kind="cards two" if section.wide else "cards"))
    if section.lines and not (section.plots or section.cards):
        items = "".join(f"<li>{_code(line)}</li>" for line in section.lines)
        parts.append(f'<ul class="missing">{items}</ul>')
    return "\n".join(parts)


def run_tiles(run: Run) -> str:
    """Headline numbers of a run as tiles."""
    tree = numbers(run)
    recall, easy = tree["encoder"]["retrieval"], tree["mllm"]["easy_vqa"]
    pope = tree["mllm"]["pope_random"]
    control = easy["shuffled_accuracy"] if easy else None
    gain = f", {100 * (easy['accuracy'] - control):+.1f} points over shuffled" if easy and control is not None else ""
    tiles = [
        (recall and percent(recall["i2t_r5"]) + " %", "image to text, R@5"),
        (recall and percent(recall["t2i_r5"]) + " %", "text to image, R@5"),
        (easy and percent(easy["accuracy"]) + " %", f"easy-VQA accuracy{gain}"),
        (pope and percent(pope["accuracy"]) + " %", "POPE accuracy, random split"),
        (run.steps and _minutes(sum(step.seconds for step in run.steps)), f"for {len(run.steps)} steps"),
    ]
    cells = [
        f'<div class="tile"><b{"" if value else " class=none"}>{escape(str(value or MISSING))}</b>'
        f"<span>{escape(label)}</span></div>"
        for value, label in tiles
    ]
    return f'<div class="tiles">{"".join(cells)}</div>'


def _minutes(seconds: float) -> str:
    return f"{seconds / 60:.0f} min" if seconds >= 90 else duration(seconds)


def _table(table: Table) -> str:
    """Render a table. The paper's rows and columns get a text tag in addition to their color."""
    kind = "steps" if table.columns[-1].name == "Command" else ""
    tag = '<span class="tag">paper</span>'
    head = "".join(
        f'<th scope="col"{" class=paper" if column.paper else ""}>{escape(column.name)}{tag * column.paper}</th>'
        for column in table.columns
    )
    rows = []
    for row in table.rows:
        cells = [f'<th scope="row">{escape(row.cells[0])}{tag if row.kind == "paper" else ""}</th>']
        for place, (cell, column) in enumerate(zip(row.cells[1:], table.columns[1:], strict=True)):
            classes = ["paper"] * column.paper + ["none"] * (cell in (MISSING, NONE)) + ["main"] * (place == 0)
            text = f"<code>{escape(cell)}</code>" if column.name == "Command" else escape(cell)
            cells.append(f'<td class="{" ".join(classes)}">{text}</td>')
        rows.append(f'<tr class="{row.kind}">{"".join(cells)}</tr>')
    notes = "".join(
        f'<p class="note{" paper" if note.startswith(PAPER_NOTE) else ""}">{escape(note)}</p>' for note in table.notes
    )
    body = f"<thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody>"
    return f'<div class="scroll" tabindex="0"><table class="{kind}">{body}</table></div>{notes}'


def _plots(plots: list[Plot]) -> str:
    figures = [
        f"<figure><figcaption>{escape(plot.title)}</figcaption><picture>"
        f'<source media="(prefers-color-scheme: dark)" srcset="{_uri(plot.dark)}">'
        f'<img src="{_uri(plot.light)}" alt="{escape(plot.summary)}"></picture></figure>'
        for plot in plots
    ]
    kind = "plots one" if len(figures) == 1 else "plots"
    return f'<div class="{kind}">{"".join(figures)}</div>'


def _uri(svg: str) -> str:
    return "data:image/svg+xml;base64," + base64.b64encode(svg.encode()).decode()


def _cards(cards: list[Card], *, kind: str) -> str:
    return f'<div class="{kind}">{"".join(_card(card) for card in cards)}</div>'


def _card(card: Card) -> str:
    text = f'<p class="kind">{escape(card.title)}</p>' if card.title else ""
    text += f"<p>{escape(card.text)}</p>" if card.text else ""
    if any(mark.image or not mark.text for mark in card.marks):  # retrieved images
        strip = "".join(_image(mark.image, mark.correct) for mark in card.marks)
        return f'<div class="card wide">{text}<div class="strip">{strip}</div></div>'
    image = _image(card.image, None) if card.has_image else ""
    return f'<div class="card">{image}<div>{text}{_answers(card)}</div></div>'


def _answers(card: Card) -> str:
    if len(card.marks) > 1:
        items = "".join(
            f'<li class="good">{escape(mark.text)} ✓</li>' if mark.correct else f"<li>{escape(mark.text)}</li>"
            for mark in card.marks
        )
        return f"<ol>{items}</ol>"
    return "".join(_verdict(mark, card.target) for mark in card.marks)


def _verdict(mark: Mark, target: str) -> str:
    if mark.correct is None:
        return f"<p><strong>{escape(mark.text)}</strong></p>"
    sign, kind = ("✓", "good") if mark.correct else ("✗", "bad")
    wanted = f" (right: {escape(target)})" if target else ""
    return f'<p><strong class="{kind}">{sign} {escape(mark.text)}</strong>{wanted}</p>'


def _image(uri: str | None, correct: bool | None) -> str:
    good = " good" if correct else ""
    if uri is None:
        return f'<span class="gone{good}">image not kept</span>'
    alt = "the right image" if correct else "image"
    return f'<img class="pic{good}" src="{uri}" alt="{alt}">'


def _code(text: str) -> str:
    """Escape text and turn `backticks` into <code>."""
    parts = escape(text).split("`")
    return "".join(f"<code>{part}</code>" if place % 2 else part for place, part in enumerate(parts))
