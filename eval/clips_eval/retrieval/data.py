"""Retrieval data other than Karpathy's JSON: CSV, shards, and files with further positives.

    CSV       a header, then one row per caption; rows with the same image belong together
    shards    WebDataset tars or Parquet; a row is an image with its captions, streamed once in order
    positives {"images_of_caption": {"SENTID": [IMAGE ID, ...]}, "captions_of_image": {"IMAGE ID": [SENTID, ...]}}

COCO's captions describe more images than their own. For COCO's test split, ECCV Caption (Chun et al. 2022) and CxC list
all images that a caption describes and all captions of an image. Their ids are those of the Karpathy file ("cocoid" or
else "imgid"; "sentid").
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from clips_eval.retrieval.measures import Positives
from vision_tower.common.errors import UserError
from vision_tower.common.files import read_object, read_text
from vision_tower.data.image_batches import CaptionedImage, SkipCounter
from vision_tower.data.pairs import BadSample, read_fields, read_image
from vision_tower.data.recipe import SourceRecipe
from vision_tower.data.shards import BadShard, Row, find_shards, is_remote, read_shard


def load_csv(
    data: Path, images_dir: Path, image_column: str, caption_column: str, separator: str
) -> list[CaptionedImage]:
    """Load the images in the order of their first row, each with all its captions.

    Raises:
        UserError: a missing file or column, a row that does not fit the header, an empty field, a missing image.
    """
    reader = csv.DictReader(
        io.StringIO(read_text(data).removeprefix("\ufeff"), newline=""), delimiter=separator, strict=True
    )
    captions: dict[str, list[str]] = {}
    try:
        _check_header(data, list(reader.fieldnames or []), image_column, caption_column)
        for row in reader:
            image, caption = _fields(data, reader.line_num, row, image_column, caption_column)
            if image not in captions and not (images_dir / image).is_file():
                raise UserError(
                    f"no such image (line {reader.line_num} of {data})", file=images_dir / image, remedy="set --images"
                )
            captions.setdefault(image, []).append(caption)
    except csv.Error as error:
        raise UserError(f"not CSV after line {reader.line_num} ({error})", file=data, remedy="check quotes") from error
    if not captions:
        raise UserError("has a header but no rows", file=data, remedy="write one row per caption")
    return [
        CaptionedImage(name=str(images_dir / image), content=images_dir / image, texts=tuple(texts))
        for image, texts in captions.items()
    ]


def _check_header(data: Path, columns: list[str], *names: str) -> None:
    for option, name in zip(("image_column", "caption_column"), names, strict=True):
        if name not in columns:
            known = ", ".join(f"'{column}'" for column in columns) or "none, the file is empty"
            hint = " or another --separator" if len(columns) == 1 else ""
            raise UserError(
                f"no such column (columns: {known})", file=data, key=option, value=name, remedy=f"set --{option}{hint}"
            )


def _fields(data: Path, line: int, row: dict[str, str], image_column: str, caption_column: str) -> tuple[str, str]:
    if None in row or None in row.values():  # how DictReader marks too many and too few fields
        raise UserError(
            f"line {line} has more or fewer fields than the header", file=data, remedy="quote texts with the separator"
        )
    for column in (image_column, caption_column):
        if not row[column].strip():
            raise UserError(f"line {line} is empty", file=data, key=column, remedy="fill it in or remove the row")
    return row[image_column].strip(), row[caption_column]


def count_pairs(pattern: str) -> int | None:
    """Count the rows; None if a shard is remote, since counting would download it.

    Raises:
        UserError: no such shard, or a broken one.
    """
    shards = find_shards(pattern)
    if any(is_remote(shard) for shard in shards):
        return None
    return sum(1 for shard in shards for _ in _rows(shard, frozenset()))


def stream_pairs(pattern: str, image: str, caption: str, skips: SkipCounter) -> Iterator[CaptionedImage]:
    """Yield the rows that have an image and a caption; `skips` counts the others.

    A caption field is one text or a list of texts. A text file of its own in a tar has one caption per line, as
    CLIP_benchmark writes them.

    Args:
        image: column, or file ending in a tar; png, jpg, jpeg and webp are found without it.
        caption: column; in a tar a key of the json, or a file ending such as txt.
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
                    if number == row.index == 0:  # most likely a wrong option, not a bad row
                        raise UserError(
                            "not in row 0", file=name, key="caption_column", value=caption, remedy="choose another"
                        )
                    raise BadSample(f"no '{caption}'")
                yield CaptionedImage(name=name, content=read_image(row, source), texts=_captions(fields[caption]))
            except BadSample as error:
                skips.skip(name, str(error))


def _rows(shard: str, names: frozenset[str]) -> Iterator[Row]:
    try:
        yield from read_shard(shard, names, lambda _: True)
    except BadShard as error:
        raise UserError(f"{error.cause} ({error})", file=shard, remedy="download the shard again") from error


def _captions(field: Any) -> tuple[str, ...]:
    if isinstance(field, bytes):
        field = field.decode("utf-8", errors="replace").splitlines()
    texts = field if isinstance(field, list) else [field]
    captions = tuple(text for text in texts if isinstance(text, str) and text.strip())
    if not captions:
        raise BadSample("no caption")
    return captions


def load_positives(file: Path, data: Path, split: str) -> tuple[Positives, Positives]:
    """Read a positives file as rows of the split: images of each caption, captions of each image.

    Queries that the file does not annotate have an empty list.

    Args:
        data: the Karpathy JSON that the ids belong to.
    Raises:
        UserError: wrong structure or an unknown id in the file, or no ids in `data`.
    """
    tree = read_object(file)
    images, texts = _ids(data, split)
    of_caption = _rows_of(file, tree, "images_of_caption", texts, images)
    return of_caption, _rows_of(file, tree, "captions_of_image", images, texts)


def _ids(data: Path, split: str) -> tuple[list[str], list[str]]:
    """Return the ids of the split's images and captions, in embedding order."""
    rows = [row for row in read_object(data)["images"] if row.get("split") == split]
    try:
        images = [str(row["cocoid"] if "cocoid" in row else row["imgid"]) for row in rows]
        return images, [str(sentence["sentid"]) for row in rows for sentence in row["sentences"]]
    except KeyError as error:
        raise UserError(f"an image has no {error}", file=data, remedy="--positives needs COCO's ids") from error


def _rows_of(file: Path, tree: dict[str, Any], section: str, queries: list[str], candidates: list[str]) -> Positives:
    """Row numbers of the positives of each query."""
    if not isinstance(tree.get(section), dict):
        raise UserError("not an object of lists of ids", file=file, key=section, remedy="see docs/evaluation.md")
    row_of = {name: row for row, name in enumerate(candidates)}
    known = set(queries)
    positives: dict[str, list[int]] = {}
    for query, names in tree[section].items():
        if query not in known:
            raise UserError("unknown id", file=file, key=section, value=query, remedy="choose the split with --split")
        unknown = [name for name in map(str, names) if name not in row_of]
        if unknown:
            raise UserError("unknown id", file=file, key=f"{section}.{query}", value=unknown[0], remedy="remove it")
        positives[query] = [row_of[str(name)] for name in names]
    return [positives.get(query, []) for query in queries]
