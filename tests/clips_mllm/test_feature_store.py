"""The feature cache on disk: several writers, killed writers, damage, a full disk."""

from __future__ import annotations

import errno
import multiprocessing
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from clips_mllm.model.feature_store import ENTRY, FeatureStore
from clips_mllm.model.fingerprints import image_digest, weights_hash

WIDTH = 8


def store(folder: Path, dtype: torch.dtype = torch.bfloat16) -> FeatureStore:
    return FeatureStore(folder, about={"tower": "tiny"}, width=WIDTH, dtype=dtype)


def digest(number: int) -> bytes:
    return image_digest(str(number).encode())


def features(number: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.randn(4, WIDTH, generator=torch.Generator().manual_seed(number)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_what_one_run_adds_the_next_reads_bit_for_bit(tmp_path: Path, dtype: torch.dtype) -> None:
    first = store(tmp_path, dtype)
    for number in range(20):
        assert first.get(digest(number)) is None
        first.put(digest(number), features(number, dtype))
    second = store(tmp_path, dtype)
    for number in range(20):
        assert torch.equal(second.get(digest(number)), features(number, dtype))  # type: ignore[arg-type]
    assert second.get(digest(99)) is None
    assert (first.found.value, first.added.value) == (0, 20)
    assert second.summary() == "feature cache: 20 read, 0 computed"


def test_rows_may_differ_from_image_to_image(tmp_path: Path) -> None:
    one = store(tmp_path)
    for number in range(5):
        one.put(digest(number), features(number).repeat(number + 1, 1))
    two = store(tmp_path)
    assert [len(two.get(digest(number))) for number in range(5)] == [4, 8, 12, 16, 20]  # type: ignore[arg-type]


def test_a_running_reader_finds_what_others_add(tmp_path: Path) -> None:
    reader, writer = store(tmp_path), store(tmp_path)
    assert reader.get(digest(1)) is None
    writer.put(digest(1), features(1))
    reader.refresh()
    writer.put(digest(2), features(2))
    reader.refresh()
    assert torch.equal(reader.get(digest(1)), features(1))  # type: ignore[arg-type]
    assert torch.equal(reader.get(digest(2)), features(2))  # type: ignore[arg-type]


def test_a_damaged_entry_is_computed_again(tmp_path: Path) -> None:
    first = store(tmp_path)
    for number in range(3):
        first.put(digest(number), features(number))
    file = next(tmp_path.glob("*.features"))
    data = bytearray(file.read_bytes())
    data[4 * WIDTH * 2 + 5] ^= 1  # in the second entry
    file.write_bytes(data)
    second = store(tmp_path)
    assert second.get(digest(1)) is None
    assert second.corrupt.value == 1
    second.put(digest(1), features(1))
    third = store(tmp_path)
    for number in range(3):
        assert torch.equal(third.get(digest(number)), features(number))  # type: ignore[arg-type]
    assert third.corrupt.value == 0, "the newer entry is looked at first"
    assert second.summary() == "feature cache: 0 read, 1 computed, 1 corrupt"


@pytest.mark.parametrize(("field", "value"), [("rows", 2**31), ("rows", 0), ("offset", 2**63), ("offset", 10**12)])
def test_a_damaged_index_is_an_entry_to_compute_again(tmp_path: Path, field: str, value: int) -> None:
    first = store(tmp_path)
    for number in range(2):
        first.put(digest(number), features(number))
    file = next(tmp_path.glob("*.index"))
    entries = np.frombuffer(bytearray(file.read_bytes()), dtype=ENTRY)
    entries[field][1] = value
    entries["checksum"][1] = 0
    file.write_bytes(entries.tobytes())
    second = store(tmp_path)
    assert second.get(digest(0)) is not None and second.get(digest(1)) is None
    assert second.corrupt.value == 1


def test_what_a_killed_writer_left_is_never_read(tmp_path: Path) -> None:
    first = store(tmp_path)
    for number in range(3):
        first.put(digest(number), features(number))
    index, data = next(tmp_path.glob("*.index")), next(tmp_path.glob("*.features"))
    index.write_bytes(index.read_bytes()[: 2 * ENTRY.itemsize + 7])  # in the middle of the third entry
    second = store(tmp_path)
    assert [second.get(digest(number)) is not None for number in range(3)] == [True, True, False]
    data.write_bytes(data.read_bytes()[: 4 * WIDTH * 2 + 3])  # features of the second are cut
    third = store(tmp_path)
    assert [third.get(digest(number)) is not None for number in range(3)] == [True, False, False]
    assert (second.corrupt.value, third.corrupt.value) == (0, 1)


def _write_many(folder: Path, begin: int, end: int) -> None:
    mine = store(folder)
    for number in range(begin, end):
        if mine.get(digest(number)) is None:
            mine.put(digest(number), features(number))


def test_writers_at_the_same_time(tmp_path: Path) -> None:
    """Four processes with overlapping images; a reader that looks on sees right features or none."""
    context = multiprocessing.get_context("fork")
    writers = [context.Process(target=_write_many, args=(tmp_path, 50 * at, 50 * at + 100)) for at in range(4)]
    for writer in writers:
        writer.start()
    reader = store(tmp_path)
    while any(writer.is_alive() for writer in writers):
        reader.refresh()
        for number in (0, 60, 120, 249):
            seen = reader.get(digest(number))
            assert seen is None or torch.equal(seen, features(number))
    for writer in writers:
        writer.join()
        assert writer.exitcode == 0
    reader.refresh()
    for number in range(250):
        assert torch.equal(reader.get(digest(number)), features(number))  # type: ignore[arg-type]
    assert reader.corrupt.value == 0
    assert len(list(tmp_path.glob("*.index"))) == 4


def test_a_full_disk_costs_the_cache_and_not_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    class Full:
        def tell(self) -> int:
            return 0

        def write(self, _: bytes) -> int:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    one = store(tmp_path)
    monkeypatch.setattr(one, "_new_writer", lambda: (Full(), Full()))
    one.put(digest(1), features(1))
    one.put(digest(2), features(2))
    assert capsys.readouterr().err.count("the disk is full; no more features are kept") == 1
    assert one.added.value == 0 and one.get(digest(1)) is None


def test_images_are_decoded_only_where_they_are_unknown(tmp_path: Path) -> None:
    one, decoded = store(tmp_path), []

    def decode(content: bytes) -> Image.Image:
        decoded.append(content)
        return Image.new("RGB", (4, 4))

    assert one.look_up(b"first", decode).image is not None
    one.put(image_digest(b"first"), features(1))
    time.sleep(0.1)  # what has been added is looked for every now and then
    looked = one.look_up(b"first", decode)
    assert looked.image is None and torch.equal(looked.features, features(1))  # type: ignore[arg-type]
    assert decoded == [b"first"]


def test_an_entry_is_as_small_as_the_guide_says() -> None:
    assert ENTRY.itemsize == 32
    assert np.dtype("S16").itemsize == len(digest(0))


def test_weights_hash_tells_apart_names_shapes_dtypes_and_values() -> None:
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
