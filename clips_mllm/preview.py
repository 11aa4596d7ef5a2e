"""`clips-mllm data preview`: show samples as the model reads them, with supervised tokens marked.

clips-mllm data preview rows.json --images images --model llava-hf/llava-1.5-7b-hf
clips-mllm data preview rows.json --images images --model lmsys/vicuna-7b-v1.5 --template vicuna_v1 --output p.html
"""

from __future__ import annotations

import base64
import dataclasses
import html
import io
import logging
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from clips_mllm.checks.recipe import PreviewRecipe
from vision_tower.common.errors import run_command
from vision_tower.common.recipe import parse_recipe

if TYPE_CHECKING:
    from clips_mllm.checks.display import TokenSpan

THUMBNAIL = 320  # pixels of the longer side, in the HTML page

logger = logging.getLogger(__name__)

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
class PreviewSample:
    """One sample of the preview.

    Attributes:
        title: row number.
        counts: numbers of tokens and images, as text.
        spans: its tokens.
        images: JPEG thumbnails.
        error: reason why the sample cannot be used; empty if it can.
    """

    title: str
    counts: str = ""
    spans: list[TokenSpan] = dataclasses.field(default_factory=list)
    images: list[bytes] = dataclasses.field(default_factory=list)
    error: str = ""


def main(argv: list[str]) -> None:
    """Print the samples, or write the HTML page."""
    recipe = parse_recipe(PreviewRecipe, argv, command="data preview", positional=("file",))
    recipe.check()

    from clips_mllm.checks.display import as_text
    from vision_tower.common.files import write_text

    if recipe.output is not None:
        write_text(Path(recipe.output), page(recipe.file, list(samples(recipe))))
        logger.info("preview in %s", recipe.output)
        return
    color = sys.stdout.isatty()
    for sample in samples(recipe):
        print(f"--- {sample.title}: {sample.error or sample.counts}")
        print(as_text(sample.spans, color))
    logger.info("supervised tokens are %s", "green" if color else "between ⟦ and ⟧")


def samples(recipe: PreviewRecipe) -> Iterator[PreviewSample]:
    """Yield samples that are evenly spaced over the usable rows of the file."""
    from clips_mllm.checks.display import token_spans
    from clips_mllm.checks.rendering import open_renderer
    from clips_mllm.data.row_store import RowStore, report_skipped
    from clips_mllm.prompts.conversation import IGNORED, IMAGE, Unsupervised

    renderer = open_renderer(recipe)
    store = RowStore(recipe.source)
    report_skipped(store, max_bad_fraction=1.0)
    image_id = renderer.tokenizer.convert_tokens_to_ids(IMAGE)
    count = min(recipe.count, len(store))
    for at in (number * len(store) // count for number in range(count)):
        example = store.example(at)
        title = f"row {store.number(at)}"
        try:
            images = [_thumbnail(store.image(at, name)) for name in example.images]
            rendered = renderer(example)
        except (Unsupervised, OSError, ValueError) as error:
            yield PreviewSample(title, error=str(error))
            continue
        supervised = sum(label != IGNORED for label in rendered.labels)
        cut = f", cut from {rendered.full_length}" if rendered.full_length > len(rendered.ids) else ""
        counts = f"{len(rendered.ids)} tokens{cut}, {supervised} supervised, {len(images)} images"
        spans = token_spans(rendered.ids, rendered.labels, renderer.tokenizer, image_id)
        yield PreviewSample(title, counts, spans, images)


def page(title: str, samples: list[PreviewSample]) -> str:
    """Return the preview as a self-contained HTML page."""
    articles = "\n".join(map(_article, samples))
    return (
        f"<!doctype html>\n<html lang='en'><meta charset='utf-8'><title>{html.escape(title)}</title>"
        f"<style>{STYLE}</style>\n<h1>{html.escape(title)}</h1>\n"
        f"<p>Supervised tokens are <mark>marked</mark>; the model predicts these and is given the others.</p>\n"
        f"{articles}\n</html>\n"
    )


def _article(sample: PreviewSample) -> str:
    images = "".join(
        f"<img alt='image' src='data:image/jpeg;base64,{base64.b64encode(content).decode()}'>"
        for content in sample.images
    )
    counts = f"<p class='bad'>{html.escape(sample.error)}</p>" if sample.error else f"<small>{sample.counts}</small>"
    return (
        f"<article><h3>{sample.title}</h3>{counts}<div>{images}</div>"
        f"<pre>{''.join(map(_span, sample.spans))}</pre></article>"
    )


def _span(span: TokenSpan) -> str:
    text = html.escape(span.text)
    if span.image_tokens:
        return f"<span class='image'>{text}</span>"
    return f"<mark>{text}</mark>" if span.supervised else text


def _thumbnail(content: bytes) -> bytes:
    """Return the image as a small JPEG. Raises BadImage."""
    from vision_tower.data.images import decode_image

    image = decode_image(content, min_size=THUMBNAIL)
    image.thumbnail((THUMBNAIL, THUMBNAIL))
    out = io.BytesIO()
    image.save(out, "JPEG", quality=85)
    return out.getvalue()


if __name__ == "__main__":
    sys.exit(run_command(main))
