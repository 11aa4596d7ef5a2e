"""Content hashes of weights, files, images and JSON values, to compare them across runs."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import nn

SIZE = 16  # bytes; BLAKE2b, which is fast and has no known collisions at this length
BLOCK = 1 << 22


def weights_hash(weights: Iterable[tuple[str, torch.Tensor]]) -> str:
    """Hash names, dtypes, shapes and values. Independent of sharding and device, but not of precision."""
    named = sorted(weights)
    with ThreadPoolExecutor() as pool:  # hashlib releases the GIL
        digests = pool.map(tensor_digest, (value for _, value in named))
        return _combined(name.encode() + b"\0" + digest for (name, _), digest in zip(named, digests, strict=True))


def module_hash(module: nn.Module) -> str:
    """`weights_hash` of a module's parameters. Under ZeRO-3 all ranks must call it; it gathers one weight at a time."""
    from transformers.integrations import is_deepspeed_zero3_enabled

    if not is_deepspeed_zero3_enabled():
        return weights_hash(module.named_parameters())
    import deepspeed

    found = []
    for name, value in sorted(module.named_parameters()):
        with deepspeed.zero.GatheredParameters([value]):
            found.append(name.encode() + b"\0" + tensor_digest(value))
    return _combined(found)


def shapes_hash(module: nn.Module) -> str:
    """Hash the names and shapes of a module's parameters, of the full ones under ZeRO-3."""
    return value_hash([(name, list(getattr(p, "ds_shape", p.shape))) for name, p in module.named_parameters()])


def tensor_digest(value: torch.Tensor) -> bytes:
    """Hash dtype, shape and values of a tensor."""
    import torch

    plain = value.detach().as_subclass(torch.Tensor).cpu().contiguous()  # 4-bit weights are a subclass
    digest = hashlib.blake2b(f"{plain.dtype} {tuple(plain.shape)} ".encode(), digest_size=SIZE)
    digest.update(plain.reshape(-1).view(torch.uint8).numpy().data)
    return digest.digest()


def _combined(parts: Iterable[bytes]) -> str:
    digest = hashlib.blake2b(digest_size=SIZE)
    for part in parts:
        digest.update(part)
    return digest.hexdigest()


def file_hash(file: Path) -> str:
    """Hash a file."""
    digest = hashlib.blake2b(digest_size=SIZE)
    with file.open("rb") as stream:
        while block := stream.read(BLOCK):
            digest.update(block)
    return digest.hexdigest()


def ends_hash(file: Path) -> str:
    """Hash a file's length and its first and last 4 MiB.

    A Parquet file with images can have hundreds of gigabytes, too many for rank 0 to read while the others wait. Its
    footer holds the number of rows and the place and size of each column.
    """
    size = file.stat().st_size
    digest = hashlib.blake2b(str(size).encode(), digest_size=SIZE)
    with file.open("rb") as stream:
        digest.update(stream.read(BLOCK))
        stream.seek(max(size - BLOCK, 0))
        digest.update(stream.read(BLOCK))
    return digest.hexdigest()


def value_hash(value: Any) -> str:
    """Hash a JSON value; independent of the order of keys."""
    return hashlib.blake2b(json.dumps(value, sort_keys=True, default=str).encode(), digest_size=SIZE).hexdigest()


def image_digest(content: bytes) -> bytes:
    """Hash an encoded image: its key in the feature store."""
    return hashlib.blake2b(content, digest_size=SIZE).digest()
