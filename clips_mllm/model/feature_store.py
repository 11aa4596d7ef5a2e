"""Features of a frozen tower on disk: append-only files, one pair a writer, shared by ranks, stages and runs.

FOLDER/about.json            what tower, preprocessing and precision the features are of
FOLDER/WRITER.features       (rows, width) arrays, one behind the other
FOLDER/WRITER.index          32 bytes for each: digest of the image's file, offset, rows, checksum

Nobody waits for anybody: a writer appends to its own two files, features first, and readers take every whole entry of
every index. What a killed writer left unfinished is never read. An entry whose checksum is wrong counts as absent, so
its features are computed and appended again. Two writers may add the same image; either entry will do.
"""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import os
import secrets
import socket
import sys
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np
import torch

from clips_mllm.model.fingerprints import image_digest
from vision_tower.common.errors import disk_is_full
from vision_tower.common.files import make_folder, write_text

if TYPE_CHECKING:
    from PIL.Image import Image
    from transformers import BaseImageProcessor

ENTRY = np.dtype([("digest", "S16"), ("offset", "<u8"), ("rows", "<u4"), ("checksum", "<u4")])
LOOKING = 0.02  # share of its time that a reader may spend on looking for what has been added


# What a batch holds of its n images, of which m are unknown; p patches, w width.
KNOWN = "known_features"  # (n - m, p, w)
IS_KNOWN = "is_known"  # (n,) bool
DIGESTS = "digests"  # (m, 16) uint8, in the order of `pixel_values` (m, 3, h, w)
BLANK = b"blank"  # stands for the content of the image that a batch of text gets


@dataclasses.dataclass(frozen=True)
class CachedImage:
    """An image that was looked up: its features, or itself where they are unknown."""

    digest: bytes
    features: torch.Tensor | None
    image: Image | None


@dataclasses.dataclass
class _Shard:
    """A pair of files, and how many of its index entries have been read."""

    features: int  # file descriptor
    entries: int = 0


class FeatureStore:
    """Reads in any process, loader processes included; writes in the one that computes.

    Args:
        folder: of one tower, preprocessing and precision.
        about: what these are, in words for people.
        width: columns of the features.
        dtype: of the features.
    """

    def __init__(self, folder: Path, *, about: dict[str, Any], width: int, dtype: torch.dtype) -> None:
        self.folder = folder
        self.width = width
        self.dtype = dtype
        self.found = multiprocessing.Value("l", 0)
        self.added = multiprocessing.Value("l", 0)
        self.corrupt = multiprocessing.Value("l", 0)
        make_folder(folder)
        if not (folder / "about.json").is_file():
            write_text(folder / "about.json", json.dumps(about, indent=1, default=str))
        self._writer: tuple[BinaryIO, BinaryIO] | None = None
        self._full = False
        self._shards: dict[str, _Shard] = {}
        self._places = np.empty(0, dtype=[*ENTRY.descr, ("shard", "<u4")])
        self._next_look = 0.0
        self._bad: set[tuple[int, int]] = set()  # shard and offset

    def get(self, digest: bytes) -> torch.Tensor | None:
        """Features of an image, (rows, width), or None where they must be computed."""
        features = self._first_good(digest)
        if features is None and time.monotonic() > self._next_look:
            self.refresh()
            features = self._first_good(digest)
        if features is not None:
            with self.found.get_lock():
                self.found.value += 1
        return features

    def look_up(self, content: bytes, decode: Callable[[bytes], Image]) -> CachedImage:
        """An encoded image's features, or the image, which is decoded only then."""
        digest = image_digest(content)
        features = self.get(digest)
        return CachedImage(digest, features, decode(content) if features is None else None)

    def put(self, digest: bytes, features: torch.Tensor) -> None:
        """Append the features of an image; where the disk is full they are not kept, and the run goes on."""
        if self._full:
            return
        assert features.dtype == self.dtype, f"{features.dtype} for a store of {self.dtype}"
        plain = features.detach().cpu().contiguous()
        data = plain.view(torch.uint8).numpy().tobytes()
        try:
            stream, index = self._writer = self._writer or self._new_writer()
            offset = stream.tell()
            stream.write(data)
            entry = np.array([(digest, offset, len(plain), zlib.crc32(data))], dtype=ENTRY)
            index.write(entry.tobytes())
        except OSError as error:
            if not disk_is_full(error):
                raise
            self._full = True
            print(f"{self.folder}: the disk is full; no more features are kept", file=sys.stderr, flush=True)
            return
        with self.added.get_lock():
            self.added.value += 1

    def refresh(self) -> None:
        """Read what has been added to the indexes since."""
        begun = time.monotonic()
        fresh = [self._new_entries(file) for file in sorted(self.folder.glob("*.index"))]
        if any(len(entries) for entries in fresh):
            places = np.concatenate([self._places, *fresh])
            self._places = places[np.argsort(places["digest"], kind="stable")]
        now = time.monotonic()
        self._next_look = now + (now - begun) / LOOKING

    def summary(self) -> str:
        """A line for the log."""
        line = f"feature cache: {self.found.value:,} read, {self.added.value:,} computed"
        return line + (f", {self.corrupt.value:,} corrupt" if self.corrupt.value else "")

    def _new_writer(self) -> tuple[BinaryIO, BinaryIO]:
        name = f"{time.time_ns():020d}-{socket.gethostname()}-{os.getpid()}-{secrets.token_hex(4)}"
        # Unbuffered: an entry must not be seen before its features, and nothing is lost where the process is killed.
        streams = [(self.folder / f"{name}{end}").open("xb", buffering=0) for end in (".features", ".index")]
        return streams[0], streams[1]  # type: ignore[return-value]

    def _new_entries(self, file: Path) -> np.ndarray:
        if file.name not in self._shards:
            self._shards[file.name] = _Shard(os.open(file.with_suffix(".features"), os.O_RDONLY))
        shard = self._shards[file.name]
        with file.open("rb") as stream:
            stream.seek(shard.entries * ENTRY.itemsize)
            data = stream.read()
        entries = np.frombuffer(data[: len(data) - len(data) % ENTRY.itemsize], dtype=ENTRY)
        shard.entries += len(entries)
        places = np.empty(len(entries), dtype=self._places.dtype)
        for name in ENTRY.names or ():
            places[name] = entries[name]
        places["shard"] = list(self._shards).index(file.name)
        return places

    def _entries(self, digest: bytes) -> np.ndarray:
        """The newest first: it was appended because an older one is corrupt."""
        keys = self._places["digest"]
        key = np.bytes_(digest)
        return self._places[np.searchsorted(keys, key, "left") : np.searchsorted(keys, key, "right")][::-1]

    def _first_good(self, digest: bytes) -> torch.Tensor | None:
        for place in self._entries(digest):
            where = int(place["shard"]), int(place["offset"])
            if where in self._bad:
                continue
            features = self._read(place)
            if features is not None:
                return features
            self._bad.add(where)
            with self.corrupt.get_lock():
                self.corrupt.value += 1
        return None

    def _read(self, place: np.void) -> torch.Tensor | None:
        size = int(place["rows"]) * self.width * self.dtype.itemsize
        shard = list(self._shards.values())[int(place["shard"])]
        if (
            not 0 < size <= os.fstat(shard.features).st_size - int(place["offset"])
        ):  # the index is damaged, or the file cut
            return None
        data = os.pread(shard.features, size, int(place["offset"]))
        if len(data) != size or zlib.crc32(data) != place["checksum"]:
            return None
        return torch.frombuffer(bytearray(data), dtype=self.dtype).view(-1, self.width)


def visual_inputs(images: list[CachedImage], image_processor: BaseImageProcessor) -> dict[str, torch.Tensor]:
    """A batch's images as `CachedTower.complete` takes them; only the unknown ones are preprocessed."""
    known = [looked.features for looked in images if looked.features is not None]
    unknown = [looked for looked in images if looked.features is None]
    inputs = {
        KNOWN: torch.stack(known) if known else torch.empty(0),
        IS_KNOWN: torch.tensor([looked.features is not None for looked in images]),
        DIGESTS: torch.tensor([list(looked.digest) for looked in unknown], dtype=torch.uint8),
    }
    if unknown:
        inputs |= {
            "pixel_values": image_processor(images=[looked.image for looked in unknown], return_tensors="pt")[
                "pixel_values"
            ]
        }
    return inputs
