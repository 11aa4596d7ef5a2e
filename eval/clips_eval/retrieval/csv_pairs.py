"""Retrieval data as CSV: a header, then a row for each caption; rows with the same image belong together."""

from __future__ import annotations

import csv
import io
from pathlib import Path

from vision_tower.common.errors import UserError
from vision_tower.common.files import read_text
from vision_tower.data.image_batches import Pair


def load_csv(data: Path, images_dir: Path, image_column: str, caption_column: str, separator: str) -> list[Pair]:
    """The images in the order of their first row, each with all its captions.

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
                    f"no such image (line {reader.line_num} of {data})",
                    file=images_dir / image,
                    remedy="give their folder with --images",
                )
            captions.setdefault(image, []).append(caption)
    except csv.Error as error:
        raise UserError(
            f"after line {reader.line_num}: not CSV ({error})", file=data, remedy="check its quotes"
        ) from error
    if not captions:
        raise UserError("a header and no rows", file=data, remedy="write a row for each caption")
    return [
        Pair(name=str(images_dir / image), content=images_dir / image, texts=tuple(texts))
        for image, texts in captions.items()
    ]


def _check_header(data: Path, columns: list[str], *wanted: str) -> None:
    for option, name in zip(("--image_column", "--caption_column"), wanted, strict=True):
        if name not in columns:
            known = ", ".join(f"'{column}'" for column in columns) or "none, the file is empty"
            remedy = "; is another --separator needed?" if len(columns) == 1 else ""
            raise UserError(f"no column '{name}'; columns: {known}", file=data, remedy=f"choose with {option}{remedy}")


def _fields(data: Path, line: int, row: dict[str, str], image_column: str, caption_column: str) -> tuple[str, str]:
    if None in row or None in row.values():  # DictReader's marks of too many and of too few fields
        raise UserError(
            f"line {line}: other fields than the header has", file=data, remedy="quote texts that hold the separator"
        )
    for column in (image_column, caption_column):
        if not row[column].strip():
            raise UserError(f"line {line}: '{column}' is empty", file=data, remedy="fill it in or remove the row")
    return row[image_column].strip(), row[caption_column]
