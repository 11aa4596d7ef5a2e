"""Shards to rows: WebDataset tars and Parquet files, on disk or behind any fsspec URL.

pattern --> find_shards: braces, then globs --> URLs --> read_shard: opened when its turn comes --> Row, Row, ...

A row is what lies in the shard, still encoded; `vision_tower.data.pairs` tells images and captions apart.
"""

from __future__ import annotations

import dataclasses
import functools
import glob
import queue
import re
import sys
import tarfile
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import urlsplit

from vision_tower.common.errors import UserError

PATIENCE = 60.0  # seconds that a remote shard may stay silent
TRIES = 4  # attempts at a remote shard without a new row in between
BACKOFF = 1.0  # seconds before the second attempt; twice as long before each further one
AHEAD = 64  # rows that a remote shard is read ahead of their use
PARQUET_ROWS = 64  # rows decoded together


@dataclasses.dataclass(frozen=True)
class Row:
    """A sample as it lies in its shard.

    Args:
        shard: the shard's path or URL.
        index: number of the row in its shard, from 0.
        key: name of the row: of its members in a tar, its number in Parquet.
        fields: encoded members by ending (tar), or values by column (Parquet).
    """

    shard: str
    index: int
    key: str
    fields: dict[str, Any]


class BadShard(Exception):
    """A shard, or the rest of one, cannot be read. `cause` is one of a few words, the message has the details."""

    def __init__(self, cause: str, details: str) -> None:
        super().__init__(details)
        self.cause = cause


# --- which shards


def find_shards(pattern: str) -> list[str]:
    """The shards of a pattern, in the order of its braces and sorted within each glob; none is opened.

    Braces as in bash: `{000..127}` and `{a,b}`; then globs. Raises UserError where there is none, a local one is
    missing, its ending is unknown, or the URL needs a package that is not installed.
    """
    found: list[str] = []
    for part in expand_braces(pattern):
        found += _remote(part) if is_remote(part) else _local(part.removeprefix("file://"))
    if not found:
        raise UserError(f"{pattern}: no shard matches this pattern", remedy="build the sample world or mend it")
    for shard in found:
        if _ending(shard) not in READERS:
            raise UserError(
                f"no shard by its ending ({', '.join(READERS)})", file=shard, remedy="convert it or mend the pattern"
            )
    return list(dict.fromkeys(found))


def expand_braces(pattern: str) -> list[str]:
    """`a{08..10}{x,y}` -> a08x, a08y, a09x, ...; from the innermost brace outwards."""
    match = re.search(r"\{([^{}]*)\}", pattern)
    if match is None:
        return [pattern]
    inside = match.group(1)
    if span := re.fullmatch(r"(\d+)\.\.(\d+)", inside):
        first, last = span.groups()
        padded = any(len(number) > 1 and number.startswith("0") for number in (first, last))
        width = max(len(first), len(last)) if padded else 0
        step = 1 if int(first) <= int(last) else -1
        options = [f"{number:0{width}d}" for number in range(int(first), int(last) + step, step)]
    elif "," in inside:
        options = inside.split(",")
    else:
        raise UserError(f"{pattern}: '{{{inside}}}' is neither a range as {{000..127}} nor a list as {{a,b}}")
    before, after = pattern[: match.start()], pattern[match.end() :]
    return [whole for option in options for whole in expand_braces(before + option + after)]


def is_remote(shard: str) -> bool:
    """Whether a shard is read through fsspec."""
    return "://" in shard and not shard.startswith("file://")


def _local(part: str) -> list[str]:
    if glob.has_magic(part):
        return sorted(glob.glob(part, recursive=True))
    if not Path(part).exists():
        raise UserError(f"{part}: no such shard", remedy="fetch it or mend the pattern")
    return [part]


def _remote(part: str) -> list[str]:
    """URLs of a URL pattern. One without `*` and `[` is taken as it is: asking after thousands would take minutes."""
    import fsspec

    chain, colons, last = part.rpartition("::")
    try:
        if not re.search(r"[*\[]", part):  # a question mark begins the query of an address
            fsspec.get_filesystem_class(last.partition("://")[0])
            return [part]
        files, path = fsspec.core.url_to_fs(last)
        return [chain + colons + files.unstrip_protocol(name) for name in sorted(files.glob(path))]
    except (ImportError, ValueError) as error:
        raise UserError(f"{part}: {' '.join(str(error).split())}") from error
    except Exception as error:  # every store has errors of its own
        raise UserError(
            f"{part}: the shards cannot be listed ({_words(error)})", remedy="check address and access"
        ) from error


# --- from a shard to its rows


Wanted = Callable[[int], bool]


def read_shard(shard: str, names: frozenset[str], wanted: Wanted, begin: int = 0) -> Iterator[Row]:
    """The rows of a shard from number `begin` on whose number is wanted, with the fields in `names` that they have.

    A remote shard is read ahead in a thread. Where it fails or stays silent it is opened again at the row it had come
    to, with pauses that double. Raises BadShard at a local fault, or when the tries are used up.
    """
    if not is_remote(shard):
        yield from _read(shard, names, wanted, begin)
        return
    failures = 0
    while True:
        try:
            pulse = _Pulse()
            for row in _in_thread(_read(shard, names, pulse.with_each(wanted), begin), pulse):
                begin, failures = row.index + 1, 0
                yield row
            return
        except BadShard as error:
            failures += 1
            if failures == TRIES:
                raise
            print(f"{shard}: {error}; trying again", file=sys.stderr, flush=True)
            time.sleep(BACKOFF * 2 ** (failures - 1))


def _read(shard: str, names: frozenset[str], wanted: Wanted, begin: int) -> Iterator[Row]:
    """One attempt. Every failure is a BadShard."""
    import pyarrow as pa

    def still_wanted(index: int) -> bool:
        return wanted(index) and index >= begin  # it is asked about the rows that are skipped, too

    try:
        with _open(shard) as file:
            yield from READERS[_ending(shard)](shard, file, names, still_wanted)
    except (tarfile.TarError, EOFError, zlib.error, pa.ArrowException) as error:
        raise BadShard("broken shard", _words(error)) from error
    except FileNotFoundError as error:
        raise BadShard("missing shard", _words(error)) from error
    except OSError as error:
        raise BadShard("unreadable shard", _words(error)) from error
    except Exception as error:
        if not is_remote(shard):
            raise
        raise BadShard("unreadable shard", _words(error)) from error  # every store has errors of its own


def _open(shard: str) -> BinaryIO:
    if not is_remote(shard):
        return open(shard, "rb")
    import fsspec

    return fsspec.open(shard, "rb").open()


def _words(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


class _Pulse:
    """Signs of life of a thread that reads: rows that it skips are some, too."""

    def __init__(self) -> None:
        self.last = time.monotonic()
        self.left = threading.Event()  # nobody waits for it any more

    def with_each(self, wanted: Wanted) -> Wanted:
        """`wanted`, and a sign of life with each question."""

        def asked(index: int) -> bool:
            if self.left.is_set():
                raise BadShard("slow shard", "given up")
            self.last = time.monotonic()
            return wanted(index)

        return asked


def _in_thread(rows: Iterator[Row], pulse: _Pulse) -> Iterator[Row]:
    """The rows, read ahead by a thread that is left behind once it has given no sign of life for PATIENCE seconds."""
    ready: queue.Queue[Row | BaseException | None] = queue.Queue(AHEAD)
    left = pulse.left

    def put(item: Row | BaseException | None) -> None:
        while not left.is_set():
            try:
                return ready.put(item, timeout=0.2)
            except queue.Full:
                continue

    def work() -> None:
        try:
            for row in rows:
                put(row)
                if left.is_set():
                    return
            put(None)
        except BaseException as error:
            put(error)

    threading.Thread(target=work, daemon=True, name="shard reader").start()
    try:
        since = time.monotonic()
        while True:
            heard = max(since, pulse.last)
            try:
                item = ready.get(timeout=max(heard + PATIENCE - time.monotonic(), 0))
            except queue.Empty:
                if pulse.last > heard:
                    continue
                raise BadShard("slow shard", f"silent for {PATIENCE:g} seconds") from None
            if item is None:
                return
            if isinstance(item, BaseException):
                raise item
            yield item
            since = time.monotonic()
    finally:
        left.set()


def _read_tar(shard: str, file: BinaryIO, names: frozenset[str], wanted: Wanted) -> Iterator[Row]:
    """Consecutive members that share the name up to the first dot of its last part are a row."""
    row = Row(shard, -1, "", {})
    name = ""
    with tarfile.open(fileobj=file) as tar:
        if not tar.offset:  # asked for a member, Python 3.10 would seek to before the start
            raise tarfile.ReadError("empty")
        try:
            while (member := tar.next()) is not None:
                tar.members.clear()  # type: ignore[attr-defined]  # else they pile up
                if not member.isfile():
                    continue
                name = member.name
                folder, slash, last = name.rpartition("/")
                stem, _, ending = last.partition(".")
                key = _key(folder or slash, stem)
                if key != row.key or row.index < 0:
                    if row.index >= 0 and wanted(row.index):
                        yield row
                    row = Row(shard, row.index + 1, key, {})
                if ending.lower() in names and wanted(row.index):
                    row.fields[ending.lower()] = _content(tar, member)
            _check_end(tar)
        except (tarfile.TarError, EOFError, zlib.error) as error:
            raise tarfile.ReadError(f"after '{name}': {_words(error)}") from error
    if row.index < 0:
        raise tarfile.ReadError("empty")
    if wanted(row.index):
        yield row


@functools.lru_cache(maxsize=1)
def _key(folder: str, stem: str) -> str:
    """Of the members of one row, which follow each other."""
    return str(Path(folder) / stem)


def _content(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    """Past the three objects that `extractfile` puts between a member and its bytes."""
    if member.sparse is not None:  # type: ignore[attr-defined]
        stream = tar.extractfile(member)
        assert stream is not None
        return stream.read()
    assert tar.fileobj is not None
    tar.fileobj.seek(member.offset_data)
    content = tar.fileobj.read(member.size)
    if len(content) < member.size:
        raise tarfile.ReadError("unexpected end of data")
    return content


def _check_end(tar: tarfile.TarFile) -> None:
    """tarfile takes a damaged header for the end of the archive; a real end is zeros, or nothing."""
    assert tar.fileobj is not None
    tar.fileobj.seek(tar.offset)
    if tar.fileobj.read(tarfile.BLOCKSIZE).strip(b"\0"):
        raise tarfile.ReadError("damaged header")


def _read_parquet(shard: str, file: BinaryIO, names: frozenset[str], wanted: Wanted) -> Iterator[Row]:
    """Row groups without a wanted row are not touched, nor are other columns."""
    import pyarrow.parquet as pq

    table = pq.ParquetFile(file, buffer_size=2**20)  # else a row group's images are held at once
    if not table.metadata.num_rows:
        raise tarfile.ReadError("empty")
    columns = [name for name in table.schema_arrow.names if name in names]
    index = 0
    for group in range(table.num_row_groups):
        end = index + table.metadata.row_group(group).num_rows
        if not any(wanted(number) for number in range(index, end)):
            index = end
            continue
        for batch in table.iter_batches(PARQUET_ROWS, row_groups=[group], columns=columns):
            for fields in batch.to_pylist():
                if wanted(index):
                    yield Row(shard, index, str(index), fields)
                index += 1


Reader = Callable[[str, BinaryIO, frozenset[str], Wanted], Iterator[Row]]
READERS: dict[str, Reader] = {".tar": _read_tar, ".tgz": _read_tar, ".tar.gz": _read_tar, ".parquet": _read_parquet}


def _ending(shard: str) -> str:
    """The declared format: the file name's ending, without an address's query."""
    name = Path(urlsplit(shard.rpartition("::")[2]).path if is_remote(shard) else shard).name.lower()
    return ".tar.gz" if name.endswith(".tar.gz") else Path(name).suffix
