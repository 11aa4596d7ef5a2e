"""easy-VQA (a third-party benchmark): questions, images, and captions made of its training answers.

Also generated geometric images of the same kind, because easy-VQA's 4,000 training images are too few to train a tower
from scratch.
"""

from __future__ import annotations

import dataclasses
import json
import random
import re
from pathlib import Path

from clips_mllm.sample.objects import render_svg

SIDE = 96  # pixels of a generated image
COLORS = ("red", "lime", "blue", "yellow", "black", "gray", "teal", "brown")
SPOKEN_COLORS = {"lime": "green"}  # easy-VQA's green is SVG's lime
_COLOR_QUESTION = re.compile(r"what (color is|is the color of)")
_SHAPE_QUESTION = re.compile(r"what (shape|is the \w+ shape)")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ShapeImage:
    """An easy-VQA image with its (question, answer) pairs in the package's order."""

    image_id: int
    file: Path
    questions: tuple[tuple[str, str], ...]

    @property
    def color(self) -> str | None:
        """Color, if an answer contains it."""
        return next((answer for question, answer in self.questions if _COLOR_QUESTION.match(question)), None)

    @property
    def shape(self) -> str | None:
        """Shape, if an answer contains it."""
        return next((answer for question, answer in self.questions if _SHAPE_QUESTION.match(question)), None)


def load_shapes(split: str) -> list[ShapeImage]:
    """Return the images of easy-VQA's `train` or `test` split, ordered by image id."""
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
    """Return True if the answer is a shape or a color, not yes or no."""
    return answer not in ("yes", "no")


def shape_captions(image: ShapeImage, rng: random.Random) -> tuple[str, str] | None:
    """Return (web caption, synthetic caption) of an image, or None if its color or shape is unknown."""
    if image.color is None or image.shape is None:
        return None
    return caption_shape(image.color, image.shape, rng)


def caption_shape(color: str, shape: str, rng: random.Random) -> tuple[str, str]:
    """Return (web caption, synthetic caption) of a colored shape."""
    name = f"{color} {shape}"
    web = rng.choice((f"{name}", f"{name} clipart", f"geometric {shape}", f"{color} {shape} icon", "untitled"))
    sentences = [f"The shape is {color}.", f"There is one {shape}.", f"The {shape} is {color}."]
    rng.shuffle(sentences)
    first = rng.choice((f"The picture shows a {name}.", f"A drawing of a {name} on a light background."))
    return web, " ".join([first, *sentences])


def draw_shape(seed: int, index: int) -> tuple[bytes, str, str]:
    """Return (PNG, color, shape) of generated image number `index`: a shape on a light background."""
    rng = random.Random(f"{seed}/shapes/{index}")
    color = rng.choice(COLORS)
    width, height = rng.uniform(12, 48), rng.uniform(12, 48)
    left, top = rng.uniform(0, SIDE - width), rng.uniform(0, SIDE - width)
    match shape := rng.choice(("circle", "rectangle", "triangle")):
        case "circle":
            radius = width / 2
            figure = f'<circle cx="{left + radius}" cy="{top + radius}" r="{radius}" fill="{color}"/>'
        case "rectangle":
            top = rng.uniform(0, SIDE - height)
            figure = f'<rect x="{left}" y="{top}" width="{width}" height="{height}" fill="{color}"/>'
        case _:
            bottom = top + width * 0.87
            corners = f"{left},{bottom} {left + width},{bottom} {left + width / 2},{top}"
            figure = f'<polygon points="{corners}" fill="{color}"/>'
    light = ",".join(str(rng.randint(228, 255)) for _ in range(3))
    ground = f'<rect width="{SIDE}" height="{SIDE}" fill="rgb({light})"/>'
    svg = f'<svg xmlns="http://www.w3.org/2000/svg" width="{SIDE}" height="{SIDE}">{ground}{figure}</svg>'
    return render_svg(svg), SPOKEN_COLORS.get(color, color), shape
