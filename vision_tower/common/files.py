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


def read_json(path: Path) -> Any:
    """Read a JSON file. Raises UserError if it is missing, unreadable or not JSON."""
    text = read_text(path)
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        problem = f"line {error.lineno}: not valid JSON ({error.msg})"
        raise UserError(problem, file=path, remedy="create the file again") from error
    except RecursionError as error:
        raise UserError("not valid JSON (nested too deeply)", file=path, remedy="create the file again") from error


def read_object(path: Path) -> dict[str, Any]:
    """Read a JSON object. Raises UserError like `read_json`, and for other JSON."""
    tree = read_json(path)
    if not isinstance(tree, dict):
        problem = f"expected a JSON object, this is a {type(tree).__name__}"
        raise UserError(problem, file=path, remedy="create the file again")
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


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Yield a temporary name in the same folder; rename it to `path` at the end, delete it after an error."""
    make_folder(path.parent)
    work = path.with_name(f".{path.name}.{os.getpid()}.partial")  # several ranks can write the same file
    try:
        yield work
        os.replace(work, path)
    finally:
        work.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a file atomically: readers see the old or the complete new content."""
    with atomic_file(path) as work:
        work.write_text(text, encoding="utf-8")


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
