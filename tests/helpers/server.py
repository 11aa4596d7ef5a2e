"""Hostile images, and the check that answers reveal no paths."""

from __future__ import annotations

import struct
import tempfile
import zlib
from pathlib import Path


def assert_no_paths(text: str) -> None:
    for place in (
        str(Path(__file__).parents[2]),
        str(Path.home()) + "/",
        tempfile.gettempdir(),
        "site-packages",
        ".py",
    ):
        assert place not in text


def bomb(side: int) -> bytes:
    """A few hundred bytes that say they are an image of side x side pixels."""

    def part(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
    data = zlib.compress(b"\0" * 1000)
    return b"\x89PNG\r\n\x1a\n" + part(b"IHDR", header) + part(b"IDAT", data) + part(b"IEND", b"")
