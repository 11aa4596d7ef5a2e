"""Hashes of files, values and images.

SHA-256 for what is recorded and compared later: `sha256sum` prints the same. BLAKE2b, which is faster, for cache keys.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from PIL.Image import Image

BLOCK = 1 << 22  # bytes read at once


def file_hash(*files: Path) -> str:
    """SHA-256 of the contents of one file, or of several one after the other."""
    digest = hashlib.sha256()
    for file in files:
        with file.open("rb") as stream:
            while block := stream.read(BLOCK):
                digest.update(block)
    return digest.hexdigest()


def ends_hash(file: Path) -> str:
    """SHA-256 of a file's size and its first and last four megabytes.

    For Parquet files of hundreds of gigabytes: the footer at the end lists the row groups and the place of each column.
    """
    size = file.stat().st_size
    digest = hashlib.sha256(str(size).encode())
    with file.open("rb") as stream:
        digest.update(stream.read(BLOCK))
        stream.seek(max(size - BLOCK, 0))
        digest.update(stream.read(BLOCK))
    return digest.hexdigest()


def value_hash(value: Any) -> str:
    """SHA-256 of a value as JSON; the order of keys does not matter."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


def image_hash(image: Image) -> str:
    """Key of an image's mode, size and pixels: equal for equal pixels, whatever file they came from."""
    digest = hashlib.blake2b(f"{image.mode}{image.size}".encode(), digest_size=16)
    digest.update(image.tobytes())
    return digest.hexdigest()
