"""Hashes that say whether two towers, projectors, LLMs, tokenizers or files are the same."""

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
    """Of names, dtypes, shapes and values: the same for any sharding and device, another for another precision."""
    named = sorted(weights)
    with ThreadPoolExecutor() as pool:  # hashing lets other threads run
        digests = pool.map(_tensor_digest, (value for _, value in named))
        return _combined(name.encode() + b"\0" + digest for (name, _), digest in zip(named, digests, strict=True))


def module_hash(module: nn.Module) -> str:
    """`weights_hash` of a module's parameters; under ZeRO-3, which all ranks must call together, weight by weight."""
    from transformers.integrations import is_deepspeed_zero3_enabled

    if not is_deepspeed_zero3_enabled():
        return weights_hash(module.named_parameters())
    import deepspeed

    found = []
    for name, value in sorted(module.named_parameters()):
        with deepspeed.zero.GatheredParameters([value]):
            found.append(name.encode() + b"\0" + _tensor_digest(value))
    return _combined(found)


def shapes_hash(module: nn.Module) -> str:
    """Of the names and shapes of a module's parameters, also where ZeRO-3 divides them."""
    return value_hash([(name, list(getattr(p, "ds_shape", p.shape))) for name, p in module.named_parameters()])


def _tensor_digest(value: torch.Tensor) -> bytes:
    import torch

    plain = value.detach().as_subclass(torch.Tensor).cpu().contiguous()  # weights in 4 bits are a class of their own
    told = f"{plain.dtype} {tuple(plain.shape)} ".encode()
    digest = hashlib.blake2b(told, digest_size=SIZE)
    digest.update(plain.reshape(-1).view(torch.uint8).numpy().data)
    return digest.digest()


def _combined(parts: Iterable[bytes]) -> str:
    whole = hashlib.blake2b(digest_size=SIZE)
    for part in parts:
        whole.update(part)
    return whole.hexdigest()


def file_hash(file: Path) -> str:
    """Of a file's bytes."""
    whole = hashlib.blake2b(digest_size=SIZE)
    with file.open("rb") as stream:
        while block := stream.read(BLOCK):
            whole.update(block)
    return whole.hexdigest()


def ends_hash(file: Path) -> str:
    """Of a file's length, first and last four megabytes. A table's images may be hundreds of gigabytes, which rank 0
    would read while the others wait; its last bytes say how many rows there are, and where each column lies."""
    size = file.stat().st_size
    whole = hashlib.blake2b(str(size).encode(), digest_size=SIZE)
    with file.open("rb") as stream:
        whole.update(stream.read(BLOCK))
        stream.seek(max(size - BLOCK, 0))
        whole.update(stream.read(BLOCK))
    return whole.hexdigest()


def value_hash(value: Any) -> str:
    """Of anything that JSON can hold; keys in any order."""
    return hashlib.blake2b(json.dumps(value, sort_keys=True, default=str).encode(), digest_size=SIZE).hexdigest()


def image_digest(content: bytes) -> bytes:
    """Of an encoded image: what the feature store calls it by."""
    return hashlib.blake2b(content, digest_size=SIZE).digest()
