"""Reading and writing the small JSON files of a run: every failure names the file and the remedy."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vision_tower.common.errors import UserError
from vision_tower.common.files import read_text, write_text


def read_lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """The objects of a JSON-lines file with their line numbers from 1; blank lines are skipped.

    Raises:
        UserError: a line that is not a JSON object.
    """
    for number, line in enumerate(read_text(path).splitlines(), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise UserError(
                f"line {number}: not valid JSON ({error.msg})", file=path, remedy="make the file again"
            ) from error
        if not isinstance(row, dict):
            raise UserError(f"line {number}: a JSON object is expected", file=path, remedy="make the file again")
        yield number, row


def number_in(path: Path, tree: dict[str, Any], key: str, place: str = "", *, fraction: bool = False) -> float:
    """`tree[key]` as a finite number, in [0, 1] if `fraction`.

    Raises:
        UserError: missing, not a number, or out of range.
    """
    value = tree.get(key)
    name = f"{place}.{key}" if place else key
    if isinstance(value, bool) or not isinstance(value, int | float) or value != value or abs(value) == float("inf"):
        raise UserError(
            f"'{name}' is {value!r}, a number is expected", file=path, remedy="run the step that writes this file again"
        )
    if fraction and not 0 <= value <= 1:
        raise UserError(
            f"'{name}' is {value}, a fraction from 0 to 1 is expected", file=path, remedy="run that step again"
        )
    return value


def count_in(path: Path, tree: dict[str, Any], key: str, place: str = "") -> int:
    """`tree[key]` as a whole number of at least 1.

    Raises:
        UserError: missing or anything else.
    """
    value = number_in(path, tree, key, place)
    if value < 1 or value != int(value):
        name = f"{place}.{key}" if place else key
        raise UserError(
            f"'{name}' is {value}, a count of at least 1 is expected", file=path, remedy="run that step again"
        )
    return int(value)


def write_json(path: Path, tree: dict[str, Any]) -> None:
    """`tree` as indented JSON, whole or not at all."""
    write_text(path, json.dumps(tree, indent=2, ensure_ascii=False) + "\n")
