"""Look at an evaluation's local parquet files before anything is loaded: a wrong one is said in a second."""

from __future__ import annotations

import glob
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clips_eval.tasks import EASY_VQA_COLUMNS, MMBENCH_COLUMNS, OWN_TASKS, POPE_COLUMNS, STOCK_COLUMNS
from clips_eval.tasks.metrics import mmbench_options, plain_word
from vision_tower.common.errors import UserError
from vision_tower.common.hashes import file_hash

if TYPE_CHECKING:
    import pyarrow as pa
    import pyarrow.parquet as pq

BATCH = 64  # rows whose images are read together
MAKE = "correct 'data' in the recipe, or make the sample files with 'clips-mllm data sample'"


def data_files(data: str, task: str) -> list[str]:
    """The absolute paths of `data`, a parquet file or a pattern (`folder/*.parquet`).

    Raises:
        UserError: there is none.
    """
    files = sorted(glob.glob(data)) if glob.has_magic(data) else [data]
    missing = [file for file in files if not Path(file).is_file()]
    if missing or not files:
        raise UserError(f"no such file (data of task {task})", file=missing[0] if missing else data, remedy=f"{MAKE}")
    return [str(Path(file).resolve()) for file in files]


def data_digest(data: str, task: str) -> str:
    """SHA-256 of the bytes of all files of `data`, in the order of `data_files`.

    Raises:
        UserError: there is none.
    """
    return file_hash(*map(Path, data_files(data, task)))


def check_data(data: str, task: str) -> None:
    """Check rows, columns, and for our own tasks what each row holds, and that no id comes twice in all files.

    Raises:
        UserError: naming the file, the column or row, and the remedy.
    """
    seen: dict[str, str] = {}  # id -> its place
    for name in data_files(data, task):
        file = Path(name)
        schema = _schema(file, task)
        columns = OWN_TASKS.get(task) or STOCK_COLUMNS.get(task, ())
        missing = [column for column in columns if column not in schema.names]
        if missing:
            raise UserError(
                f"no column '{missing[0]}', which {task} needs (columns: {', '.join(schema.names)})",
                file=file,
                remedy=f"{MAKE}",
            )
        if "image" in columns and not _is_image(schema):
            raise UserError(
                "column 'image' is not a datasets.Image feature",
                file=file,
                remedy="save it with Features(image=Image())",
            )
        if task in OWN_TASKS:
            _check_answers(file, task, seen)
            _check_images(file)


def _schema(file: Path, task: str) -> pa.Schema:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        parquet = pq.ParquetFile(file)
    except (pa.ArrowInvalid, OSError) as error:
        raise UserError(f"not a readable parquet file ({error})", file=file, remedy=f"{MAKE}") from error
    if parquet.metadata.num_rows == 0:
        raise UserError(f"has no rows, task {task} needs at least one", file=file, remedy=f"{MAKE}")
    return parquet.schema_arrow


def _is_image(schema: pa.Schema) -> bool:
    """Whether `datasets` will decode the column: it says so in the file's metadata."""
    metadata = (schema.metadata or {}).get(b"huggingface")
    features = json.loads(metadata).get("info", {}).get("features", {}) if metadata else {}
    return features.get("image", {}).get("_type") == "Image"


def _check_answers(file: Path, task: str, seen: dict[str, str]) -> None:
    import pyarrow.parquet as pq

    columns = [column for column in OWN_TASKS[task] if column != "image"]
    for number, row in enumerate(pq.read_table(file, columns=columns).to_pylist()):
        if not str(row["question"] or "").strip():
            raise UserError(f"row {number}: has no question", file=file, remedy="mend the row")
        allowed = _allowed(row, OWN_TASKS[task])
        if len(allowed) < 2 and OWN_TASKS[task] is not EASY_VQA_COLUMNS:
            raise UserError(f"row {number}: has fewer than two options in A to D", file=file, remedy="mend the row")
        given = row["answer"] if isinstance(row["answer"], str) else ""
        answer = given if OWN_TASKS[task] is MMBENCH_COLUMNS else plain_word(given)
        if not answer or (allowed and answer not in allowed):
            choices = f"one of {', '.join(allowed)}" if allowed else "a word"
            raise UserError(
                f"row {number}: answer {row['answer']!r} should be {choices}", file=file, remedy="mend the row"
            )
        name = row.get("question_id", row.get("index"))
        if name is None:
            raise UserError(f"row {number}: has no id", file=file, remedy="give each row its own")
        if str(name) in seen:
            raise UserError(
                f"row {number}: id {name} is that of {seen[str(name)]} too", file=file, remedy="give each row its own"
            )
        seen[str(name)] = f"{file}: row {number}"
        if "kind" in row and row["kind"] not in ("open", "yes_no"):
            raise UserError(
                f"row {number}: kind {row['kind']!r} should be open or yes_no", file=file, remedy="mend the row"
            )


def _check_images(file: Path) -> None:
    """Only whether each row has one: row groups that by their statistics have no null are not read."""
    import pyarrow.parquet as pq

    parquet = pq.ParquetFile(file)
    first = 0
    for group in range(parquet.num_row_groups):
        number = first
        for batch in parquet.iter_batches(BATCH, [group], ["image"]) if _may_lack(parquet, group) else ():
            for place, image in enumerate(batch.column(0).to_pylist(), start=number):
                if image is None or (image["bytes"] is None and image["path"] is None):
                    raise UserError(f"row {place}: has no image", file=file, remedy="mend the row, or leave it out")
            number += batch.num_rows
        first += parquet.metadata.row_group(group).num_rows


def _may_lack(parquet: pq.ParquetFile, group: int) -> bool:
    """Whether the group has a row without an image's bytes, as far as its statistics tell."""
    columns = parquet.metadata.row_group(group)
    for place in range(columns.num_columns):
        column = columns.column(place)
        if column.path_in_schema == "image.bytes":
            known = column.is_stats_set and column.statistics.has_null_count
            return not known or column.statistics.null_count > 0
    return True


def _allowed(row: dict[str, Any], columns: Sequence[str]) -> list[str]:
    """The answers a row may have; an empty list if any will do."""
    if columns is POPE_COLUMNS:
        return ["yes", "no"]
    if columns is MMBENCH_COLUMNS:
        return list(mmbench_options(row))
    assert columns is EASY_VQA_COLUMNS
    return []
