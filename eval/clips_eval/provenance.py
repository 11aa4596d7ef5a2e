"""What a score was measured with: the checkpoint's hash, preprocessing, versions, command."""

from __future__ import annotations

import hashlib
import platform
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vision_tower.errors import UserError

if TYPE_CHECKING:
    from vision_tower.encoder import Encoder


def provenance(folder: Path, encoder: Encoder, command: str, argv: list[str]) -> dict[str, Any]:
    """The part that all results of an encoder share."""
    return {
        "encoder": str(folder),
        "sha256": checkpoint_digest(folder),
        "preprocessing": {key: value for key, value in encoder.processor.to_dict().items() if value is not None},
        "command": shlex.join(["clips-mllm", command, *argv]),
        "versions": _versions(),
    }


def checkpoint_digest(folder: Path) -> str:
    """SHA-256 of `model.safetensors`; of all shards in the order of their names where the weights are sharded.

    Raises:
        UserError: the folder holds no weights.
    """
    single = folder / "model.safetensors"
    shards = [single] if single.is_file() else sorted(folder.glob("model-*.safetensors"))
    if not shards:
        raise UserError(f"{folder}: no model.safetensors here; give the folder that 'clips-mllm pretrain' wrote")
    digest = hashlib.sha256()
    for shard in shards:
        with shard.open("rb") as stream:
            while block := stream.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()


def diverged(folder: Path) -> UserError:
    """What to say of an encoder whose embeddings are not finite."""
    return UserError(f"{folder}: its embeddings hold NaN or infinity; the training diverged, pretrain it again")


def _versions() -> dict[str, str]:
    from importlib.metadata import PackageNotFoundError, version

    found = {"python": platform.python_version()}
    for package in ("clips-mllm", "torch", "transformers"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:  # run from a source tree that was never installed
            found[package] = "not installed"
    return found
