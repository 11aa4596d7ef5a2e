"""Example cards for the report: right and wrong answers, retrievals, chat. Chosen by position, not by hand."""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass, field
from pathlib import Path

from clips_eval.reporting.benchmarks import Sample
from clips_eval.reporting.read import Run

PER_TASK = 2  # right answers, and as many wrong ones
SIDE = 160  # longer side of a thumbnail, in pixels


@dataclass(frozen=True, kw_only=True)
class Mark:
    """One answer of a card: a text or an image. `correct` is None if it was not judged."""

    text: str = ""
    image: str | None = None
    correct: bool | None = None


@dataclass(frozen=True, kw_only=True)
class Card:
    """A query with its answers. Images are data URIs, or None if the file is missing."""

    title: str = ""
    text: str = ""
    image: str | None = None
    has_image: bool = True
    target: str = ""
    marks: list[Mark] = field(default_factory=list)


def answer_cards(run: Run) -> list[Card]:
    """Return right and wrong answers of each task, evenly spaced, preferring samples with a saved image."""
    samples = run.lmms.samples if run.lmms else []
    cards = []
    for task in dict.fromkeys(sample.task for sample in samples):
        for correct in (True, False):
            group = [sample for sample in samples if sample.task == task and sample.correct is correct]
            # The evaluation saves only a few images; a task without any is shown as text.
            group = [sample for sample in group if sample.image is not None] or group
            cards += [_answer_card(sample) for sample in _evenly(group, PER_TASK)]
    return cards


def _answer_card(sample: Sample) -> Card:
    return Card(
        title=sample.task.removeprefix("clips_"),
        text=_question(sample.prompt),
        image=thumbnail(sample.image),
        has_image=sample.image is not None,
        target="" if sample.correct else sample.target,
        marks=[Mark(text=sample.answer.strip() or "(empty)", correct=sample.correct)],
    )


def retrieval_cards(run: Run) -> tuple[list[Card], list[Card]]:
    """Return (cards of text queries with retrieved images, cards of image queries with retrieved texts)."""
    if run.retrieval is None:
        return [], []
    folder, examples = run.retrieval.folder, run.retrieval.examples
    by_text = [
        Card(
            text=str(row["query"]),
            has_image=False,
            marks=[
                Mark(image=thumbnail(folder / name), correct=bool(good))
                for name, good in zip(row["images"], row["correct"], strict=False)
            ],
        )
        for row in examples["text_to_image"]
    ]
    by_image = [
        Card(
            image=thumbnail(folder / row["query"]),
            marks=[
                Mark(text=str(text), correct=bool(good))
                for text, good in zip(row["texts"], row["correct"], strict=False)
            ],
        )
        for row in examples["image_to_text"]
    ]
    return by_text, by_image


def chat_cards(run: Run) -> list[Card]:
    """Return the example questions of `clips-mllm chat --examples` with their answers, not judged."""
    return [
        Card(
            text=row.question,
            image=thumbnail(row.image),
            has_image=row.image is not None,
            marks=[Mark(text=row.answer.strip() or "(empty)")],
        )
        for row in run.chat
    ]


def thumbnail(file: Path | None) -> str | None:
    """Return a small WebP as a data URI, or None if the file is missing or not an image."""
    from PIL import Image

    if file is None or not file.is_file():
        return None
    try:
        with Image.open(file) as image:
            small = image.convert("RGB")
    except (OSError, SyntaxError, ValueError):
        return None
    small.thumbnail((SIDE, SIDE))
    stream = io.BytesIO()
    small.save(stream, format="WEBP", quality=80, method=6)
    return "data:image/webp;base64," + base64.b64encode(stream.getvalue()).decode()


def _question(prompt: str) -> str:
    """Return the question without image placeholders and without the final "Answer …" instruction."""
    lines = [line.strip() for line in prompt.replace("<image>", "").strip().splitlines()]
    while len(lines) > 1 and (not lines[-1] or lines[-1].startswith("Answer ")):
        lines.pop()
    return "\n".join(lines)


def _evenly(group: list[Sample], count: int) -> list[Sample]:
    places = {(2 * i + 1) * len(group) // (2 * count) for i in range(count)} if group else set()
    return [group[place] for place in sorted(places)]
