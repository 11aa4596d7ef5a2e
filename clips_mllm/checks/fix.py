"""Clean copies for `data doctor --fix`: without unusable rows, with fixed ones. Files appear when complete."""

from __future__ import annotations

import io
import itertools
import json
import tarfile
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from clips_mllm.data.json_rows import read_rows
from clips_mllm.data.llava_json import ROLES, image_parts, opening_answers, turns_key, with_decoded_turns
from clips_mllm.data.recipe import InstructionSource
from clips_mllm.data.row_source import is_json, open_table
from vision_tower.common.errors import UserError
from vision_tower.common.files import atomic_file


def check_copy(source: InstructionSource, copy: Path, shards: bool) -> None:
    """Raise UserError if the copy would have another format, or overwrite the source."""
    if copy.resolve() == Path(source.file).resolve():
        raise UserError("would overwrite the checked file", key="--fix", value=copy, remedy="give another name")
    if shards:
        if copy.suffix:
            raise UserError("shards need a folder", key="--fix", value=copy, remedy="give a name without suffix")
        return
    suffixes = (".json", ".jsonl") if is_json(source) else (".parquet",)
    if copy.suffix not in suffixes:
        raise UserError(
            f"not the format of {source.file}", key="--fix", value=copy, remedy=f"end it with {' or '.join(suffixes)}"
        )


def copy_rows(source: InstructionSource, copy: Path, bad: Collection[int], files: Mapping[int, list[str]]) -> None:
    """Copy the usable rows of a JSON, JSONL or table; JSON rows without opening answers, and with existing image paths.

    Args:
        bad: numbers of rows to leave out.
        files: by row number, image paths that replace those in the row.
    """
    if not is_json(source):
        table = open_table(source)
        with atomic_file(copy) as work:
            table.select([number for number in range(len(table)) if number not in bad]).to_parquet(str(work))
        return
    lines = copy.suffix == ".jsonl"
    # A lone surrogate in the text makes a row unusable; in other fields, such as an id, it is written as "?".
    with atomic_file(copy) as work, work.open("w", encoding="utf-8", errors="replace") as out:
        separator = "" if lines else "[\n"
        for number, row in enumerate(read_rows(Path(source.file))):
            if number not in bad:
                out.write(separator + json.dumps(_fixed(row, files.get(number)), ensure_ascii=False))
                separator = "\n" if lines else ",\n"
        out.write("\n" if lines else "\n]\n" if separator != "[\n" else "[\n]\n")


def _fixed(row: dict[str, Any], files: list[str] | None) -> dict[str, Any]:
    parsed = with_decoded_turns(row)  # turns given as a JSON string stay a string unless something in them is fixed
    turns = parsed.get(turns_key(parsed))
    if isinstance(turns, list):
        opening = opening_answers([ROLES[turn.get("from") or turn["role"]] for turn in turns])
        if opening:
            del turns[opening]
            row = parsed
    if files is None:
        return row
    for key in ("image", "images"):
        if row.get(key):
            return row | {key: files[0] if isinstance(row[key], str) else files}
    for (part, name), file in zip(image_parts(parsed), files, strict=True):
        part[name] = file
    return parsed


def refuse_same_names(shards: Iterable[str]) -> None:
    """Raise UserError if two shards have the same file name, since copies are written to one folder."""
    known: dict[str, str] = {}
    for shard in shards:
        name = _name(shard)
        if name in known:
            raise UserError(f"named like {known[name]}", file=shard, key="--fix", remedy="fix one folder at a time")
        known[name] = shard


def _name(shard: str) -> str:
    return Path(shard.partition("?")[0]).name


def copy_shard(shard: str, folder: Path, names: frozenset[str], bad: Collection[int]) -> None:
    """Copy the usable rows of a pretraining shard into a shard of the same name, unless there are none."""
    from vision_tower.data.shards import BadShard, read_shard

    folder.mkdir(parents=True, exist_ok=True)
    name = _name(shard)

    def usable() -> Iterator[Any]:
        try:
            yield from read_shard(shard, names, lambda number: number not in bad)
        except BadShard:
            return  # the doctor counts it; rows before the damage are kept

    rows = usable()
    first = next(rows, None)
    if first is None:
        return
    with atomic_file(folder / name) as work:
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
