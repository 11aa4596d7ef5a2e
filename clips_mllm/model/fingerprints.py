"""Content hashes of weights and encoded images, to compare them across runs."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

from vision_tower.common.hashes import value_hash

if TYPE_CHECKING:
    import torch
    from torch import nn

SIZE = 16  # bytes; BLAKE2b, which is fast and has no known collisions at this length


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


def image_digest(content: bytes) -> bytes:
    """Hash an encoded image: its key in the feature store."""
    return hashlib.blake2b(content, digest_size=SIZE).digest()
