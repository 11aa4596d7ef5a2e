"""Scenes: one to four objects on a 3 x 3 grid over a colored background, drawn from a seed and rendered.

A scene is a pure function of (seed, split, index); each split has its own random stream.
Objects have different frequencies and appear with objects of their theme, so that POPE's popular and adversarial
negatives differ from random ones.
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
CELL = 32  # pixels: a multiple of the quickstart's patch size, so that an object covers whole patches
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
    """An object in its cell. `row` and `column` start at the top left; `pixels` is its side, `shift` its offset."""

    short: str
    row: int
    column: int
    size: str
    pixels: int
    shift: tuple[int, int]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scene:
    """Contents of an image. `things` are in row-major order."""

    key: str
    background: str
    things: tuple[Thing, ...]


def draw_scene(seed: int, split: str, index: int, *, min_things: int = 1, max_things: int = 4) -> Scene:
    """Draw scene number `index` of a split."""
    rng = random.Random(f"{seed}/{split}/{index}")
    count = rng.randint(min_things, max_things)
    cells = sorted(rng.sample(range(GRID * GRID), count))
    things = tuple(_draw_thing(rng, short, cell) for short, cell in zip(_draw_objects(rng, count), cells, strict=True))
    return Scene(key=f"{split}-{index:06d}", background=rng.choice(sorted(BACKGROUNDS)), things=things)


def _draw_objects(rng: random.Random, count: int) -> list[str]:
    home = rng.choice(sorted(THEMES))
    chosen: list[str] = []
    while len(chosen) < count:
        theme = home if rng.random() < 0.5 else rng.choice(sorted(THEMES))
        members = THEMES[theme]
        # The first object of a theme is about twice as frequent as the last.
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
    """Return the RGB image of `IMAGE` x `IMAGE` pixels."""
    from PIL import Image

    image = Image.new("RGBA", (IMAGE, IMAGE), (*BACKGROUNDS[scene.background], 255))
    for thing in scene.things:
        margin = (CELL - thing.pixels) // 2
        left = thing.column * CELL + margin + thing.shift[0]
        top = thing.row * CELL + margin + thing.shift[1]
        image.alpha_composite(glyph(thing.short, thing.pixels), (max(left, 0), max(top, 0)))
    return image.convert("RGB")


def png_bytes(image: Image.Image) -> bytes:
    """Encode an image; the same pixels give the same bytes."""
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", compress_level=3)
    return buffer.getvalue()
