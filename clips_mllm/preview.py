"""`clips-mllm data preview`: samples as the model sees them, with what it learns in colour.

clips-mllm data preview rows.json --images images --model runs/quickstart/finetune
clips-mllm data preview rows.json --images images --model lmsys/vicuna-7b-v1.5 --template vicuna_v1 --output p.html
"""

from __future__ import annotations

import base64
import dataclasses
import html
import io
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from clips_mllm.checks.recipe import PreviewRecipe
from vision_tower.common.errors import run_command
from vision_tower.common.recipe import parse_recipe

if TYPE_CHECKING:
    from clips_mllm.checks.display import Piece

THUMBNAIL = 320  # pixels of the longer side, in the page

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #222 }
article { border: 1px solid #ddd; border-radius: 8px; padding: 1rem; margin: 1rem 0 }
pre { white-space: pre-wrap; overflow-wrap: anywhere; font: 14px/1.5 ui-monospace, monospace }
mark { background: #c8f0cd; color: inherit } .image { color: #777 } .bad { color: #b00020 }
img { max-height: 220px; margin-right: .5rem; border-radius: 4px } small { color: #666 }
@media (prefers-color-scheme: dark) {
  body { background: #16181c; color: #ddd } mark { background: #1d5a2a } article { border-color: #444 }
}
"""


@dataclasses.dataclass(frozen=True)
class Shown:
    """A sample of the preview: where it is from, its tokens in runs, its images; or why it cannot be used."""

    place: str
    counts: str
    pieces: list[Piece]
    images: list[bytes]
    fault: str = ""


def main(argv: list[str]) -> None:
    """Show the samples."""
    recipe = parse_recipe(PreviewRecipe, argv, command="data preview", positional=("file",))
    recipe.check()

    from clips_mllm.checks.display import as_text
    from vision_tower.common.files import write_text

    if recipe.output is not None:
        write_text(Path(recipe.output), page(recipe.file, list(samples(recipe))))
        print(f"preview in {recipe.output}", file=sys.stderr)
        return
    color = sys.stdout.isatty()
    for shown in samples(recipe):
        print(f"--- {shown.place}: {shown.fault or shown.counts}")
        print(as_text(shown.pieces, color))
    print("what is learnt is " + ("green" if color else "between ⟦ and ⟧"), file=sys.stderr)


def samples(recipe: PreviewRecipe) -> Iterator[Shown]:
    """Evenly spread over the usable rows of the file."""
    from clips_mllm.checks.display import pieces
    from clips_mllm.checks.rendering import open_renderer
    from clips_mllm.data.row_store import RowStore, say
    from clips_mllm.prompts.conversation import IGNORED, IMAGE, Unsupervised

    renderer = open_renderer(recipe.render)
    store = RowStore(recipe.source)
    say(recipe.source, store.report, len(store), max_bad_fraction=1.0, quiet=False)
    image_id = renderer.tokenizer.convert_tokens_to_ids(IMAGE)
    count = min(recipe.count, len(store))
    for at in (number * len(store) // count for number in range(count)):
        example = store.example(at)
        place = f"row {store.number(at)}"
        try:
            images = [_thumbnail(store.image(at, name)) for name in example.images]
            rendered = renderer(example)
        except (Unsupervised, OSError, ValueError) as error:
            yield Shown(place, "", [], [], str(error))
            continue
        learnt = sum(label != IGNORED for label in rendered.labels)
        cut = f", cut from {rendered.whole}" if rendered.whole > len(rendered.ids) else ""
        counts = f"{len(rendered.ids)} tokens{cut}, {learnt} learnt, {len(images)} images"
        yield Shown(place, counts, pieces(rendered.ids, rendered.labels, renderer.tokenizer, image_id), images)


def page(title: str, shown: list[Shown]) -> str:
    """The preview as HTML that needs no other file."""
    articles = "\n".join(_article(sample) for sample in shown)
    return (
        f"<!doctype html>\n<html lang='en'><meta charset='utf-8'><title>{html.escape(title)}</title>"
        f"<style>{STYLE}</style>\n<h1>{html.escape(title)}</h1>\n"
        f"<p>What the model learns is <mark>marked</mark>; the rest is what it is given.</p>\n{articles}\n</html>\n"
    )


def _article(sample: Shown) -> str:
    images = "".join(
        f"<img alt='image' src='data:image/jpeg;base64,{base64.b64encode(content).decode()}'>"
        for content in sample.images
    )
    said = f"<p class='bad'>{html.escape(sample.fault)}</p>" if sample.fault else f"<small>{sample.counts}</small>"
    return (
        f"<article><h3>{sample.place}</h3>{said}<div>{images}</div>"
        f"<pre>{''.join(map(_piece, sample.pieces))}</pre></article>"
    )


def _piece(piece: Piece) -> str:
    text = html.escape(piece.text)
    if piece.images:
        return f"<span class='image'>{text}</span>"
    return f"<mark>{text}</mark>" if piece.learnt else text


def _thumbnail(content: bytes) -> bytes:
    """A small JPEG. Raises BadImage."""
    from vision_tower.data.images import decode_image

    image = decode_image(content, min_size=THUMBNAIL)
    image.thumbnail((THUMBNAIL, THUMBNAIL))
    out = io.BytesIO()
    image.save(out, "JPEG", quality=85)
    return out.getvalue()


if __name__ == "__main__":
    sys.exit(run_command(main))
