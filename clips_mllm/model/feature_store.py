"""Image features of a frozen tower on disk, shared by ranks, stages and runs.

FOLDER/about.json               tower, preprocessing and precision of these features
FOLDER/TIME-HOST-ID.safetensors a chunk: features (rows, width) of some images by image digest; metadata: their hashes

A writer collects features in memory and writes a chunk under another name, then renames it. Readers therefore only see
complete chunks, and concurrent writers never touch the same file. Two writers may store the same image; readers use
the newer entry. An entry with a wrong hash counts as missing: its features are computed and stored again.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import multiprocessing
import os
import secrets
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from clips_mllm.model.fingerprints import image_digest, tensor_digest
from vision_tower.common.errors import disk_is_full
from vision_tower.common.files import make_folder, write_text

if TYPE_CHECKING:
    from PIL.Image import Image
    from transformers import BaseImageProcessor

logger = logging.getLogger(__name__)

CHUNK_BYTES = 64 << 20
CHUNK_SECONDS = 30.0  # a killed run loses at most the features that it computed in this time
SCAN_SECONDS = 10.0  # between two scans for chunks of other processes
STALE_SECONDS = 3600.0  # age at which an unfinished file belongs to a killed writer

# Keys of a batch of n images, of which m are not in the cache; p patches, w width.
KNOWN = "known_features"  # (n - m, p, w)
IS_KNOWN = "is_known"  # (n,) bool
DIGESTS = "digests"  # (m, 16) uint8, in the order of `pixel_values` (m, 3, h, w)
BLANK = b"blank"  # cache key of the blank image of a text-only batch


@dataclasses.dataclass(frozen=True)
class ImageOrFeatures:
    """Result of a cache lookup: the features, or the decoded image if there are none."""

    digest: bytes
    features: torch.Tensor | None
    image: Image | None


class FeatureStore:
    """Reads in any process, including loader workers; writes in the process that runs the tower.

    Args:
        folder: folder for one combination of tower, preprocessing and precision.
        about: description of that combination, for people.
        dtype: dtype of the features.
    """

    def __init__(self, folder: Path, *, about: dict[str, Any], dtype: torch.dtype) -> None:
        self.folder = folder
        self.dtype = dtype
        self.found = multiprocessing.Value("l", 0)
        self.computed = multiprocessing.Value("l", 0)
        self.corrupt = multiprocessing.Value("l", 0)
        make_folder(folder)
        if not (folder / "about.json").is_file():
            write_text(folder / "about.json", json.dumps(about, indent=1, default=str))
        for file in folder.glob("*.partial"):
            if time.time() - file.stat().st_mtime > STALE_SECONDS:
                file.unlink(missing_ok=True)
        self._chunks: set[Path] = set()  # all that were scanned
        self._chunk_of: dict[bytes, Path] = {}
        self._next_scan = 0.0
        self._pending: dict[bytes, torch.Tensor] = {}  # not yet written
        self._pending_bytes = 0
        self._pending_since = 0.0
        self._full = False

    def get(self, digest: bytes) -> torch.Tensor | None:
        """Return the features (rows, width) of an image, or None if they must be computed."""
        if digest not in self._chunk_of and digest not in self._pending and time.monotonic() > self._next_scan:
            self.refresh()
        features = self._pending[digest] if digest in self._pending else self._read(digest)
        if features is not None:
            _increment(self.found)
        return features

    def look_up(self, content: bytes, decode: Callable[[bytes], Image]) -> ImageOrFeatures:
        """Return the features of an encoded image; decode the image only if there are none."""
        digest = image_digest(content)
        features = self.get(digest)
        return ImageOrFeatures(digest, features, decode(content) if features is None else None)

    def put(self, digest: bytes, features: torch.Tensor) -> None:
        """Add the features of an image. They are on disk after the next `flush`."""
        assert features.dtype == self.dtype, f"{features.dtype} for a store of {self.dtype}"
        _increment(self.computed)
        if self._full:
            return
        if not self._pending:
            self._pending_bytes, self._pending_since = 0, time.monotonic()
        self._pending[digest] = features.detach().cpu().contiguous().clone()  # a view would keep its batch alive
        self._pending_bytes += features.nbytes
        if self._pending_bytes >= CHUNK_BYTES or time.monotonic() - self._pending_since >= CHUNK_SECONDS:
            self.flush()

    def flush(self) -> None:
        """Write a chunk of the features added since the last one. If the disk is full, stop caching and continue."""
        if not self._pending:
            return
        pending, self._pending = self._pending, {}
        # The time comes first, so that a later chunk sorts behind an earlier one.
        file = self.folder / f"{time.time_ns():020d}-{socket.gethostname()}-{secrets.token_hex(4)}.safetensors"
        work = file.with_suffix(".partial")
        try:
            save_file(
                {digest.hex(): value for digest, value in pending.items()},
                work,
                {digest.hex(): tensor_digest(value).hex() for digest, value in pending.items()},
            )
            os.replace(work, file)
            self._index(file, pending)
        except (OSError, SafetensorError) as error:
            if not disk_is_full(error):
                raise
            self._full = True
            logger.warning("%s: the disk is full; no more features are cached", self.folder)
        finally:
            work.unlink(missing_ok=True)

    def refresh(self) -> None:
        """Index the chunks that were added since the last call."""
        for file in sorted(set(self.folder.glob("*.safetensors")) - self._chunks):
            try:
                with safe_open(file, "pt") as chunk:
                    self._index(file, map(bytes.fromhex, chunk.keys()))
            except (OSError, SafetensorError, ValueError) as error:
                self._chunks.add(file)
                self._report_corrupt(file, error)
        self._next_scan = time.monotonic() + SCAN_SECONDS

    def summary(self) -> str:
        """One line for the log."""
        line = f"feature cache: {self.found.value:,} read, {self.computed.value:,} computed"
        return line + (f", {self.corrupt.value:,} corrupt" if self.corrupt.value else "")

    def _index(self, file: Path, digests: Any) -> None:
        self._chunks.add(file)
        self._chunk_of |= dict.fromkeys(digests, file)

    def _read(self, digest: bytes) -> torch.Tensor | None:
        file = self._chunk_of.get(digest)
        if file is None:
            return None
        try:
            with safe_open(file, "pt") as chunk:
                features: torch.Tensor = chunk.get_tensor(digest.hex())
                if tensor_digest(features).hex() != (chunk.metadata() or {})[digest.hex()]:
                    raise ValueError("wrong hash")
        except (OSError, SafetensorError, ValueError, KeyError) as error:
            del self._chunk_of[digest]
            self._report_corrupt(file, error)
            return None
        return features

    def _report_corrupt(self, file: Path, error: Exception) -> None:
        _increment(self.corrupt)
        logger.warning("%s: corrupt features are computed again (%s)", file, error)


def _increment(counter: Any) -> None:
    with counter.get_lock():  # shared with the loader workers
        counter.value += 1


def visual_inputs(images: list[ImageOrFeatures], image_processor: BaseImageProcessor) -> dict[str, torch.Tensor]:
    """Return the images of a batch as `CachedTower.complete` expects them. Only the missing ones are preprocessed."""
    known = [image.features for image in images if image.features is not None]
    unknown = [image for image in images if image.features is None]
    inputs = {
        KNOWN: torch.stack(known) if known else torch.empty(0),
        IS_KNOWN: torch.tensor([image.features is not None for image in images]),
        DIGESTS: torch.tensor([list(image.digest) for image in unknown], dtype=torch.uint8),
    }
    if unknown:
        pixels = image_processor(images=[image.image for image in unknown], return_tensors="pt")
        inputs["pixel_values"] = pixels["pixel_values"]
    return inputs
