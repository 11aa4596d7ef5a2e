"""Checks of the doctor: rows, their images and their tokens, a chunk at a time, in any process.

chunk of rows --to_example--> conversation --decode--> images --render--> tokens --> one Verdict per row
shard         --read_shard--> pair         --decode--> image                     --> one Verdict per pair
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clips_mllm.checks.recipe import DataRecipe
from clips_mllm.data.llava_json import BadRow, Example, image_bytes, to_example
from clips_mllm.data.row_checks import MISSING, find_images, row_name
from clips_mllm.prompts.conversation import IGNORED, Unsupervised
from vision_tower.data.images import BadImage, decode_image
from vision_tower.data.recipe import SourceRecipe

if TYPE_CHECKING:
    from clips_mllm.checks.rendering import Renderer

CORRUPT = "corrupt image"
UNSUPERVISED = "no supervised token"
GIF = "GIF, only the first frame is used"

_renderer: Renderer | None = None  # one per process, since a tokenizer is slow to send to another process


@dataclasses.dataclass
class Verdict:
    """Result of checking a row.

    Attributes:
        number: position in the source, or in the shard.
        name: the row's id or key.
        cause: reason why the row cannot be used; empty if it can.
        detail: file or error behind the cause.
        fixes: problems that loading fixes or ignores.
        files: its image files, if one with another suffix replaces a missing one.
        images: number of images.
        tokens: length after the cut at max_length; 0 without a tokenizer.
        uncut_tokens: length before the cut.
        supervised: number of supervised tokens.
    """

    number: int
    name: str = ""
    cause: str = ""
    detail: str = ""
    fixes: tuple[str, ...] = ()
    files: list[str] | None = None
    images: int = 0
    tokens: int = 0
    uncut_tokens: int = 0
    supervised: int = 0


def start_worker(recipe: DataRecipe) -> None:
    """Load the tokenizer of this process. Must run before `check_chunk`; without a model no tokens are counted."""
    global _renderer
    _renderer = None
    if recipe.model is not None:
        from clips_mllm.checks.rendering import open_renderer

        _renderer = open_renderer(recipe)


def check_chunk(chunk: tuple[Path, int, Sequence[Any]]) -> list[Verdict]:
    """Check consecutive rows.

    Args:
        chunk: folder of the images, number of the first row, the rows.
    """
    folder, begin, rows = chunk
    return [_check_row(row, number, folder) for number, row in enumerate(rows, start=begin)]


def _check_row(row: Any, number: int, folder: Path) -> Verdict:
    verdict = Verdict(number, row_name(row))
    try:
        parsed = to_example(row)
        example = find_images(parsed, folder)
        verdict.fixes, verdict.images = example.repairs, len(example.images)
        if example.images != parsed.images:
            verdict.files = [str(name) for name in example.images]
        _check_images(verdict, row, example, folder)
        if _renderer is not None:
            rendered = _renderer(example)
            verdict.tokens, verdict.uncut_tokens = len(rendered.ids), rendered.full_length
            verdict.supervised = sum(label != IGNORED for label in rendered.labels)
    except BadRow as error:
        verdict.cause = str(error)
    except FileNotFoundError as error:
        verdict.cause, verdict.detail = MISSING, str(error.filename)
    except Unsupervised as error:
        verdict.cause, verdict.detail = UNSUPERVISED, str(error)
    except (BadImage, OSError) as error:
        verdict.cause, verdict.detail = CORRUPT, str(error)
    return verdict


def _check_images(verdict: Verdict, row: dict[str, Any], example: Example, folder: Path) -> None:
    for name in example.images:
        content = (folder / name).read_bytes() if isinstance(name, str) else image_bytes(row, name)
        _check_image(verdict, content, str(folder / name) if isinstance(name, str) else f"image {name}")


def _check_image(verdict: Verdict, content: bytes, name: str) -> None:
    try:
        decode_image(content, min_size=1)  # decodes every block of a JPEG, but at an eighth of the size
    except BadImage as error:
        raise BadImage(f"{name}: {error}") from error
    if content.startswith(b"GIF8"):
        verdict.fixes = (*verdict.fixes, GIF)


def check_shard(task: tuple[str, SourceRecipe]) -> list[Verdict]:
    """Check the pairs of a pretraining shard. If it cannot be read to its end, the last verdict is about the shard."""
    from vision_tower.data.pairs import BadSample, read_captions, read_image
    from vision_tower.data.shards import BadShard, read_shard

    shard, source = task
    verdicts: list[Verdict] = []
    try:
        for row in read_shard(shard, source.names, lambda _: True):
            verdict = Verdict(row.index, row.key, images=1)
            try:
                if not any(read_captions(row, source, random.Random(0))):
                    raise BadSample("no caption")
                _check_image(verdict, read_image(row, source), row.key)
            except BadSample as error:
                verdict.cause = str(error)
            except BadImage as error:
                verdict.cause, verdict.detail = CORRUPT, str(error)
            verdicts.append(verdict)
    except BadShard as error:
        verdicts.append(Verdict(len(verdicts), shard, error.cause, str(error)))
    return verdicts
