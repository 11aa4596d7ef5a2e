"""What the doctor looks at, a chunk at a time and in any process: rows, their images, their tokens.

chunk of rows --to_example--> conversation --decode--> images --render--> tokens --> a Verdict each
shard         --read_shard--> pair         --decode--> image                     --> a Verdict each
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clips_mllm.checks.recipe import RenderRecipe
from clips_mllm.data.llava_json import BadRow, Example, image_bytes, to_example
from clips_mllm.data.row_checks import MISSING, find_images, row_name
from clips_mllm.prompts.conversation import IGNORED, Unsupervised
from vision_tower.data.images import BadImage, decode_image
from vision_tower.data.recipe import SourceRecipe

if TYPE_CHECKING:
    from clips_mllm.checks.rendering import Renderer

CORRUPT = "corrupt image"
UNSUPERVISED = "nothing to learn"
GIF = "GIF, of which the first frame is taken"

_renderer: Renderer | None = None  # one a process; tokenizers do not travel between processes cheaply


@dataclasses.dataclass
class Verdict:
    """What was found of a row.

    Attributes:
        number: of the row in the source, or in its shard.
        name: the row's id or key.
        cause: why it cannot be used; empty where it can.
        detail: the file or the error behind the cause.
        mended: what loading puts right, or passes over, in it.
        files: its images, where a file of another name stands in for a missing one.
        images: images.
        tokens, learnt: positions in the sequence, and supervised ones; 0 without a tokenizer.
        whole: positions before the cut at max_length.
    """

    number: int
    name: str = ""
    cause: str = ""
    detail: str = ""
    mended: tuple[str, ...] = ()
    files: list[str] | None = None
    images: int = 0
    tokens: int = 0
    learnt: int = 0
    whole: int = 0


def start(render: RenderRecipe | None) -> None:
    """Once in every process, before `check_chunk`."""
    global _renderer
    if render is not None:
        from clips_mllm.checks.rendering import open_renderer

        _renderer = open_renderer(render)
    else:
        _renderer = None


def check_chunk(chunk: tuple[Path, int, Sequence[Any]]) -> list[Verdict]:
    """The rows of a source of conversations from a number on.

    Args:
        chunk: folder of the images, number of the first row, the rows.
    """
    folder, begin, rows = chunk
    return [_check_row(row, number, folder) for number, row in enumerate(rows, start=begin)]


def _check_row(row: Any, number: int, folder: Path) -> Verdict:
    verdict = Verdict(number, row_name(row))
    try:
        example = to_example(row)
        found = find_images(example, folder)
        verdict.mended, verdict.images = found.mended, len(found.images)
        if found.images != example.images:
            verdict.files = [str(name) for name in found.images]
        _check_images(verdict, row, found, folder)
        if _renderer is not None:
            rendered = _renderer(found)
            verdict.tokens, verdict.whole = len(rendered.ids), rendered.whole
            verdict.learnt = sum(label != IGNORED for label in rendered.labels)
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
        decode_image(content, min_size=1)  # a JPEG's every block is read, but at an eighth of the size
    except BadImage as error:
        raise BadImage(f"{name}: {error}") from error
    if content.startswith(b"GIF8"):
        verdict.mended = (*verdict.mended, GIF)


def check_shard(given: tuple[str, SourceRecipe]) -> list[Verdict]:
    """The pairs of a pretraining shard; one that cannot be read to its end has a last verdict that says so."""
    from vision_tower.data.pairs import BadSample, read_captions, read_image
    from vision_tower.data.shards import BadShard, read_shard

    shard, source = given
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
