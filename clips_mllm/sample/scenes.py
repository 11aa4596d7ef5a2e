"""Scenes: one to four objects on a 3 x 3 grid before a coloured background, drawn from a seed and rendered.

A scene is a pure function of (seed, split, index); the splits' random streams are named, so they never meet.
Objects are drawn theme by theme with uneven frequency, so that POPE's popular and adversarial negatives mean something.
"""

from __future__ import annotations

import dataclasses
import io
import random
from typing import TYPE_CHECKING

from clips_mllm.sample.objects import THEMES, glyph

if TYPE_CHECKING:
    from PIL import Image

GRID = 3
CELL = 32  # pixels: a multiple of the quickstart's patch, so that a small encoder meets an object on whole patches
IMAGE = GRID * CELL
JITTER = 1

BACKGROUNDS: dict[str, tuple[int, int, int]] = {
    "white": (255, 255, 255),
    "gray": (190, 190, 190),
    "pink": (255, 200, 215),
    "blue": (170, 205, 255),
    "green": (180, 235, 180),
    "yellow": (255, 245, 165),
    "orange": (255, 210, 150),
    "purple": (215, 190, 245),
}
ROWS = ("top", "middle", "bottom")
COLUMNS = ("left", "center", "right")
SIZES = {"small": (20, 22), "large": (28, 30)}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Thing:
    """One object in its cell; `row` and `column` count from the top left."""

    short: str
    row: int
    column: int
    size: str
    pixels: int
    shift: tuple[int, int]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scene:
    """What is in an image. `things` are in reading order: left to right, then top to bottom."""

    key: str
    background: str
    things: tuple[Thing, ...]


def draw_scene(seed: int, split: str, index: int, *, fewest: int = 1, most: int = 4) -> Scene:
    """The scene number `index` of a split."""
    rng = random.Random(f"{seed}/{split}/{index}")
    count = rng.randint(fewest, most)
    cells = sorted(rng.sample(range(GRID * GRID), count))
    things = tuple(_draw_thing(rng, short, cell) for short, cell in zip(_draw_objects(rng, count), cells, strict=True))
    return Scene(key=f"{split}-{index:06d}", background=rng.choice(sorted(BACKGROUNDS)), things=things)


def _draw_objects(rng: random.Random, count: int) -> list[str]:
    home = rng.choice(sorted(THEMES))
    chosen: list[str] = []
    while len(chosen) < count:
        theme = home if rng.random() < 0.5 else rng.choice(sorted(THEMES))
        members = THEMES[theme]
        # The first objects of a theme are about twice as frequent as its last.
        weights = [2.0 - position / len(members) for position in range(len(members))]
        short = rng.choices(members, weights)[0]
        if short not in chosen:
            chosen.append(short)
    return chosen


def _draw_thing(rng: random.Random, short: str, cell: int) -> Thing:
    size = rng.choice(sorted(SIZES))
    return Thing(
        short=short,
        row=cell // GRID,
        column=cell % GRID,
        size=size,
        pixels=rng.randint(*SIZES[size]),
        shift=(rng.randint(-JITTER, JITTER), rng.randint(-JITTER, JITTER)),
    )


def render_scene(scene: Scene) -> Image.Image:
    """The image: RGB, `IMAGE` x `IMAGE` pixels."""
    from PIL import Image

    image = Image.new("RGBA", (IMAGE, IMAGE), (*BACKGROUNDS[scene.background], 255))
    for thing in scene.things:
        margin = (CELL - thing.pixels) // 2
        left = thing.column * CELL + margin + thing.shift[0]
        top = thing.row * CELL + margin + thing.shift[1]
        image.alpha_composite(glyph(thing.short, thing.pixels), (max(left, 0), max(top, 0)))
    return image.convert("RGB")


def png_bytes(image: Image.Image) -> bytes:
    """Losslessly encoded, with the same bytes for the same pixels."""
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", compress_level=3)
    return buffer.getvalue()
