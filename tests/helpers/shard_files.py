"""Small shards for tests: tars and Parquet files of numbered pairs."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path
from typing import Any


def png(color: int = 0, size: int = 8) -> bytes:
    """Return a PNG of one color."""
    from PIL import Image

    buffer = io.BytesIO()
    Image.new("RGB", (size, size), (color, 0, 0)).save(buffer, format="PNG")
    return buffer.getvalue()


def tar_bytes(members: list[tuple[str, bytes]]) -> bytes:
    """Return a tar with these members."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def write_tar(file: Path, members: list[tuple[str, bytes]]) -> Path:
    """Write a tar with these members."""
    file.write_bytes(tar_bytes(members))
    return file


def pair(
    key: str, web: Any = "web", full: Any = "Full caption.", image: bytes | None = None
) -> list[tuple[str, bytes]]:
    """Return the tar members of one sample."""
    row = {"web_caption": web, "synthetic_caption": full}
    return [(f"{key}.png", image or png()), (f"{key}.json", json.dumps(row).encode())]


def counted(start: int, end: int) -> bytes:
    """Return a tar with the web captions `start` to `end` - 1."""
    return tar_bytes([member for n in range(start, end) for member in pair(f"{n:03d}", web=str(n))])


def numbered(folder: Path, shards: int, each: int) -> str:
    """Write tars with the web captions 0, 1, 2, ... and return their pattern."""
    for shard in range(shards):
        (folder / f"{shard}.tar").write_bytes(counted(shard * each, (shard + 1) * each))
    return str(folder / "*.tar")


def write_parquet(file: Path, columns: dict[str, list[Any]], group: int = 4) -> Path:
    """Write a Parquet file with small row groups."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table(columns), file, row_group_size=group)
    return file
