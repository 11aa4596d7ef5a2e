"""Check rows in chunks: usable ones become columns of the row store, others are counted by cause.

Imports neither torch nor Arrow, so that worker processes start fast.
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

RENAMED = "image under another suffix"
MISSING = "missing image"
SUFFIXES = (".jpg", ".jpeg", ".png", ".gif", ".webp", ".bmp")


@dataclasses.dataclass
class CheckedRows:
    """Columns of the usable rows of a chunk, and counts of the others.

    Attributes:
        number: row number in the source.
        messages: the conversation, as JSON.
        images: paths relative to the image folder.
        inside: number of images stored in the row.
        length: approximate length; negative without an image.
        dropped, repaired: counts by cause.
        first: description of the first row of each cause.
        missing: image files that do not exist.
    """

    rows: int = 0
    number: list[int] = dataclasses.field(default_factory=list)
    messages: list[str] = dataclasses.field(default_factory=list)
    images: list[list[str]] = dataclasses.field(default_factory=list)
    inside: list[int] = dataclasses.field(default_factory=list)
    length: list[int] = dataclasses.field(default_factory=list)
    dropped: Counter[str] = dataclasses.field(default_factory=Counter)
    repaired: Counter[str] = dataclasses.field(default_factory=Counter)
    first: dict[str, str] = dataclasses.field(default_factory=dict)
    missing: list[str] = dataclasses.field(default_factory=list)

    def drop(self, cause: str, number: int, row: Any, detail: str = "") -> None:
        """Count an unusable row."""
        self.first.setdefault(cause, f"row {number} ({row_name(row)}): {cause}{detail}")
        self.dropped[cause] += 1


def row_name(row: Any) -> str:
    """Return a row's id for messages; lone surrogates, which cannot be written, become "?"."""
    name = str(row.get("id", "")) if isinstance(row, dict) else ""
    return name.encode(errors="replace").decode()


def check_rows(chunk: tuple[Path, int, Sequence[Any]]) -> CheckedRows:
    """Check consecutive rows of a source.

    Args:
        chunk: image folder, number of the first row, rows.
    """
    folder, begin, rows = chunk
    checked = CheckedRows(rows=len(rows))
    for number, row in enumerate(rows, start=begin):
        try:
            example = find_images(to_example(row), folder)
        except BadRow as error:
            checked.drop(str(error), number, row)
            continue
        except FileNotFoundError as error:
            checked.missing.append(error.filename)
            checked.drop(MISSING, number, row, f" {error.filename}")
            continue
        checked.repaired.update(example.repairs)
        inside = len(example.images) if example.images and isinstance(example.images[0], int) else 0
        checked.number.append(number)
        checked.messages.append(json.dumps(example.messages, ensure_ascii=False, separators=(",", ":")))
        checked.images.append([] if inside else [str(name) for name in example.images])
        checked.inside.append(inside)
        checked.length.append(example.words if example.images else -example.words)
    return checked


def find_images(example: Example, folder: Path) -> Example:
    """Check that the image files exist; a missing one is replaced by a file of the same name with another suffix.

    Raises:
        FileNotFoundError: with the name of the missing file.
        BadRow: a name is too long for a file.
    """
    names: list[str] = []
    for name in example.images:
        if isinstance(name, int):
            return example
        try:
            names.append(name if (folder / name).is_file() else _renamed(folder, name))
        except OSError as error:
            if error.errno != errno.ENAMETOOLONG:  # such as an image encoded as text
                raise
            raise BadRow("'image' is too long for a path") from error
    if names == example.images:
        return example
    return Example(example.messages, names, (*example.repairs, RENAMED))


def _renamed(folder: Path, name: str) -> str:
    """Find the image under another suffix. OCR-VQA, for example, names .jpg in its JSON for .png and .gif files."""
    for suffix in SUFFIXES if Path(name).name else ():
        if (folder / Path(name).with_suffix(suffix)).is_file():
            return str(Path(name).with_suffix(suffix))
    raise FileNotFoundError(2, "no such image", str(folder / name))
