"""Clean copies: what the doctor dropped is left out, what it can mend in the file is mended. Whole files or none."""

from __future__ import annotations

import io
import itertools
import json
import os
import tarfile
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from clips_mllm.data.json_rows import read_rows
from clips_mllm.data.llava_json import ROLES, image_parts, opening_answers, turns_key, turns_read
from clips_mllm.data.recipe import InstructionSource
from clips_mllm.data.row_source import is_json, open_table
from vision_tower.common.errors import UserError


def check_copy(source: InstructionSource, copy: Path, shards: bool) -> None:
    """Raise UserError where the copy would be of another kind, or replace what it is copied from."""
    if copy.resolve() == Path(source.file).resolve():
        raise UserError(f"--fix {copy}: that is the file itself", remedy="give another name")
    if shards:
        if copy.suffix:
            raise UserError(f"--fix {copy}: shards are copied into a folder", remedy="give its name")
        return
    wanted = (".json", ".jsonl") if is_json(source) else (".parquet",)
    if copy.suffix not in wanted:
        raise UserError(f"--fix {copy}: write {' or '.join(wanted)}, as {source.file} is read")


def copy_rows(source: InstructionSource, copy: Path, bad: Collection[int], files: Mapping[int, list[str]]) -> None:
    """The good rows of a JSON, JSONL or table, as they were but for an opening answer and renamed images.

    Args:
        bad: numbers of rows that are left out.
        files: the images that are there, by number of the row.
    """
    if not is_json(source):
        table = open_table(source)
        with _whole(copy) as work:
            table.select([at for at in range(len(table)) if at not in bad]).to_parquet(str(work))
        return
    lines = copy.suffix == ".jsonl"
    # Half a character makes a row bad where it is read; elsewhere, as in an id, it becomes "?".
    with _whole(copy) as work, work.open("w", encoding="utf-8", errors="replace") as out:
        between = "" if lines else "[\n"
        for number, row in enumerate(read_rows(Path(source.file))):
            if number not in bad:
                out.write(between + json.dumps(_mend(row, files.get(number)), ensure_ascii=False))
                between = "\n" if lines else ",\n"
        out.write("\n" if lines else "\n]\n" if between != "[\n" else "[\n]\n")


def _mend(row: dict[str, Any], files: list[str] | None) -> dict[str, Any]:
    read = turns_read(row)  # what is JSON as text stays text where nothing in it is to be mended
    turns = read.get(turns_key(read))
    if isinstance(turns, list):
        opening = opening_answers([ROLES[turn.get("from") or turn["role"]] for turn in turns])
        if opening:
            del turns[opening]
            row = read
    if files is None:
        return row
    for key in ("image", "images"):
        if row.get(key):
            return row | {key: files[0] if isinstance(row[key], str) else files}
    for (part, name), file in zip(image_parts(read), files, strict=True):
        part[name] = file
    return read


def refuse_same_names(shards: Iterable[str]) -> None:
    """Copies lie in one folder. Raises UserError where one would take another's place."""
    known: dict[str, str] = {}
    for shard in shards:
        name = _name(shard)
        if name in known:
            raise UserError(
                f"{known[name]} and {shard} have the same name", key="--fix", remedy="mend one folder at a time"
            )
        known[name] = shard


def _name(shard: str) -> str:
    return Path(shard.partition("?")[0]).name


def copy_shard(shard: str, folder: Path, names: frozenset[str], bad: Collection[int]) -> None:
    """The good rows of a pretraining shard, into a shard of the same name; none where there is no good row."""
    from vision_tower.data.shards import BadShard, read_shard

    folder.mkdir(parents=True, exist_ok=True)
    name = _name(shard)

    def good() -> Iterator[Any]:
        try:
            yield from read_shard(shard, names, lambda number: number not in bad)
        except BadShard:
            return  # counted by the doctor; what came before the fault is kept

    rows = good()
    first = next(rows, None)
    if first is None:
        return
    with _whole(folder / name) as work:
        (_write_parquet if name.endswith(".parquet") else _write_tar)(work, itertools.chain([first], rows))


def _write_tar(work: Path, rows: Iterator[Any]) -> None:
    with tarfile.open(work, "w") as tar:
        for row in rows:
            for ending, content in row.fields.items():
                member = tarfile.TarInfo(f"{row.key}.{ending}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))


def _write_parquet(work: Path, rows: Iterator[Any]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.Table.from_pylist([row.fields for row in rows]), work)


@contextmanager
def _whole(file: Path) -> Iterator[Path]:
    """A name to write to; the file appears under its own when all went well."""
    file.parent.mkdir(parents=True, exist_ok=True)
    work = file.with_name(f".{file.name}.partial")
    try:
        yield work
        os.replace(work, file)
    finally:
        work.unlink(missing_ok=True)
