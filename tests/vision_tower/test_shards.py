"""Shard patterns, and reading shards, also from slow, missing or failing servers."""

from __future__ import annotations

import http.server
import os
import re
import shutil
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest

from tests.helpers.errors import raises_user_error
from tests.helpers.shard_files import counted, numbered, pair, png, tar_bytes, write_parquet, write_tar
from vision_tower.data import shards
from vision_tower.data.shards import BadShard, Row, expand_braces, find_shards, read_shard

NAMES = frozenset({"png", "json"})


def everything(shard: str, begin: int = 0) -> list[Row]:
    return list(read_shard(shard, NAMES, lambda _: True, begin))


@pytest.mark.parametrize(
    ("pattern", "expected"),
    [
        ("a.tar", ["a.tar"]),
        ("{0..2}.tar", ["0.tar", "1.tar", "2.tar"]),
        ("{08..11}", ["08", "09", "10", "11"]),
        ("{8..11}", ["8", "9", "10", "11"]),
        ("{098..100}", ["098", "099", "100"]),
        ("{2..0}", ["2", "1", "0"]),
        ("{a,b}-{0..1}", ["a-0", "a-1", "b-0", "b-1"]),
        ("{x{0..1},y}", ["x0", "y", "x1", "y"]),
        ("s3://b/{train,}", ["s3://b/train", "s3://b/"]),
    ],
)
def test_braces(pattern: str, expected: list[str]) -> None:
    assert expand_braces(pattern) == expected


def test_local_patterns(tmp_path: Path) -> None:
    for name in ("b0.tar", "a1.tar", "a0.tar", "a2.parquet", "sub/c.tar.gz"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"")  # none is opened
    for pattern, names in {
        "a*.tar": ["a0.tar", "a1.tar"],
        "{b,a}*.tar": ["b0.tar", "a0.tar", "a1.tar"],
        "a{1..2}.*": ["a1.tar", "a2.parquet"],
        "{a0,a0}.tar": ["a0.tar"],
        "**/*.tar.gz": ["sub/c.tar.gz"],
    }.items():
        expected = [str(tmp_path / name) for name in names]
        assert find_shards(str(tmp_path / pattern)) == find_shards(f"file://{tmp_path / pattern}") == expected


@pytest.mark.parametrize(
    ("pattern", "file"),
    [
        ("nowhere/*.tar", "nowhere/*.tar"),
        ("nowhere/{0..1}.tar", "nowhere/0.tar"),
        ("{a}.tar", "{a}.tar"),
        ("memory://x/a.zip", "memory://x/a.zip"),
        ("nosuch://x/a.tar", "nosuch://x/a.tar"),
        ("memory://nowhere/*.tar", "memory://nowhere/*.tar"),
    ],
)
def test_patterns_without_a_usable_shard_are_refused(pattern: str, file: str) -> None:
    with raises_user_error(file=file) as caught:
        find_shards(pattern)
    assert "\n" not in str(caught.value)


def test_fields_are_tar_members_and_parquet_columns(tmp_path: Path) -> None:
    members = [*pair("d/0"), ("d/0.npy", b"unread"), *pair("d/1.x"), ("e/1.PNG", png()), ("f", b"no ending")]
    rows = everything(str(write_tar(tmp_path / "a.tar", members)))
    assert [(row.index, row.key, set(row.fields)) for row in rows] == [
        (0, "d/0", {"png", "json"}),
        (1, "d/1", set()),  # the ending begins at the first dot: 'x.png'
        (2, "e/1", {"png"}),
        (3, "f", set()),
    ]
    columns = {"png": [str(n).encode() for n in range(10)], "other": list(range(10))}
    file = str(write_parquet(tmp_path / "b.parquet", columns, group=3))
    assert [(row.index, row.key, row.fields) for row in everything(file)] == [
        (n, str(n), {"png": str(n).encode()}) for n in range(10)
    ]
    assert [row.index for row in read_shard(file, NAMES, lambda n: n % 3 == 1, begin=4)] == [4, 7]
    compressed = tmp_path / "c.tar.gz"
    import gzip

    compressed.write_bytes(gzip.compress(tar_bytes(members)))
    assert [row.fields for row in everything(str(compressed))] == [row.fields for row in rows]


def test_only_wanted_fields_are_read_from_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of rows consumed before an interruption only the headers are read."""
    file = numbered(tmp_path, 1, 50).replace("*", "0")
    read: list[str] = []
    content = shards._content
    monkeypatch.setattr(shards, "_content", lambda tar, member: read.append(member.name) or content(tar, member))
    assert [row.key for row in everything(file, begin=48)] == ["048", "049"]
    assert read == ["048.png", "048.json", "049.png", "049.json"]


def test_sparse_members_and_long_names(tmp_path: Path) -> None:
    """A sparse file of GNU tar, and names that start with a dot or are longer than the header field."""
    (tmp_path / "0.png").write_bytes(b"begin" + bytes(1 << 20) + b"end")
    os.truncate(tmp_path / "0.png", 1 << 22)
    long = "n" * 150
    (tmp_path / f"{long}.png").write_bytes(b"long")
    words = ["tar", "--sparse", "--format=gnu", "-cf", "a.tar", "./0.png", f"./{long}.png"]
    if shutil.which("tar") is None or subprocess.run(words, cwd=tmp_path, check=False).returncode:
        pytest.skip("no GNU tar")
    first, second = everything(str(tmp_path / "a.tar"))
    assert os.stat(tmp_path / "a.tar").st_size < 1 << 21, "the hole is not stored"
    assert (first.key, first.fields["png"]) == ("0", (tmp_path / "0.png").read_bytes())
    assert (second.key, second.fields["png"]) == (long, b"long")


def test_fsspec_memory_urls_and_globs() -> None:
    import fsspec

    files = fsspec.filesystem("memory")
    for number in range(3):
        files.pipe(f"/pairs/{number}.tar", counted(number * 2, number * 2 + 2))
    assert find_shards("memory://pairs/*.tar") == [f"memory:///pairs/{number}.tar" for number in range(3)]
    assert find_shards("memory://pairs/{0..1}.tar") == ["memory://pairs/0.tar", "memory://pairs/1.tar"]
    for number, shard in enumerate(find_shards("memory://pairs/*.tar")):
        assert [row.key for row in everything(shard)] == [f"{number * 2:03d}", f"{number * 2 + 1:03d}"]


class Server(http.server.SimpleHTTPRequestHandler):
    """Serves a folder with byte ranges. The file name selects the fault: `flaky` fails twice, `hung` never answers,
    `busy` always fails."""

    requests: ClassVar[list[str]] = []
    release = threading.Event()

    def do_GET(self) -> None:
        name = self.path.rpartition("/")[2].partition("?")[0]
        Server.requests.append(name)
        if name.startswith("hung"):
            Server.release.wait(60)
            return
        if name.startswith("busy") or (name.startswith("flaky") and Server.requests.count(name) <= 2):
            return self.send_error(503)
        file = Path(self.directory) / name
        if not file.is_file():
            return self.send_error(404)
        content = file.read_bytes()
        start, end = 0, len(content)
        if found := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            start, end = int(found[1]), min(int(found[2] or end) + 1, end)
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start}-{end - 1}/{len(content)}")
        else:
            self.send_response(200)
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Length", str(end - start))
        self.end_headers()
        self.wfile.write(content[start:end])

    def do_HEAD(self) -> None:
        file = Path(self.directory) / self.path.rpartition("/")[2].partition("?")[0]
        if not file.is_file():
            return self.send_error(404)
        self.send_response(200)
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Length", str(file.stat().st_size))
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Address of a server for `tmp_path`, with short pauses between tries."""
    monkeypatch.setattr(shards, "BACKOFF", 0.01)
    Server.requests.clear()
    Server.release.clear()
    handler = type(
        "Here", (Server,), {"__init__": lambda self, *args: Server.__init__(self, *args, directory=str(tmp_path))}
    )
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as answering:
        answering.daemon_threads = True
        thread = threading.Thread(target=answering.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{answering.server_port}"
        Server.release.set()
        answering.shutdown()


def test_remote_shard_is_retried(server: str, tmp_path: Path) -> None:
    (tmp_path / "flaky.tar").write_bytes(counted(0, 5))
    (tmp_path / "good.parquet").write_bytes(write_parquet(tmp_path / "x", {"png": [png()] * 9}).read_bytes())
    assert [row.key for row in everything(f"{server}/flaky.tar?token=a", begin=1)] == ["001", "002", "003", "004"]
    assert len(everything(f"{server}/good.parquet")) == 9


@pytest.mark.parametrize(
    ("name", "cause"),
    [("gone", "missing shard"), ("busy", "unreadable shard"), ("hung", "slow shard"), ("cut", "broken shard")],
)
def test_remote_shard_fails_after_max_tries(
    server: str,
    tmp_path: Path,
    name: str,
    cause: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    if name == "hung":
        monkeypatch.setattr(shards, "TIMEOUT", 0.2)
    if name != "gone":
        (tmp_path / f"{name}.tar").write_bytes(counted(0, 3)[:2000])
    with pytest.raises(BadShard) as caught:
        everything(f"{server}/{name}.tar")
    assert caught.value.cause == cause
    assert len(caplog.records) == shards.MAX_TRIES - 1


def test_bad_remote_shards_do_not_stop_the_rest(server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Across loader processes, which start after the shards were listed."""
    from torch.utils.data import DataLoader

    from vision_tower.data.pairs import PairStream
    from vision_tower.data.recipe import Augmentation, PairsRecipe

    monkeypatch.setattr(shards, "TIMEOUT", 2.0)  # a new process on a busy machine may need a second
    monkeypatch.setattr(shards, "MAX_TRIES", 2)
    for number in range(4):
        (tmp_path / f"good{number}.tar").write_bytes(counted(number * 5, number * 5 + 5))
    (tmp_path / "hung.tar").write_bytes(counted(90, 95))
    (tmp_path / "busy.tar").write_bytes(counted(95, 99))
    plain = Augmentation(smallest_crop=1.0, jitter=0.0, gray_probability=0.0)
    recipe = PairsRecipe(
        shards=server + "/{good0,hung,good1,busy,good2,good3}.tar",
        shuffle_buffer=3,
        max_bad_fraction=0.4,
        augmentation=plain,
    )
    begun = time.monotonic()
    batches = DataLoader(
        PairStream(recipe, 8, 0, 0, 1, lambda web, full, rng: {}), batch_size=1, num_workers=2, collate_fn=list
    )
    first = []
    broken: dict[str, str] = {}
    done: set[int] = set()
    for (sample,) in batches:
        place = sample.cursor.places[0]
        broken |= place.broken
        if place.epoch == 0:
            first.append(int(sample.web))
        else:
            done.add(sample.cursor.reader)
        if len(done) == 2:
            break
    assert sorted(first) == list(range(20))
    assert broken == {f"{server}/hung.tar": "slow shard", f"{server}/busy.tar": "unreadable shard"}
    assert time.monotonic() - begun < 60


def test_remote_shards_are_not_looked_up_at_start(server: str) -> None:
    assert len(find_shards(server + "/{0000..4999}.tar")) == 5000
    assert not Server.requests


def test_file_descriptors_are_closed(tmp_path: Path) -> None:
    """One process reads thousands of shards, many only in part."""
    file = numbered(tmp_path, 1, 20).replace("*", "0")
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(20):
        next(iter(read_shard(file, NAMES, lambda _: True)))
        everything(file)
    assert len(os.listdir("/proc/self/fd")) <= before + 1


def test_skipped_rows_count_as_heartbeat(monkeypatch: pytest.MonkeyPatch) -> None:
    """Slow storage can need longer than the timeout to skip rows on resume; hung storage has no heartbeat."""
    monkeypatch.setattr(shards, "TIMEOUT", 0.5)
    monkeypatch.setattr(shards, "MAX_TRIES", 1)
    monkeypatch.setattr(shards, "is_remote", lambda _: True)
    pause = 0.1

    def slow(shard: str, names: frozenset[str], wanted: Any, begin: int) -> Any:
        for index in range(14):
            time.sleep(pause)
            if wanted(index) and index >= begin:
                yield Row(shard, index, str(index), {})

    monkeypatch.setattr(shards, "_read", slow)
    assert [row.index for row in read_shard("a", frozenset(), lambda _: True, 12)] == [12, 13]
    pause = 2.0
    with pytest.raises(BadShard) as caught:
        next(read_shard("a", frozenset(), lambda _: True))
    assert caught.value.cause == "slow shard"
