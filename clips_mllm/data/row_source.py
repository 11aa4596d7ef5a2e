"""Where rows come from: a JSON read in a stream, or a `datasets` data set that is mapped into memory.

.json .jsonl --json_rows--> rows
.parquet, folder, hf://datasets/OWNER/NAME --datasets--> Arrow files on disk --> rows, images as they are encoded
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

CHUNK = 2000  # rows that a worker checks at a time
CHUNK_WITH_IMAGES = 100
NO_ROWS = "holds no rows; make it again, or take the source out"
HERE = b"\0"  # in the place of an image's bytes


def is_json(source: InstructionSource) -> bool:
    """Whether the rows are read as text."""
    return Path(source.file).suffix in JSON_SUFFIXES and not source.on_hub


def image_folder(source: InstructionSource) -> Path:
    """What paths of images are relative to: the given folder, or that of the file."""
    return Path(source.images) if source.images is not None else Path(source.file).parent


def require_file(source: InstructionSource, key: str = "data.file") -> None:
    """Before a model is loaded for minutes: raise UserError where a source's file is not there."""
    if not source.on_hub and not matching(source.file):
        raise UserError(f"no such file ({key})", file=source.file, remedy="build the sample world or mend the path")


def matching(name: str) -> list[str]:
    """The files or folders of a name, or of a glob; brackets in the name of a file that is there are no glob."""
    if Path(name).exists():
        return [name]
    return sorted(glob.glob(name)) if glob.has_magic(name) else []


def open_table(source: InstructionSource) -> Dataset:
    """The rows of a source that is no JSON, memory-mapped, as tables of Arrow.

    Raises:
        UserError: no such file or data set, none that `datasets` can read, or one without rows.
    """
    import datasets
    import pyarrow.parquet as pq

    try:
        match source.file:
            case name if name.startswith(HUB):
                table = datasets.load_dataset(name.removeprefix(HUB), split=source.split)
            case name if Path(name).suffix == ".parquet":
                require_file(source)
                files = [file for file in matching(name) if pq.read_metadata(file).num_rows]  # others make it fail
                if not files:
                    raise UserError(f"{NO_ROWS}", file=name)
                exactly = [glob.escape(file) for file in files]  # `datasets` takes them for globs
                table = datasets.load_dataset("parquet", data_files=exactly, split="train")
            case name if Path(name).is_dir():
                saved = (Path(name) / "state.json").is_file()
                table = datasets.load_from_disk(name) if saved else datasets.load_dataset(name, split=source.split)
            case name:
                raise UserError(
                    f"no such file or folder (data.file), or none of .json, .jsonl, .parquet, a folder, {HUB}…",
                    file=name,
                )
    except UserError:
        raise
    except IndexError as error:  # from `load_from_disk`, where nothing was saved
        raise UserError(f"{NO_ROWS}", file=source.file) from error
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        told = error.__cause__ if isinstance(error, datasets.exceptions.DatasetGenerationError) else error
        words = " ".join(str(told or error).split())[:300]
        raise UserError(
            f"cannot be read as a data set ({words})", file=source.file, remedy="check the path and the file"
        ) from error
    if not len(table):
        raise UserError(f"{NO_ROWS}", file=source.file)
    return table.with_format("arrow")  # images of whatever column stay as they are encoded, and nothing is copied


def json_chunks(source: InstructionSource, size: int = CHUNK) -> Iterator[list[Any]]:
    """Rows of a JSON in chunks. Raises UserError as `read_rows` does."""
    rows = read_rows(Path(source.file))
    while chunk := list(itertools.islice(rows, size)):
        yield chunk


def table_chunks(table: Dataset, size: int = CHUNK_WITH_IMAGES) -> Iterator[list[dict[str, Any]]]:
    """Rows of a table in chunks."""
    for begin in range(0, len(table), size):
        yield table_rows(table, slice(begin, begin + size))


def table_rows(table: Dataset, part: slice | int) -> list[dict[str, Any]]:
    """Rows of a table; images as they are encoded."""
    rows: list[dict[str, Any]] = table[part].to_pylist()
    in_json = {name: feature for name, feature in table.features.items() if _holds_json(feature)}
    return [row | {name: _decoded(row[name], feature) for name, feature in in_json.items()} for row in rows]


def _holds_json(feature: Any) -> bool:
    """`datasets` keeps what has no single type as JSON, such as contents of which some are text and some are parts."""
    import datasets

    match feature:
        case dict():
            return any(map(_holds_json, feature.values()))
        case datasets.List() | datasets.LargeList():
            return _holds_json(feature.feature)
    return isinstance(feature, datasets.Json)


def _decoded(value: Any, feature: Any) -> Any:
    """A value whose JSON, however deep, is read."""
    import datasets

    match feature, value:
        case dict(), dict():
            return {name: _decoded(one, feature[name]) for name, one in value.items()}
        case datasets.List() | datasets.LargeList(), list():
            return [_decoded(one, feature.feature) for one in value]
        case datasets.Json(), str():
            return json.loads(value)
    return value


def without_bytes(row: dict[str, Any]) -> dict[str, Any]:
    """A row whose images are there, but no more than a byte: light to hand to another process."""
    light = copy.deepcopy(row) if image_parts(row) else dict(row)  # in messages, which the copy must not share
    for part, key in image_parts(light):
        part[key] = _light(part[key])
    for key in ("image", "images"):
        found = light.get(key)
        if found:
            light[key] = [_light(one) for one in found] if isinstance(found, list) else _light(found)
    return light


def _light(found: Any) -> Any:
    match found:
        case bytes():
            return HERE
        case {"bytes": bytes()}:
            return found | {"bytes": HERE}
    return found
