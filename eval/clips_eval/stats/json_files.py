"""Read and write the small JSON files of a run; every error names the file and the remedy."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vision_tower.common.errors import UserError
from vision_tower.common.files import read_text, write_text

REMEDY = "run the command that writes this file again"


def read_lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield the objects of a JSON-lines file with their line numbers from 1, without blank lines.

    Raises:
        UserError: a line is not a JSON object.
    """
    for number, line in enumerate(read_text(path).splitlines(), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise UserError(f"line {number} is not valid JSON ({error.msg})", file=path, remedy=REMEDY) from error
        if not isinstance(row, dict):
            raise UserError(f"line {number} is not a JSON object", file=path, remedy=REMEDY)
        yield number, row


def number_in(path: Path, tree: dict[str, Any], key: str, section: str = "", *, fraction: bool = False) -> float:
    """Return `tree[key]` as a finite number, in [0, 1] if `fraction`.

    Args:
        path, section: file, and dotted path of `tree` inside it, for the error message.
    Raises:
        UserError: the value is missing, not a number, or out of range.
    """
    value, name = tree.get(key), f"{section}.{key}" if section else key
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise UserError("not a finite number", file=path, key=name, value=value, remedy=REMEDY)
    if fraction and not 0 <= value <= 1:
        raise UserError("not a fraction from 0 to 1", file=path, key=name, value=value, remedy=REMEDY)
    return value


def count_in(path: Path, tree: dict[str, Any], key: str, section: str = "") -> int:
    """Return `tree[key]` as an integer of at least 1.

    Raises:
        UserError: the value is missing or anything else.
    """
    value = number_in(path, tree, key, section)
    if value < 1 or value != int(value):
        name = f"{section}.{key}" if section else key
        raise UserError("not an integer of at least 1", file=path, key=name, value=value, remedy=REMEDY)
    return int(value)


def write_json(path: Path, tree: dict[str, Any]) -> None:
    """Write `tree` as indented JSON, atomically."""
    write_text(path, json.dumps(tree, indent=2, ensure_ascii=False) + "\n")
