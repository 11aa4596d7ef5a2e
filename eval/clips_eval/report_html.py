"""report.html: one file that opens from disk, without scripts and without a single request."""

from __future__ import annotations

import base64
from html import escape
from typing import Any

from clips_eval.report_against import against_table
from clips_eval.report_cells import MISSING, NONE, Table, duration, percent
from clips_eval.report_gallery import Card, Mark, answer_cards, chat_cards, retrieval_cards
from clips_eval.report_mllm import mllm_table
from clips_eval.report_numbers import numbers
from clips_eval.report_plots import Plot, benchmark_plot, curve_plots, inverse_plot, retrieval_plot
from clips_eval.report_read import Run
from clips_eval.report_tables import (
    PAPER_NOTE,
    embedding_table,
    load_paper,
    missing_parts,
    provenance_table,
    retrieval_table,
    steps_table,
    zeroshot_table,
)


def render(run: Run, against: dict[str, Any] | None = None) -> str:
    """The whole page."""
    from importlib.resources import files

    css = (files("clips_eval") / "data" / "report.css").read_text(encoding="utf-8")
    title = f"clips-mllm: {run.root.resolve().name}"
    body = "\n".join([_head(title), _tiles(run), _encoder(run), _mllm(run)])
    body += "\n".join([_against(against), _training(run), _steps(run), _provenance(run), _missing(run)])
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>\n{css}</style>\n</head>\n<body>\n<main>\n{body}\n</main>\n</body>\n</html>\n"
    )


def _head(title: str) -> str:
    lead = "From image-text pairs to answers about pictures: what this run measured, and how to measure it again."
    return f'<h1>{escape(title)}</h1>\n<p class="lead">{lead}</p>'


def _tiles(run: Run) -> str:
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


def _encoder(run: Run) -> str:
    by_text, by_image = retrieval_cards(run)
    parts = [
        "<h2>Encoder: retrieval</h2>",
        _table(retrieval_table(run, load_paper())),
        _plots([retrieval_plot(run), inverse_plot(run)]),
    ]
    if run.retrieval and (further := embedding_table(run.retrieval)):
        parts += ["<h3>Beyond recall</h3>", _table(further)]
    if by_text:
        parts += [
            "<h3>Text to image: the five best pictures, the right one outlined</h3>",
            _cards(by_text, kind="cards two"),
        ]
    if by_image:
        parts += [
            "<h3>Image to text: the five best captions, the picture's own in green, with a tick</h3>",
            _cards(by_image, kind="cards two"),
        ]
    if run.zeroshot:
        parts += ["<h2>Encoder: zero-shot classification</h2>", _table(zeroshot_table(run.zeroshot))]
    return "\n".join(parts)


def _mllm(run: Run) -> str:
    parts = [
        "<h2>Multimodal LLM: benchmarks</h2>",
        _table(mllm_table(run, load_paper())),
        _plots([benchmark_plot(run)]),
    ]
    if chat := chat_cards(run):
        parts += ["<h3>Asked at the end of the run</h3>", _cards(chat)]
    if answers := answer_cards(run):
        parts += [
            "<h3>Right and wrong answers, some of each task, chosen by place and not by hand</h3>",
            _cards(answers),
        ]
    return "\n".join(parts)


def _training(run: Run) -> str:
    return "\n".join(["<h2>Training</h2>", _plots(list(curve_plots(run))) or f'<p class="note">{MISSING}</p>'])


def _steps(run: Run) -> str:
    table = _table(steps_table(run), "steps") if run.steps else f'<p class="note">{MISSING}</p>'
    return f"<h2>Steps</h2>\n{table}"


def _against(against: dict[str, Any] | None) -> str:
    return "" if against is None else f"<h2>Against another run</h2>\n{_table(against_table(against))}"


def _provenance(run: Run) -> str:
    table = provenance_table(run)
    return f"<h2>Provenance</h2>\n{_table(table, 'steps')}" if table.rows else ""


def _missing(run: Run) -> str:
    items = [f"<li>{_code(part)}</li>" for part in missing_parts(run)]
    return f'<h2>Not measured</h2>\n<ul class="missing">{"".join(items)}</ul>' if items else ""


def _table(table: Table, kind: str = "") -> str:
    """Rows and columns of the paper's carry a tag in words, not only a colour."""
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


def _plots(plots: list[Plot | None]) -> str:
    figures = [
        f"<figure><figcaption>{escape(plot.title)}</figcaption><picture>"
        f'<source media="(prefers-color-scheme: dark)" srcset="{_uri(plot.dark)}">'
        f'<img src="{_uri(plot.light)}" alt="{escape(plot.summary)}"></picture></figure>'
        for plot in plots
        if plot is not None
    ]
    kind = "plots one" if len(figures) == 1 else "plots"
    return f'<div class="{kind}">{"".join(figures)}</div>' if figures else ""


def _uri(svg: str) -> str:
    return "data:image/svg+xml;base64," + base64.b64encode(svg.encode()).decode()


def _cards(cards: list[Card], *, kind: str = "cards") -> str:
    return f'<div class="{kind}">{"".join(_card(card) for card in cards)}</div>'


def _card(card: Card) -> str:
    text = f'<p class="kind">{escape(card.title)}</p>' if card.title else ""
    text += f"<p>{escape(card.text)}</p>" if card.text else ""
    if any(mark.picture or not mark.text for mark in card.marks):  # the answers are pictures
        strip = "".join(_picture(mark.picture, mark.correct) for mark in card.marks)
        return f'<div class="card wide">{text}<div class="strip">{strip}</div></div>'
    picture = _picture(card.picture, None) if card.has_picture else ""
    return f'<div class="card">{picture}<div>{text}{_answers(card)}</div></div>'


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


def _picture(uri: str | None, correct: bool | None) -> str:
    good = " good" if correct else ""
    if uri is None:
        return f'<span class="gone{good}">picture not kept</span>'
    alt = "the right picture" if correct else "picture"
    return f'<img class="pic{good}" src="{uri}" alt="{alt}">'


def _code(text: str) -> str:
    """`commands` between backticks as code."""
    parts = escape(text).split("`")
    return "".join(f"<code>{part}</code>" if place % 2 else part for place, part in enumerate(parts))
