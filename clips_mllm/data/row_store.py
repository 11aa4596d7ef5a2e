"""Row store: checked conversations on disk, memory-mapped, so that memory does not grow with the data set.

    source --once, on all cores--> rows.arrow + report.json --memory-mapped by every rank--> examples

The first process that needs a source converts it under a lock, into a folder that is renamed when it is complete. The
others wait and map it. The folder's name is a hash of the file's path, size and modification time, the image folder,
and the version of the rules.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import shutil
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from clips_mllm.data.llava_json import Example, image_bytes
from clips_mllm.data.parallel import spread
from clips_mllm.data.recipe import InstructionSource
from clips_mllm.data.row_checks import CheckedRows, check_rows
from clips_mllm.data.row_source import (
    image_folder,
    is_json,
    json_chunks,
    open_table,
    require_file,
    table_chunks,
    table_rows,
    without_bytes,
)
from vision_tower.common.errors import UserError
from vision_tower.common.files import read_object, write_text
from vision_tower.common.hashes import value_hash
from vision_tower.common.launcher import is_main_process

if TYPE_CHECKING:
    import numpy as np
    from datasets import Dataset

logger = logging.getLogger(__name__)

RULES = 6  # version of checks and file format; increment to invalidate old caches
MAX_MISSING = 1000  # missing image files that are recorded, and looked for again when the cache is opened
COLUMNS = ("number", "messages", "images", "inside", "length")


@dataclasses.dataclass(frozen=True, kw_only=True)
class StoreReport:
    """Result of the check of all rows.

    Attributes:
        rows: number of rows in the source.
        dropped, repaired: counts by cause.
        first: description of the first dropped row of each cause.
        missing: image files that do not exist (the first 1,000).
    """

    rows: int
    dropped: dict[str, int]
    repaired: dict[str, int]
    first: dict[str, str]
    missing: list[str]


class RowStore:
    """The usable rows of one source.

    Raises:
        UserError: the source cannot be read.
    """

    def __init__(self, source: InstructionSource) -> None:
        from datasets import Dataset

        self.source = source
        self.images = image_folder(source)
        base = None if is_json(source) else open_table(source)
        folder = _converted(source, base)
        self.report = StoreReport(**read_object(folder / "report.json"))
        self.table = Dataset.from_file(str(folder / "rows.arrow")).with_format("arrow")
        self.base = base

    def __len__(self) -> int:
        return len(self.table)

    def example(self, index: int) -> Example:
        """Return a conversation."""
        row = self.table[index]
        inside = row["inside"][0].as_py()
        images = list(range(inside)) if inside else row["images"][0].as_py()
        return Example(json.loads(row["messages"][0].as_py()), images)

    def number(self, index: int) -> int:
        """Return the row's number in the source."""
        return int(self.table[index]["number"][0].as_py())

    def image(self, index: int, name: str | int) -> bytes:
        """Return an encoded image, by path or by its index in the row. Raises OSError."""
        if isinstance(name, str):
            return (self.images / name).read_bytes()
        assert self.base is not None, "only rows of tables contain images"
        return image_bytes(table_rows(self.base, self.number(index))[0], name)

    def lengths(self) -> np.ndarray:
        """Return approximate lengths in words, int32; negative for text-only samples."""
        return self.table.data.column("length").to_numpy()


def cache_folder() -> Path:
    """Return the folder of all caches, in the cache of `datasets` (HF_DATASETS_CACHE)."""
    import datasets

    return Path(datasets.config.HF_DATASETS_CACHE) / "clips_mllm"


def _converted(source: InstructionSource, base: Dataset | None) -> Path:
    from filelock import FileLock

    folder = cache_folder() / _key(source, base)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):
        if not _is_current(folder):
            _write(source, base, folder)
    return folder


def _key(source: InstructionSource, base: Dataset | None) -> str:
    parts: list[Any] = [RULES, str(image_folder(source).resolve())]
    if base is None:
        require_file(source)
        file = Path(source.file)
        state = file.stat()
        parts += [str(file.resolve()), state.st_size, state.st_mtime_ns]
    else:
        parts += [source.file, source.split, base._fingerprint]
    return value_hash(parts)[:32]


def _is_current(folder: Path) -> bool:
    """Return True if the cache exists and the image files missing then are still missing."""
    if not (folder / "report.json").is_file():
        return False
    return not any(Path(name).is_file() for name in read_object(folder / "report.json")["missing"])


def _write(source: InstructionSource, base: Dataset | None, folder: Path) -> None:
    """Check all rows and write the cache, complete or not at all."""
    import pyarrow as pa

    types = [pa.int64(), pa.large_string(), pa.list_(pa.string()), pa.int32(), pa.int32()]
    schema = pa.schema(list(zip(COLUMNS, types, strict=True)))
    work = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(work, ignore_errors=True)  # left by a killed process, since this one has the lock
    work.mkdir(parents=True)
    total = CheckedRows()
    try:
        with pa.OSFile(str(work / "rows.arrow"), "wb") as file, pa.ipc.new_stream(file, schema) as writer:
            for checked in spread(check_rows, _chunks(source, base)):
                columns = {name: getattr(checked, name) for name in COLUMNS}
                writer.write_batch(pa.RecordBatch.from_pydict(columns, schema=schema))
                _add(total, checked)
        report = {name: getattr(total, name) for name in ("rows", "dropped", "repaired", "first")}
        report["missing"] = total.missing[:MAX_MISSING]
        write_text(work / "report.json", json.dumps(report, indent=1))
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(work, folder)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _chunks(source: InstructionSource, base: Dataset | None) -> Iterator[tuple[Path, int, list[Any]]]:
    """Yield (image folder, number of the first row, rows), with a progress bar after 3 seconds."""
    folder = image_folder(source)
    rows = json_chunks(source) if base is None else table_chunks(base)
    count = None if base is None else len(base)
    begin = 0
    with tqdm(desc=f"Checking {source.file}", unit=" rows", total=count, delay=3, file=sys.stderr) as bar:
        for chunk in rows:
            yield folder, begin, chunk if base is None else [without_bytes(row) for row in chunk]
            begin += len(chunk)
            bar.update(len(chunk))


def _add(total: CheckedRows, checked: CheckedRows) -> None:
    total.rows += checked.rows
    total.dropped += checked.dropped
    total.repaired += checked.repaired
    total.first = checked.first | total.first
    total.missing += checked.missing[: MAX_MISSING - len(total.missing)]


def report_skipped(store: RowStore, max_bad_fraction: float) -> None:
    """Log the unusable rows of a source by cause, with the first row of each.

    Raises:
        UserError: more than `max_bad_fraction` of the rows are unusable, or all.
    """
    bad = Counter(store.report.dropped)
    if not bad:
        return
    file, rows = store.source.file, store.report.rows
    ranked = sorted(bad.items(), key=lambda item: item[1], reverse=True)
    causes = ", ".join(f"{count} x {cause}" for cause, count in ranked)
    if is_main_process():
        for cause in bad:
            logger.warning("skipped: %s: %s", file, store.report.first[cause])
        logger.warning("skipped: %s: %d of %d rows: %s", file, bad.total(), rows, causes)
    if bad.total() > max_bad_fraction * rows or not len(store):
        raise UserError(
            f"{bad.total()} of {rows} rows are unusable ({causes}), more than data.max_bad_fraction={max_bad_fraction}",
            file=file,
            remedy="find them with `clips-mllm data doctor` and fix them, or raise the limit",
        )
