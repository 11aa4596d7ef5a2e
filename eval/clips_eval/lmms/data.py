"""Check an evaluation's local parquet files before lmms-eval or the model is loaded."""

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

BATCH = 64  # rows whose images are read at a time
REMEDY = "correct 'data' in the recipe, or make the sample files with 'clips-mllm data sample'"


def data_files(data: str, task: str) -> list[str]:
    """Return the absolute paths of `data`, a parquet file or a pattern (`folder/*.parquet`).

    Raises:
        UserError: no such file.
    """
    files = sorted(glob.glob(data)) if glob.has_magic(data) else [data]
    missing = [file for file in files if not Path(file).is_file()]
    if missing or not files:
        raise UserError(f"no such file (data of task {task})", file=missing[0] if missing else data, remedy=REMEDY)
    return [str(Path(file).resolve()) for file in files]


def data_digest(data: str, task: str) -> str:
    """Return the SHA-256 of the bytes of all files of `data`, in the order of `data_files`.

    Raises:
        UserError: no such file.
    """
    return file_hash(*map(Path, data_files(data, task)))


def check_data(data: str, task: str) -> None:
    """Check rows and columns, and for our own tasks every row's content and that ids are unique over all files.

    Raises:
        UserError: names the file and the column or row.
    """
    seen: dict[str, str] = {}  # file and row by id
    for name in data_files(data, task):
        file = Path(name)
        schema = _schema(file, task)
        columns = OWN_TASKS.get(task) or STOCK_COLUMNS.get(task, ())
        missing = [column for column in columns if column not in schema.names]
        if missing:
            raise UserError(
                f"{task} needs this column (has {', '.join(schema.names)})", file=file, key=missing[0], remedy=REMEDY
            )
        if "image" in columns and not _is_image(schema):
            raise UserError("not a datasets.Image", file=file, key="image", remedy="save with Features(image=Image())")
        if task in OWN_TASKS:
            _check_answers(file, task, seen)
            _check_images(file)


def _schema(file: Path, task: str) -> pa.Schema:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        parquet = pq.ParquetFile(file)
    except (pa.ArrowInvalid, OSError) as error:
        raise UserError(f"not a readable parquet file ({error})", file=file, remedy=REMEDY) from error
    if parquet.metadata.num_rows == 0:
        raise UserError(f"has no rows (data of task {task})", file=file, remedy=REMEDY)
    return parquet.schema_arrow


def _is_image(schema: pa.Schema) -> bool:
    """Return True if the file's metadata declares the column an image, so that `datasets` decodes it."""
    metadata = (schema.metadata or {}).get(b"huggingface")
    features = json.loads(metadata).get("info", {}).get("features", {}) if metadata else {}
    return features.get("image", {}).get("_type") == "Image"


def _check_answers(file: Path, task: str, seen: dict[str, str]) -> None:
    """Check question, options, answer, id and kind of each row; `seen` maps the ids of earlier rows to their place."""
    import pyarrow.parquet as pq

    form = OWN_TASKS[task]
    columns = [column for column in form if column != "image"]
    for number, row in enumerate(pq.read_table(file, columns=columns).to_pylist()):
        if not str(row["question"] or "").strip():
            raise _row_error(file, number, "question", row["question"], "must not be empty")
        allowed = _allowed(row, form)
        if len(allowed) < 2 and form is not EASY_VQA_COLUMNS:
            raise _row_error(file, number, "A..D", len(allowed), "at least two options are needed")
        answer = row["answer"] if isinstance(row["answer"], str) else ""
        answer = answer if form is MMBENCH_COLUMNS else plain_word(answer)
        if not answer or (allowed and answer not in allowed):
            choices = f"one of {', '.join(allowed)}" if allowed else "a word"
            raise _row_error(file, number, "answer", row["answer"], f"must be {choices}")
        id_column = "question_id" if "question_id" in row else "index"
        name = str(row[id_column])
        if row[id_column] is None:
            raise _row_error(file, number, id_column, None, "must not be empty")
        if name in seen:
            raise _row_error(file, number, id_column, row[id_column], f"must be unique, but {seen[name]} has it too")
        seen[name] = f"{file}: row {number}"
        if "kind" in row and row["kind"] not in ("open", "yes_no"):
            raise _row_error(file, number, "kind", row["kind"], "must be open or yes_no")


def _row_error(file: Path, number: int, column: str, value: object, problem: str) -> UserError:
    return UserError(problem, file=file, key=f"row {number}.{column}", value=repr(value), remedy="correct or remove it")


def _check_images(file: Path) -> None:
    """Check that each row has an image. Row groups without nulls in their statistics are not read."""
    import pyarrow.parquet as pq

    parquet = pq.ParquetFile(file)
    first = 0
    for group in range(parquet.num_row_groups):
        number = first
        for batch in parquet.iter_batches(BATCH, [group], ["image"]) if _may_have_null(parquet, group) else ():
            for index, image in enumerate(batch.column(0).to_pylist(), start=number):
                if image is None or (image["bytes"] is None and image["path"] is None):
                    raise _row_error(file, index, "image", None, "must not be empty")
            number += batch.num_rows
        first += parquet.metadata.row_group(group).num_rows


def _may_have_null(parquet: pq.ParquetFile, group: int) -> bool:
    """Return False if the group's statistics exclude a row without an image's bytes."""
    columns = parquet.metadata.row_group(group)
    for index in range(columns.num_columns):
        column = columns.column(index)
        if column.path_in_schema == "image.bytes":
            known = column.is_stats_set and column.statistics.has_null_count
            return not known or column.statistics.null_count > 0
    return True


def _allowed(row: dict[str, Any], columns: Sequence[str]) -> list[str]:
    """Return the valid answers of a row; empty if any is valid."""
    if columns is POPE_COLUMNS:
        return ["yes", "no"]
    if columns is MMBENCH_COLUMNS:
        return list(mmbench_options(row))
    assert columns is EASY_VQA_COLUMNS
    return []
