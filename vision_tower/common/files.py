"""File access: reading with user-facing errors, atomic writes of files and folders."""

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
    """Read a JSON object.

    Raises:
        UserError: the file is missing, unreadable, not JSON, or not an object.
    """
    text = read_text(path)
    try:
        tree = json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(
            f"line {error.lineno}: not valid JSON ({error.msg})", file=path, remedy="create the file again"
        ) from error
    except RecursionError as error:
        raise UserError("not valid JSON (nested too deeply)", file=path, remedy="create the file again") from error
    if not isinstance(tree, dict):
        raise UserError(
            f"expected a JSON object, this is a {type(tree).__name__}", file=path, remedy="create the file again"
        )
    return tree


def read_text(path: Path) -> str:
    """Read a UTF-8 text file. Raises UserError if it is missing, unreadable or not text."""
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise UserError("no such file", file=path, remedy="check the path") from error
    except (IsADirectoryError, PermissionError) as error:
        raise UserError(f"cannot be read ({error.strerror})", file=path, remedy="check the path") from error
    except UnicodeDecodeError as error:
        raise UserError("not UTF-8 text", file=path, remedy="create the file again") from error


def looks_local(name: str) -> bool:
    """Return True if a model's name is a path and not a hub id (owner/name)."""
    return name.count("/") != 1 or name.startswith((".", "/", "~")) or Path(name).parent.is_dir()


def check_model_exists(name: str, key: str) -> None:
    """Raise UserError if the model's name is a path of a folder that does not exist."""
    if looks_local(name) and not Path(name).is_dir():
        raise UserError("no such folder", file=name, key=key, remedy="run the stage before it, or give a hub id")


def make_folder(folder: Path) -> None:
    """Create a folder and its parents. Raises UserError if the file system cannot have it, as in /proc.

    A missing permission raises OSError, which `run_command` also prints as one line.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileNotFoundError, FileExistsError) as error:
        raise UserError(f"cannot be created ({error.strerror})", file=folder, remedy="give another folder") from error


def write_text(path: Path, text: str) -> None:
    """Write a file atomically: readers see the old or the complete new content."""
    make_folder(path.parent)
    work = path.with_name(f".{path.name}.{os.getpid()}.partial")  # several ranks can write the same file
    try:
        work.write_text(text, encoding="utf-8")
        os.replace(work, path)
    finally:
        work.unlink(missing_ok=True)


@contextmanager
def new_folder(destination: Path) -> Iterator[Path]:
    """Yield a temporary folder that is renamed to `destination` at the end, and deleted after an error.

    Raises:
        UserError: the destination exists and is not an empty folder, or cannot be created.
    """
    if not destination.name or (destination.exists() and (not destination.is_dir() or any(destination.iterdir()))):
        raise UserError("not an empty folder", file=destination, remedy="give a new one")
    work = destination.with_name(f".{destination.name}.partial")
    shutil.rmtree(work, ignore_errors=True)
    make_folder(work)
    try:
        yield work
    except BaseException:
        shutil.rmtree(work, ignore_errors=True)  # also after Ctrl-C
        raise
    os.replace(work, destination)
