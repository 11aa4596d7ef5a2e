"""Readers of sources: JSON as a stream, tables of `datasets` memory-mapped.

.json .jsonl --json_rows--> rows
.parquet, folder, hf://datasets/OWNER/NAME --datasets--> Arrow files on disk --> rows with encoded images
"""

from __future__ import annotations

import copy
import glob
import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clips_mllm.data.json_rows import read_rows
from clips_mllm.data.llava_json import image_parts
from clips_mllm.data.recipe import HUB, JSON_SUFFIXES, InstructionSource
from vision_tower.common.errors import UserError

if TYPE_CHECKING:
    from datasets import Dataset

CHUNK = 2000  # rows per task of a worker
CHUNK_WITH_IMAGES = 100
NO_BYTES = b"\0"  # replaces the bytes of an image


def is_json(source: InstructionSource) -> bool:
    """Return True for a JSON or JSONL file."""
    return Path(source.file).suffix in JSON_SUFFIXES and not source.on_hub


def image_folder(source: InstructionSource) -> Path:
    """Return the folder that image paths are relative to: the given one, or that of the file."""
    return Path(source.images) if source.images is not None else Path(source.file).parent


def require_file(source: InstructionSource, key: str = "data.file") -> None:
    """Raise UserError if the source's file is missing; called before minutes of model loading."""
    if not source.on_hub and not matching(source.file):
        raise UserError("no such file", file=source.file, remedy=f"check {key}, or build the sample world")


def matching(name: str) -> list[str]:
    """Return the paths for a name or glob. The name of an existing file is not a glob, even with brackets."""
    if Path(name).exists():
        return [name]
    return sorted(glob.glob(name)) if glob.has_magic(name) else []


def open_table(source: InstructionSource) -> Dataset:
    """Open a Parquet file, folder or hub data set as a memory-mapped Arrow table.

    Raises:
        UserError: the data set is missing, unreadable or empty.
    """
    import datasets
    import pyarrow.parquet as pq

    try:
        match source.file:
            case name if name.startswith(HUB):
                table = datasets.load_dataset(name.removeprefix(HUB), split=source.split)
            case name if Path(name).suffix == ".parquet":
                require_file(source)
                # `datasets` fails on files without rows.
                files = [file for file in matching(name) if pq.read_metadata(file).num_rows]
                if not files:
                    raise _no_rows(source)
                exactly = [glob.escape(file) for file in files]  # `datasets` expands globs
                table = datasets.load_dataset("parquet", data_files=exactly, split="train")
            case name if Path(name).is_dir():
                saved = (Path(name) / "state.json").is_file()
                table = datasets.load_from_disk(name) if saved else datasets.load_dataset(name, split=source.split)
            case name:
                remedy = f"check data.file: .json, .jsonl, .parquet, a folder, or {HUB}OWNER/NAME"
                raise UserError("missing, or not a supported format", file=name, remedy=remedy)
    except UserError:
        raise
    except IndexError as error:  # from `load_from_disk` for a data set without rows
        raise _no_rows(source) from error
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        cause = error.__cause__ if isinstance(error, datasets.exceptions.DatasetGenerationError) else error
        reason = " ".join(str(cause or error).split())[:300]
        raise UserError(f"not a readable data set ({reason})", file=source.file, remedy="check the file") from error
    if not len(table):
        raise _no_rows(source)
    return table.with_format("arrow")  # without decoding images, and without copies


def _no_rows(source: InstructionSource) -> UserError:
    return UserError("no rows", file=source.file, remedy="build the data set again, or remove it from the recipe")


def json_chunks(source: InstructionSource, size: int = CHUNK) -> Iterator[list[Any]]:
    """Yield chunks of a JSON file. Raises UserError like `read_rows`."""
    rows = read_rows(Path(source.file))
    while chunk := list(itertools.islice(rows, size)):
        yield chunk


def table_chunks(table: Dataset, size: int = CHUNK_WITH_IMAGES) -> Iterator[list[dict[str, Any]]]:
    """Yield chunks of a table."""
    for begin in range(0, len(table), size):
        yield table_rows(table, slice(begin, begin + size))


def table_rows(table: Dataset, part: slice | int) -> list[dict[str, Any]]:
    """Return rows of a table, with encoded images."""
    rows: list[dict[str, Any]] = table[part].to_pylist()
    in_json = {name: feature for name, feature in table.features.items() if _holds_json(feature)}
    return [row | {name: _decoded(row[name], feature) for name, feature in in_json.items()} for row in rows]


def _holds_json(feature: Any) -> bool:
    """Return True if a column contains JSON: `datasets` stores columns of mixed types so, such as strings and parts."""
    import datasets

    match feature:
        case dict():
            return any(map(_holds_json, feature.values()))
        case datasets.List() | datasets.LargeList():
            return _holds_json(feature.feature)
    return isinstance(feature, datasets.Json)


def _decoded(value: Any, feature: Any) -> Any:
    """Decode the JSON in a value, at any depth."""
    import datasets

    match feature, value:
        case dict(), dict():
            return {name: _decoded(item, feature[name]) for name, item in value.items()}
        case datasets.List() | datasets.LargeList(), list():
            return [_decoded(item, feature.feature) for item in value]
        case datasets.Json(), str():
            return json.loads(value)
    return value


def without_bytes(row: dict[str, Any]) -> dict[str, Any]:
    """Replace the bytes of the row's images by one byte, so that sending it to another process is cheap."""
    light = copy.deepcopy(row) if image_parts(row) else dict(row)  # the nested messages are changed
    for part, key in image_parts(light):
        part[key] = _light(part[key])
    for key in ("image", "images"):
        if images := light.get(key):
            light[key] = [_light(image) for image in images] if isinstance(images, list) else _light(images)
    return light


def _light(image: Any) -> Any:
    match image:
        case bytes():
            return NO_BYTES
        case {"bytes": bytes()}:
            return image | {"bytes": NO_BYTES}
    return image
