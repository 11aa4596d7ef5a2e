"""Files: read with errors that name the file and the remedy; files and folders written whole or not at all."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from vision_tower.common.errors import UserError


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in `path`.

    Raises:
        UserError: missing, unreadable, not JSON, or not an object.
    """
    text = read_text(path)
    try:
        tree = json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(
            f"line {error.lineno}: not valid JSON ({error.msg})", file=path, remedy="make the file again"
        ) from error
    except RecursionError as error:
        raise UserError("not valid JSON (nested too deeply)", file=path, remedy="make the file again") from error
    if not isinstance(tree, dict):
        raise UserError(
            f"a JSON object is expected, this is {type(tree).__name__}", file=path, remedy="make the file again"
        )
    return tree


def read_text(path: Path) -> str:
    """The UTF-8 text in `path`. Raises UserError where it is missing, unreadable or something else."""
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise UserError("no such file", file=path, remedy="check the path") from error
    except (IsADirectoryError, PermissionError) as error:
        raise UserError(f"cannot be read ({error.strerror})", file=path, remedy="check the path") from error
    except UnicodeDecodeError as error:
        raise UserError("not UTF-8 text", file=path, remedy="make the file again") from error


def looks_local(name: str) -> bool:
    """Whether a model's name is a path: a hub id is owner/name."""
    return name.count("/") != 1 or name.startswith((".", "/", "~")) or Path(name).parent.is_dir()


def check_model_exists(name: str, key: str) -> None:
    """Raise UserError where the model's name can only be a folder's, and there is none."""
    if looks_local(name) and not Path(name).is_dir():
        raise UserError(
            f"no such folder ({key})", file=name, remedy="run the stage before first, or give a hub id like owner/name"
        )


def make_folder(folder: Path) -> None:
    """The folder and those above it, where they are not there. Raises UserError where nothing can be made, as in /proc.

    A place without permission is an OSError, of which `run_command` makes a line too.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileNotFoundError, FileExistsError) as error:
        raise UserError(f"cannot be made ({error.strerror})", file=folder, remedy="give another folder") from error


def write_text(path: Path, text: str) -> None:
    """Write beside `path`, then rename: a reader sees the old file or the whole new one."""
    make_folder(path.parent)
    work = path.with_name(f".{path.name}.{os.getpid()}.partial")  # ranks may write the same file
    try:
        work.write_text(text, encoding="utf-8")
        os.replace(work, path)
    finally:
        work.unlink(missing_ok=True)


@contextmanager
def new_folder(destination: Path) -> Iterator[Path]:
    """A folder to write to, which becomes `destination` at the end and is gone where an error ends it.

    Raises:
        UserError: a destination that exists and is not an empty folder, or cannot be made.
    """
    if not destination.name or (destination.exists() and (not destination.is_dir() or any(destination.iterdir()))):
        raise UserError(f"{destination}: not an empty folder", remedy="give a new one")
    work = destination.with_name(f".{destination.name}.partial")
    shutil.rmtree(work, ignore_errors=True)
    make_folder(work)
    try:
        yield work
    except BaseException:
        shutil.rmtree(work, ignore_errors=True)  # a full disk, Ctrl-C: nothing half-written stays
        raise
    os.replace(work, destination)
