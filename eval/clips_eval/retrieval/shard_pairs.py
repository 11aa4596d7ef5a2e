"""Retrieval data as WebDataset tars or Parquet files: a row is an image with its captions.

pattern --> shards --> rows, read once, one after the other --> pairs
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from vision_tower.common.errors import UserError
from vision_tower.data.image_batches import Pair, SkipCounter
from vision_tower.data.pairs import BadSample, read_fields, read_image
from vision_tower.data.recipe import SourceRecipe
from vision_tower.data.shards import BadShard, Row, find_shards, is_remote, read_shard


def count_pairs(pattern: str) -> int | None:
    """How many rows there are; None where a shard is remote and counting would fetch it.

    Raises:
        UserError: no such shard, or a broken one.
    """
    shards = find_shards(pattern)
    if any(is_remote(shard) for shard in shards):
        return None
    return sum(1 for shard in shards for _ in _rows(shard, frozenset()))


def stream_pairs(pattern: str, image: str, caption: str, skips: SkipCounter) -> Iterator[Pair]:
    """The rows that have an image and a caption; others are counted in `skips`.

    A caption field may be one text or a list of texts; a text that is a member of its own in a tar has a caption in
    each line, as CLIP_benchmark writes them.

    Args:
        image: column, or ending in a tar; png, jpg, jpeg and webp are found without it.
        caption: column; in a tar a key of the json, or an ending such as txt.
    Raises:
        UserError: no such shard, a broken one (a part of a benchmark gives no comparable score), or a first row without
            the caption's column.
    """
    source = SourceRecipe(shards=pattern, image=image, web_caption=caption, synthetic_caption=caption)
    for number, shard in enumerate(find_shards(pattern)):
        for row in _rows(shard, source.names):
            name = f"{shard}: {row.key}"
            try:
                fields = read_fields(row)
                if caption not in fields:
                    if number == row.index == 0:
                        raise UserError(
                            f"no '{caption}' in the first row", file=name, remedy="choose with --caption_column"
                        )
                    raise BadSample(f"no '{caption}'")
                yield Pair(name=name, content=read_image(row, source), texts=_captions(fields[caption]))
            except BadSample as error:
                skips.skip(name, str(error))


def _rows(shard: str, names: frozenset[str]) -> Iterator[Row]:
    try:
        yield from read_shard(shard, names, lambda _: True)
    except BadShard as error:
        raise UserError(f"{error.cause} ({error})", file=shard, remedy="fetch the shard again") from error


def _captions(given: Any) -> tuple[str, ...]:
    if isinstance(given, bytes):
        given = given.decode("utf-8", errors="replace").splitlines()
    texts = given if isinstance(given, list) else [given]
    found = tuple(text for text in texts if isinstance(text, str) and text.strip())
    if not found:
        raise BadSample("no caption")
    return found
