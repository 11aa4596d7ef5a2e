"""easy-VQA, the third-party benchmark: its questions, its pictures, and captions made of its training answers."""

from __future__ import annotations

import dataclasses
import json
import random
import re
from pathlib import Path

SHAPES = ("circle", "rectangle", "triangle")
_COLOR_QUESTION = re.compile(r"what (color is|is the color of)")
_SHAPE_QUESTION = re.compile(r"what (shape|is the \w+ shape)")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ShapeImage:
    """One easy-VQA picture with its (question, answer) pairs in the package's order."""

    image_id: int
    file: Path
    questions: tuple[tuple[str, str], ...]

    @property
    def color(self) -> str | None:
        """The colour, where one of the questions tells it."""
        return next((answer for question, answer in self.questions if _COLOR_QUESTION.match(question)), None)

    @property
    def shape(self) -> str | None:
        """The shape, where one of the questions tells it."""
        return next((answer for question, answer in self.questions if _SHAPE_QUESTION.match(question)), None)


def load_shapes(split: str) -> list[ShapeImage]:
    """The pictures of easy-VQA's own `train` or `test` split, by image id."""
    import easy_vqa

    folder = Path(easy_vqa.__file__).parent / "data" / split
    questions: dict[int, list[tuple[str, str]]] = {}
    for question, answer, image_id in json.loads((folder / "questions.json").read_text()):
        questions.setdefault(image_id, []).append((question, answer))
    return [
        ShapeImage(image_id=image_id, file=folder / "images" / f"{image_id}.png", questions=tuple(pairs))
        for image_id, pairs in sorted(questions.items())
    ]


def is_open(answer: str) -> bool:
    """Whether a question asks for the shape or the colour rather than for yes or no."""
    return answer not in ("yes", "no")


def shape_captions(image: ShapeImage, rng: random.Random) -> tuple[str, str] | None:
    """(web caption, synthetic caption) of a picture whose colour and shape are told, else None."""
    if image.color is None or image.shape is None:
        return None
    name = f"{image.color} {image.shape}"
    web = rng.choice((f"{name}", f"{name} clipart", f"geometric {image.shape}", f"{image.color} icon", "untitled"))
    sentences = [f"The shape is {image.color}.", f"There is one {image.shape}.", "The background is light and grainy."]
    rng.shuffle(sentences)
    first = rng.choice((f"The picture shows a {name}.", f"A drawing of a {name} on a light background."))
    return web, " ".join([first, *sentences])
