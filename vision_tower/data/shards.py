"""Rows of shards: WebDataset tars and Parquet files, on disk or at any fsspec URL.

pattern --> find_shards: braces, then globs --> URLs --> read_shard: opened when needed --> Row, Row, ...

A row has the stored, still encoded fields; `vision_tower.data.pairs` finds image and captions in them.
"""

from __future__ import annotations

import dataclasses
import functools
import glob
import logging
import queue
import re
import tarfile
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO
from urllib.parse import urlsplit

from vision_tower.common.errors import UserError

logger = logging.getLogger(__name__)

TIMEOUT = 60.0  # seconds without data after which a remote shard is opened again
MAX_TRIES = 4  # consecutive failures of a remote shard, without a new row in between
BACKOFF = 1.0  # seconds before the second attempt, doubled before each further one
PREFETCH = 64  # rows of a remote shard read ahead
PARQUET_ROWS = 64  # rows decoded together


@dataclasses.dataclass(frozen=True)
class Row:
    """A sample as stored in its shard.

    Args:
        shard: the shard's path or URL.
        index: index of the row in its shard, from 0.
        key: common name of the members (tar), or the index (Parquet).
        fields: encoded members by extension (tar), or values by column (Parquet).
    """

    shard: str
    index: int
    key: str
    fields: dict[str, Any]


class BadShard(Exception):
    """A shard, or the rest of one, cannot be read. Shards are counted by `cause`."""

    def __init__(self, cause: str, details: str) -> None:
        super().__init__(details)
        self.cause = cause


def find_shards(pattern: str) -> list[str]:
    """Return the shards of a pattern, in the order of its braces and sorted within each glob; none is opened.

    Braces as in bash, `{000..127}` and `{a,b}`, are expanded before globs.

    Raises:
        UserError: no match, a missing local shard, an unknown extension, or a URL whose package is not installed.
    """
    found: list[str] = []
    for part in expand_braces(pattern):
        found += _remote(part) if is_remote(part) else _local(part.removeprefix("file://"))
    if not found:
        raise UserError("no shard matches this pattern", file=pattern, remedy="fix the pattern, or create the data")
    for shard in found:
        if _extension(shard) not in READERS:
            raise UserError(f"not a shard ({', '.join(READERS)})", file=shard, remedy="convert it, or fix the pattern")
    return list(dict.fromkeys(found))


def expand_braces(pattern: str) -> list[str]:
    """`a{08..10}{x,y}` -> a08x, a08y, a09x, ...; expands the innermost brace first."""
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
        raise UserError(f"'{{{inside}}}' is neither a range like {{000..127}} nor a list like {{a,b}}", file=pattern)
    before, after = pattern[: match.start()], pattern[match.end() :]
    return [path for option in options for path in expand_braces(before + option + after)]


def is_remote(shard: str) -> bool:
    """Return True if the shard is read through fsspec."""
    return "://" in shard and not shard.startswith("file://")


def _local(part: str) -> list[str]:
    if glob.has_magic(part):
        return sorted(glob.glob(part, recursive=True))
    if not Path(part).exists():
        raise UserError("no such shard", file=part, remedy="download it, or fix the pattern")
    return [part]


def _remote(part: str) -> list[str]:
    """Return the URLs of a URL pattern. One without `*` and `[` is not looked up: thousands would take minutes."""
    import fsspec

    chain, colons, last = part.rpartition("::")
    try:
        if not re.search(r"[*\[]", part):  # not `?`, which starts the query of a URL
            fsspec.get_filesystem_class(last.partition("://")[0])
            return [part]
        files, path = fsspec.core.url_to_fs(last)
        return [chain + colons + files.unstrip_protocol(name) for name in sorted(files.glob(path))]
    except (ImportError, ValueError) as error:
        raise UserError(_message(error), file=part) from error
    except Exception as error:  # each fsspec backend has its own errors
        raise UserError(f"cannot be listed ({_message(error)})", file=part, remedy="check URL and access") from error


Wanted = Callable[[int], bool]


def read_shard(shard: str, names: frozenset[str], wanted: Wanted, begin: int = 0) -> Iterator[Row]:
    """Yield the rows of a shard from index `begin` on whose index is wanted, with their fields out of `names`.

    A remote shard is read ahead in a thread. After an error or a timeout it is opened again at the next row, with
    exponential backoff.

    Raises:
        BadShard: a local shard failed, or a remote one MAX_TRIES times.
    """
    if not is_remote(shard):
        yield from _read(shard, names, wanted, begin)
        return
    failures = 0
    while True:
        try:
            heartbeat = _Heartbeat()
            for row in _read_ahead(_read(shard, names, heartbeat.with_each(wanted), begin), heartbeat):
                begin, failures = row.index + 1, 0
                yield row
            return
        except BadShard as error:
            failures += 1
            if failures == MAX_TRIES:
                raise
            logger.warning("%s: %s; trying again", shard, error)
            time.sleep(BACKOFF * 2 ** (failures - 1))


def _read(shard: str, names: frozenset[str], wanted: Wanted, begin: int) -> Iterator[Row]:
    """Read a shard once. Every failure is raised as BadShard."""
    import pyarrow as pa

    def still_wanted(index: int) -> bool:
        return wanted(index) and index >= begin  # `wanted` sees the skipped rows too: each call is a heartbeat

    try:
        with _open(shard) as file:
            yield from READERS[_extension(shard)](shard, file, names, still_wanted)
    except (tarfile.TarError, EOFError, zlib.error, pa.ArrowException) as error:
        raise BadShard("broken shard", _message(error)) from error
    except FileNotFoundError as error:
        raise BadShard("missing shard", _message(error)) from error
    except OSError as error:
        raise BadShard("unreadable shard", _message(error)) from error
    except Exception as error:
        if not is_remote(shard):
            raise
        raise BadShard("unreadable shard", _message(error)) from error  # each fsspec backend has its own errors


def _open(shard: str) -> BinaryIO:
    if not is_remote(shard):
        return open(shard, "rb")
    import fsspec

    return fsspec.open(shard, "rb").open()


def _message(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__


class _Heartbeat:
    """Time of the last progress of a reading thread, counting the rows that it skips."""

    def __init__(self) -> None:
        self.last = time.monotonic()
        self.abandoned = threading.Event()  # set when nobody waits for the thread any more

    def with_each(self, wanted: Wanted) -> Wanted:
        """Return `wanted` with a heartbeat at each call."""

        def wanted_with_heartbeat(index: int) -> bool:
            if self.abandoned.is_set():
                raise BadShard("slow shard", "abandoned")
            self.last = time.monotonic()
            return wanted(index)

        return wanted_with_heartbeat


def _read_ahead(rows: Iterator[Row], heartbeat: _Heartbeat) -> Iterator[Row]:
    """Yield rows read by a thread, which is abandoned after TIMEOUT seconds without a heartbeat."""
    ready: queue.Queue[Row | BaseException | None] = queue.Queue(PREFETCH)
    abandoned = heartbeat.abandoned

    def put(item: Row | BaseException | None) -> None:
        while not abandoned.is_set():
            try:
                return ready.put(item, timeout=0.2)
            except queue.Full:
                continue

    def work() -> None:
        try:
            for row in rows:
                put(row)
                if abandoned.is_set():
                    return
            put(None)
        except BaseException as error:
            put(error)

    threading.Thread(target=work, daemon=True, name="shard reader").start()
    try:
        since = time.monotonic()
        while True:
            heard = max(since, heartbeat.last)
            try:
                item = ready.get(timeout=max(heard + TIMEOUT - time.monotonic(), 0))
            except queue.Empty:
                if heartbeat.last > heard:
                    continue
                raise BadShard("slow shard", f"no data for {TIMEOUT:g} seconds") from None
            if item is None:
                return
            if isinstance(item, BaseException):
                raise item
            yield item
            since = time.monotonic()
    finally:
        abandoned.set()


def _read_tar(shard: str, file: BinaryIO, names: frozenset[str], wanted: Wanted) -> Iterator[Row]:
    """Yield rows: consecutive members whose paths are equal up to the first dot of the file name."""
    row = Row(shard, -1, "", {})
    name = ""
    with tarfile.open(fileobj=file) as tar:
        if not tar.offset:  # in Python 3.10 next() would seek to a negative offset
            raise tarfile.ReadError("empty")
        try:
            while (member := tar.next()) is not None:
                tar.members.clear()  # type: ignore[attr-defined]  # else the list grows with the archive
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
            raise tarfile.ReadError(f"after '{name}': {_message(error)}") from error
    if row.index < 0:
        raise tarfile.ReadError("empty")
    if wanted(row.index):
        yield row


@functools.lru_cache(maxsize=1)
def _key(folder: str, stem: str) -> str:
    """Return the key of a member; cached, since the members of a row follow each other."""
    return str(Path(folder) / stem)


def _content(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    """Read a member without the three wrapper objects of `extractfile`."""
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
    """Raise ReadError unless the archive ends with zeros or nothing: tarfile ends silently at a damaged header."""
    assert tar.fileobj is not None
    tar.fileobj.seek(tar.offset)
    if tar.fileobj.read(tarfile.BLOCKSIZE).strip(b"\0"):
        raise tarfile.ReadError("damaged header")


def _read_parquet(shard: str, file: BinaryIO, names: frozenset[str], wanted: Wanted) -> Iterator[Row]:
    """Yield rows; row groups without a wanted row and other columns are not read."""
    import pyarrow.parquet as pq

    table = pq.ParquetFile(file, buffer_size=2**20)  # without it a row group is held in memory
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


def _extension(shard: str) -> str:
    """Return the extension of the file name, without the query of a URL."""
    name = Path(urlsplit(shard.rpartition("::")[2]).path if is_remote(shard) else shard).name.lower()
    return ".tar.gz" if name.endswith(".tar.gz") else Path(name).suffix
