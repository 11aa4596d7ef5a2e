"""Look at an evaluation's local parquet files before anything is loaded: a wrong one is said in a second."""

from __future__ import annotations

import glob
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clips_eval.tasks import EASY_VQA_COLUMNS, MMBENCH_COLUMNS, OWN_TASKS, POPE_COLUMNS, STOCK_COLUMNS
from clips_eval.tasks.metrics import mmbench_options, plain_word
from vision_tower.errors import UserError

if TYPE_CHECKING:
    import pyarrow as pa

MAKE = "correct 'data' in the recipe, or make the sample files with 'clips-mllm data sample'"


def data_files(data: str, task: str) -> list[str]:
    """The absolute paths of `data`, a parquet file or a pattern (`folder/*.parquet`).

    Raises:
        UserError: there is none.
    """
    files = sorted(glob.glob(data)) if glob.has_magic(data) else [data]
    missing = [file for file in files if not Path(file).is_file()]
    if missing or not files:
        raise UserError(f"{missing[0] if missing else data}: no such file (data of task {task}); {MAKE}")
    return [str(Path(file).resolve()) for file in files]


def check_data(data: str, task: str) -> None:
    """Check rows, columns, and for our own tasks the answers.

    Raises:
        UserError: naming the file, the column or row, and the remedy.
    """
    for name in data_files(data, task):
        file = Path(name)
        schema = _schema(file, task)
        columns = OWN_TASKS.get(task) or STOCK_COLUMNS.get(task, ())
        missing = [column for column in columns if column not in schema.names]
        if missing:
            raise UserError(
                f"{file}: no column '{missing[0]}', which {task} needs (columns: {', '.join(schema.names)}); {MAKE}"
            )
        if "image" in columns and not _is_image(schema):
            raise UserError(
                f"{file}: column 'image' is not a datasets.Image feature; save it with Features(image=Image())"
            )
        if task in OWN_TASKS:
            _check_answers(file, task)


def _schema(file: Path, task: str) -> pa.Schema:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        parquet = pq.ParquetFile(file)
    except (pa.ArrowInvalid, OSError) as error:
        raise UserError(f"{file}: not a readable parquet file ({error}); {MAKE}") from error
    if parquet.metadata.num_rows == 0:
        raise UserError(f"{file}: has no rows, task {task} needs at least one; {MAKE}")
    return parquet.schema_arrow


def _is_image(schema: pa.Schema) -> bool:
    """Whether `datasets` will decode the column: it says so in the file's metadata."""
    metadata = (schema.metadata or {}).get(b"huggingface")
    features = json.loads(metadata).get("info", {}).get("features", {}) if metadata else {}
    return features.get("image", {}).get("_type") == "Image"


def _check_answers(file: Path, task: str) -> None:
    import pyarrow.parquet as pq

    columns = [column for column in OWN_TASKS[task] if column != "image"]
    seen: dict[str, int] = {}
    for number, row in enumerate(pq.read_table(file, columns=columns).to_pylist()):
        allowed = _allowed(row, OWN_TASKS[task])
        answer = row["answer"] if OWN_TASKS[task] is MMBENCH_COLUMNS else plain_word(row["answer"] or "")
        if not answer or (allowed and answer not in allowed):
            choices = f"one of {', '.join(allowed)}" if allowed else "a word"
            raise UserError(f"{file}: row {number}: answer {row['answer']!r} should be {choices}; mend the row")
        name = str(row.get("question_id", row.get("index")))
        if name in seen:
            raise UserError(f"{file}: row {number}: id {name} is that of row {seen[name]} too; give each row its own")
        seen[name] = number
        if "kind" in row and row["kind"] not in ("open", "yes_no"):
            raise UserError(f"{file}: row {number}: kind {row['kind']!r} should be open or yes_no; mend the row")


def _allowed(row: dict[str, Any], columns: Sequence[str]) -> list[str]:
    """The answers a row may have; an empty list if any will do."""
    if columns is POPE_COLUMNS:
        return ["yes", "no"]
    if columns is MMBENCH_COLUMNS:
        return list(mmbench_options(row))
    assert columns is EASY_VQA_COLUMNS
    return []
