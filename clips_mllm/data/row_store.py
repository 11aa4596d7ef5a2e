"""Checked conversations on disk, mapped into memory: a rank's memory does not grow with the size of the set.

    source --once, over all cores--> rows.arrow + report.json --memory-mapped, by every rank--> examples

The first process that needs a source converts it under a lock, into a folder that appears whole; the others wait and
map it. The folder's name is a hash of the file's path, size and time of change, the image folder, and of the rules.
"""

from __future__ import annotations

import dataclasses
import json
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
from clips_mllm.data.row_checks import Checked, check_rows
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

if TYPE_CHECKING:
    import numpy as np
    from datasets import Dataset

RULES = 5  # raise when rows are checked or written in another way: caches of before are then not read
REMEMBERED = 1000  # missing files that are looked for again when the cache is opened
COLUMNS = ("number", "messages", "images", "inside", "length")


@dataclasses.dataclass(frozen=True, kw_only=True)
class StoreReport:
    """What the check of all rows found.

    Attributes:
        rows: rows of the source.
        dropped, mended: how often, by cause.
        first: the first row of each cause of dropping, in words.
        missing: files that were not there (the first thousand).
    """

    rows: int
    dropped: dict[str, int]
    mended: dict[str, int]
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
        folder = _opened(source, base)
        self.report = StoreReport(**read_object(folder / "report.json"))
        self.table = Dataset.from_file(str(folder / "rows.arrow")).with_format("arrow")
        self.base = base

    def __len__(self) -> int:
        return len(self.table)

    def example(self, at: int) -> Example:
        """The conversation at a place."""
        row = self.table[at]
        inside = row["inside"][0].as_py()
        images = list(range(inside)) if inside else row["images"][0].as_py()
        return Example(json.loads(row["messages"][0].as_py()), images)

    def number(self, at: int) -> int:
        """The row's number in the source."""
        return int(self.table[at]["number"][0].as_py())

    def image(self, at: int, name: str | int) -> bytes:
        """An encoded image: a file, or one that lies in the row. Raises OSError."""
        if isinstance(name, str):
            return (self.images / name).read_bytes()
        assert self.base is not None, "images lie in rows of tables only"
        return image_bytes(table_rows(self.base, self.number(at))[0], name)

    def lengths(self) -> np.ndarray:
        """Rough lengths, int32; negative for text-only samples."""
        return self.table.data.column("length").to_numpy()


def cache_folder() -> Path:
    """Beside the caches of `datasets`, which HF_DATASETS_CACHE moves."""
    import datasets

    return Path(datasets.config.HF_DATASETS_CACHE) / "clips_mllm"


def _opened(source: InstructionSource, base: Dataset | None) -> Path:
    from filelock import FileLock

    folder = cache_folder() / _key(source, base)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"):
        if not _is_current(folder):
            _write(source, base, folder)
    return folder


def _key(source: InstructionSource, base: Dataset | None) -> str:
    words: list[Any] = [RULES, str(image_folder(source).resolve())]
    if base is None:
        require_file(source)
        file = Path(source.file)
        state = file.stat()
        words += [str(file.resolve()), state.st_size, state.st_mtime_ns]
    else:
        words += [source.file, source.split, base._fingerprint]
    return value_hash(words)[:32]


def _is_current(folder: Path) -> bool:
    """Whether the cache is there, and none of the files that were missing has come since."""
    if not (folder / "report.json").is_file():
        return False
    return not any(Path(name).is_file() for name in read_object(folder / "report.json")["missing"])


def _write(source: InstructionSource, base: Dataset | None, folder: Path) -> None:
    """Check all rows and leave the cache, whole or not at all."""
    import pyarrow as pa

    types = [pa.int64(), pa.large_string(), pa.list_(pa.string()), pa.int32(), pa.int32()]
    schema = pa.schema(list(zip(COLUMNS, types, strict=True)))
    work = folder.with_name(f"{folder.name}.partial")
    shutil.rmtree(work, ignore_errors=True)  # of a process that was killed; the lock is ours
    work.mkdir(parents=True)
    total = Checked()
    try:
        with pa.OSFile(str(work / "rows.arrow"), "wb") as file, pa.ipc.new_stream(file, schema) as writer:
            for checked in spread(check_rows, _chunks(source, base)):
                columns = {name: getattr(checked, name) for name in COLUMNS}
                writer.write_batch(pa.RecordBatch.from_pydict(columns, schema=schema))
                _add(total, checked)
        report = StoreReport(
            rows=total.rows,
            dropped=dict(total.dropped),
            mended=dict(total.mended),
            first=total.first,
            missing=total.missing[:REMEMBERED],
        )
        write_text(work / "report.json", json.dumps(dataclasses.asdict(report), indent=1))
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(work, folder)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _chunks(source: InstructionSource, base: Dataset | None) -> Iterator[tuple[Path, int, list[Any]]]:
    """(image folder, number of the first row, rows), with a bar once it takes a while."""
    folder = image_folder(source)
    rows = json_chunks(source) if base is None else table_chunks(base)
    count = None if base is None else len(base)
    begin = 0
    with tqdm(desc=f"Checking {source.file}", unit=" rows", total=count, delay=3, file=sys.stderr) as bar:
        for chunk in rows:
            yield folder, begin, chunk if base is None else [without_bytes(row) for row in chunk]
            begin += len(chunk)
            bar.update(len(chunk))


def _add(total: Checked, one: Checked) -> None:
    total.rows += one.rows
    total.dropped += one.dropped
    total.mended += one.mended
    total.first = one.first | total.first
    total.missing += one.missing[: REMEMBERED - len(total.missing)]


def say(source: InstructionSource, report: StoreReport, usable: int, max_bad_fraction: float, quiet: bool) -> None:
    """Tell what is skipped, a row of each cause first. Raises UserError where it is more than `max_bad_fraction`, or
    all."""
    bad = Counter(report.dropped)
    if not bad:
        return
    if not quiet:
        for cause in bad:
            print(f"skipped: {source.file}: {report.first[cause]}", file=sys.stderr, flush=True)
    causes = ", ".join(f"{count} x {cause}" for cause, count in bad.most_common())
    if bad.total() > max_bad_fraction * report.rows or not usable:
        raise UserError(
            f"{bad.total()} of {report.rows} rows are unusable ({causes}), more than "
            f"data.max_bad_fraction={max_bad_fraction}; `clips-mllm data doctor` tells which",
            file=source.file,
            remedy="mend the file or raise the limit",
        )
    if not quiet:
        print(f"skipped: {source.file}: {bad.total()} of {report.rows} rows: {causes}", file=sys.stderr, flush=True)
