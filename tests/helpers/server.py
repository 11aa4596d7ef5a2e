"""Decompression bombs, and a check that responses reveal no paths."""

from __future__ import annotations

import struct
import tempfile
import zlib
from pathlib import Path


def assert_no_paths(text: str) -> None:
    repository, home = str(Path(__file__).parents[2]), str(Path.home()) + "/"
    for path in (repository, home, tempfile.gettempdir(), "site-packages", ".py"):
        assert path not in text


def bomb(side: int) -> bytes:
    """Return a PNG of a few hundred bytes whose header declares side x side pixels."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
    data = zlib.compress(b"\0" * 1000)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")
