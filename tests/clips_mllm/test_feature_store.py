"""Feature cache on disk: concurrent writers, killed writers, corrupt chunks, a full disk."""

from __future__ import annotations

import errno
import multiprocessing
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from clips_mllm.model import feature_store
from clips_mllm.model.feature_store import FeatureStore
from clips_mllm.model.fingerprints import image_digest, weights_hash

WIDTH = 8


def store(folder: Path, dtype: torch.dtype = torch.bfloat16) -> FeatureStore:
    return FeatureStore(folder, about={"tower": "tiny"}, dtype=dtype)


def digest(number: int) -> bytes:
    return image_digest(str(number).encode())


def features(number: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.randn(4, WIDTH, generator=torch.Generator().manual_seed(number)).to(dtype)


def filled(folder: Path, numbers: range, *, chunk: int = 100) -> FeatureStore:
    """A store to which these features were written, `chunk` of them in a file."""
    opened = store(folder)
    for position, number in enumerate(numbers, start=1):
        opened.put(digest(number), features(number))
        if position % chunk == 0:
            opened.flush()
    opened.flush()
    return opened


def cached(opened: FeatureStore, number: int) -> bool:
    """Check the features if there are any."""
    value = opened.get(digest(number))
    assert value is None or torch.equal(value, features(number))
    return value is not None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_features_survive_the_run_bit_for_bit(tmp_path: Path, dtype: torch.dtype) -> None:
    first = store(tmp_path, dtype)
    for number in range(20):
        assert first.get(digest(number)) is None
        first.put(digest(number), features(number, dtype))
    assert torch.equal(first.get(digest(3)), features(3, dtype))  # type: ignore[arg-type]  # before it is on disk
    first.flush()
    second = store(tmp_path, dtype)
    for number in range(20):
        assert torch.equal(second.get(digest(number)), features(number, dtype))  # type: ignore[arg-type]
    assert second.get(digest(99)) is None
    assert (first.found.value, first.computed.value) == (1, 20)
    assert (second.found.value, second.computed.value) == (20, 0)


def test_number_of_rows_may_differ_between_images(tmp_path: Path) -> None:
    one = store(tmp_path)
    for number in range(5):
        one.put(digest(number), features(number).repeat(number + 1, 1))
    one.flush()
    two = store(tmp_path)
    assert [len(two.get(digest(number))) for number in range(5)] == [4, 8, 12, 16, 20]  # type: ignore[arg-type]


@pytest.mark.parametrize(("bytes_", "seconds", "chunks"), [(1 << 20, 3600.0, 0), (128, 3600.0, 5), (1 << 20, 0.0, 10)])
def test_chunks_are_written_by_size_and_by_time(
    bytes_: int, seconds: float, chunks: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(feature_store, "CHUNK_BYTES", bytes_)
    monkeypatch.setattr(feature_store, "CHUNK_SECONDS", seconds)
    one = store(tmp_path)
    for number in range(10):
        one.put(digest(number), features(number))  # 64 bytes each
    assert len(list(tmp_path.glob("*.safetensors"))) == chunks


def test_pending_features_do_not_keep_their_batch_in_memory(tmp_path: Path) -> None:
    one, batch = store(tmp_path), torch.zeros(100, 4, WIDTH, dtype=torch.bfloat16)
    one.put(digest(1), batch[1])
    value = one.get(digest(1))
    assert value is not None and value.untyped_storage().nbytes() == 4 * WIDTH * 2


def test_reader_finds_features_of_other_writers(tmp_path: Path) -> None:
    reader = store(tmp_path)
    assert not cached(reader, 1)
    filled(tmp_path, range(1, 2))
    reader.refresh()
    filled(tmp_path, range(2, 3))
    reader.refresh()
    assert cached(reader, 1) and cached(reader, 2)


def test_corrupt_entry_is_reported_and_computed_again(tmp_path: Path) -> None:
    filled(tmp_path, range(3))
    file = next(tmp_path.glob("*.safetensors"))
    data = bytearray(file.read_bytes())
    data[-5] ^= 1  # in the last entry
    file.write_bytes(data)
    second = store(tmp_path)
    (bad,) = (number for number in range(3) if not cached(second, number))
    assert second.corrupt.value == 1
    second.put(digest(bad), features(bad))
    second.flush()
    third = store(tmp_path)
    assert all(cached(third, number) for number in range(3))
    assert third.corrupt.value == 0, "the newer entry is read first"
    assert "1 corrupt" in second.summary()


@pytest.mark.parametrize("damage", ["header", "cut", "empty", "metadata", "keys"])
def test_unreadable_chunk_is_ignored_and_reported(damage: str, tmp_path: Path) -> None:
    filled(tmp_path, range(2), chunk=1)
    file = sorted(tmp_path.glob("*.safetensors"))[1]
    data = file.read_bytes()
    match damage:
        case "header":
            file.write_bytes(data[:4] + b"\xff\xff" + data[6:])
        case "cut":
            file.write_bytes(data[:-3])
        case "empty":
            file.write_bytes(b"")
        case "metadata":
            save_file({digest(1).hex(): features(1)}, file)
        case "keys":
            save_file({"not a digest": features(1)}, file)
    second = store(tmp_path)
    assert [cached(second, number) for number in range(2)] == [True, False]
    assert second.corrupt.value == 1
    second.refresh()
    assert second.corrupt.value == 1, "reported once"


def _write_until_killed(folder: Path) -> None:
    mine = store(folder)
    for number in range(1_000_000):
        mine.put(digest(number), features(number))
        mine.flush()


def test_killed_writer_leaves_only_complete_chunks(tmp_path: Path) -> None:
    writer = multiprocessing.get_context("fork").Process(target=_write_until_killed, args=(tmp_path,))
    writer.start()
    while len(list(tmp_path.glob("*.safetensors"))) < 20:
        time.sleep(0.01)
    assert writer.pid is not None
    os.kill(writer.pid, signal.SIGKILL)
    writer.join()
    reader = store(tmp_path)
    chunks = len(list(tmp_path.glob("*.safetensors")))
    assert all(cached(reader, number) for number in range(chunks))
    assert reader.corrupt.value == 0


def test_unfinished_files_are_removed_once_they_are_stale(tmp_path: Path) -> None:
    fresh, stale = tmp_path / "fresh.partial", tmp_path / "stale.partial"
    for file in (fresh, stale):
        file.write_bytes(b"half")
    os.utime(stale, (1, 1))
    assert not cached(store(tmp_path), 1)
    assert fresh.exists() and not stale.exists()


def _write_many(folder: Path, begin: int, end: int) -> None:
    mine = store(folder)
    for number in range(begin, end):
        if mine.get(digest(number)) is None:
            mine.put(digest(number), features(number))
        if number % 10 == 0:
            mine.flush()
    mine.flush()


def test_concurrent_writers(tmp_path: Path) -> None:
    """Four processes with overlapping images. A concurrent reader gets the right features or none."""
    context = multiprocessing.get_context("fork")
    writers = [context.Process(target=_write_many, args=(tmp_path, 50 * at, 50 * at + 100)) for at in range(4)]
    for writer in writers:
        writer.start()
    reader = store(tmp_path)
    while any(writer.is_alive() for writer in writers):
        reader.refresh()
        for number in (0, 60, 120, 249):
            cached(reader, number)
    for writer in writers:
        writer.join()
        assert writer.exitcode == 0
    reader.refresh()
    assert all(cached(reader, number) for number in range(250))
    assert reader.corrupt.value == 0


def test_full_disk_stops_caching_and_the_run_continues(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    one = store(tmp_path)
    monkeypatch.setattr(os, "replace", full)
    for number in range(3):
        one.put(digest(number), features(number))
        one.flush()
    assert one.computed.value == 3 and not any(cached(one, number) for number in range(3))
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert {file.name for file in tmp_path.iterdir()} == {"about.json"}


def test_images_are_decoded_only_if_their_features_are_missing(tmp_path: Path) -> None:
    one, decoded = store(tmp_path), []

    def decode(content: bytes) -> Image.Image:
        decoded.append(content)
        return Image.new("RGB", (4, 4))

    assert one.look_up(b"first", decode).image is not None
    one.put(image_digest(b"first"), features(1))
    found = one.look_up(b"first", decode)
    assert found.image is None and torch.equal(found.features, features(1))  # type: ignore[arg-type]
    assert decoded == [b"first"]


def test_weights_hash_depends_on_names_shapes_dtypes_and_values() -> None:
    base: dict[str, Any] = {"a": torch.arange(6.0), "b": torch.ones(2)}
    others = [
        {"a": torch.arange(6.0).view(2, 3), "b": torch.ones(2)},
        {"a": torch.arange(6.0), "c": torch.ones(2)},
        {"a": torch.arange(6.0).bfloat16(), "b": torch.ones(2)},
        {"a": torch.arange(6.0), "b": torch.tensor([1.0, 1.0 + 1e-7])},
        {"a": torch.arange(6.0)},
    ]
    found = {weights_hash(weights.items()) for weights in [base, *others]}
    assert len(found) == 6
    assert weights_hash(reversed(list(base.items()))) == weights_hash(base.items())
    assert weights_hash({"a": base["a"].repeat(2)[:6], "b": base["b"]}.items()) == weights_hash(base.items())
