"""Rows checked a chunk at a time, by any process: which become examples, which do not and why.

Imports neither torch nor Arrow: worker processes start in a moment.
"""

from __future__ import annotations

import dataclasses
import errno
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from clips_mllm.data.llava_json import BadRow, Example, to_example

RENAMED = "image under another ending"
MISSING = "missing image"
ENDINGS = (".jpg", ".jpeg", ".png", ".gif", ".webp", ".bmp")


@dataclasses.dataclass
class Checked:
    """What came of a chunk: columns of the usable rows, and counts of the others.

    Attributes:
        number: place of each row in the source.
        messages: the conversation, as JSON.
        images: paths below the image folder.
        inside: images that lie in the row itself.
        length: rough length; negative without an image.
        dropped, mended: how often, by cause.
        first: the first row of each cause, in words.
        missing: files that are not there.
    """

    rows: int = 0
    number: list[int] = dataclasses.field(default_factory=list)
    messages: list[str] = dataclasses.field(default_factory=list)
    images: list[list[str]] = dataclasses.field(default_factory=list)
    inside: list[int] = dataclasses.field(default_factory=list)
    length: list[int] = dataclasses.field(default_factory=list)
    dropped: Counter[str] = dataclasses.field(default_factory=Counter)
    mended: Counter[str] = dataclasses.field(default_factory=Counter)
    first: dict[str, str] = dataclasses.field(default_factory=dict)
    missing: list[str] = dataclasses.field(default_factory=list)

    def drop(self, cause: str, number: int, row: Any, detail: str = "") -> None:
        """Count a row that cannot be used."""
        self.first.setdefault(cause, f"row {number} ({row_name(row)}): {cause}{detail}")
        self.dropped[cause] += 1


def row_name(row: Any) -> str:
    """A row's id for messages; half a character in it, which no file takes, becomes "?"."""
    name = str(row.get("id", "")) if isinstance(row, dict) else ""
    return name.encode(errors="replace").decode()


def check_rows(chunk: tuple[Path, int, Sequence[Any]]) -> Checked:
    """The rows of a source from a number on.

    Args:
        chunk: folder of the images, number of the first row, the rows.
    """
    folder, begin, rows = chunk
    found = Checked(rows=len(rows))
    for number, row in enumerate(rows, start=begin):
        try:
            example = find_images(to_example(row), folder)
        except BadRow as error:
            found.drop(str(error), number, row)
            continue
        except FileNotFoundError as error:
            found.missing.append(error.filename)
            found.drop(MISSING, number, row, f" {error.filename}")
            continue
        found.mended.update(example.mended)
        inside = len(example.images) if example.images and isinstance(example.images[0], int) else 0
        found.number.append(number)
        found.messages.append(json.dumps(example.messages, ensure_ascii=False, separators=(",", ":")))
        found.images.append([] if inside else [str(name) for name in example.images])
        found.inside.append(inside)
        found.length.append(example.words if example.images else -example.words)
    return found


def find_images(example: Example, folder: Path) -> Example:
    """The example with files that exist; a file of the same name with another ending stands in for a missing one.

    Raises:
        FileNotFoundError: with the missing file.
        BadRow: a name that no file can have.
    """
    names: list[str] = []
    for name in example.images:
        if isinstance(name, int):
            return example
        try:
            names.append(name if (folder / name).is_file() else _renamed(folder, name))
        except OSError as error:
            if error.errno != errno.ENAMETOOLONG:  # an image itself, written as text
                raise
            raise BadRow("'image' is too long for a path") from error
    if names == example.images:
        return example
    return Example(example.messages, names, (*example.mended, RENAMED))


def _renamed(folder: Path, name: str) -> str:
    """OCR-VQA's images, for one, are named .jpg in the file and have the endings of what they are on disk."""
    for ending in ENDINGS if Path(name).name else ():
        if (folder / Path(name).with_suffix(ending)).is_file():
            return str(Path(name).with_suffix(ending))
    raise FileNotFoundError(2, "no such image", str(folder / name))
