"""Provenance of an encoder's scores: checkpoint hash, preprocessing, versions, command."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from vision_tower.common.errors import UserError
from vision_tower.common.files import read_text
from vision_tower.common.hashes import file_hash
from vision_tower.common.provenance import command_line, hardware, versions

if TYPE_CHECKING:
    from vision_tower.checkpoints.encoder import Encoder


def provenance(folder: Path, encoder: Encoder, command: str, argv: list[str]) -> dict[str, Any]:
    """Return the fields that all results of an encoder have in common."""
    return {
        "encoder": str(folder),
        "sha256": checkpoint_digest(folder),
        "preprocessing": {key: value for key, value in encoder.processor.to_dict().items() if value is not None},
        "command": command_line(command, argv),
        "versions": versions(),
        "hardware": hardware(),
    }


def refuse_mixed_precision(folders: Iterable[Path]) -> None:
    """Check that all runs trained in the same precision; `precision: auto` depends on the machine.

    Raises:
        UserError: two runs differ.
    """
    runs: dict[str, Path] = {}
    for folder in folders:
        file = folder / "recipe.yaml"
        if file.is_file():  # encoders from elsewhere have no recipe
            training = yaml.safe_load(read_text(file)).get("training", {})
            runs.setdefault(training.get("precision", "unknown precision"), folder)
    if len(runs) > 1:
        details = ", ".join(f"{folder} in {precision}" for precision, folder in runs.items())
        raise UserError(
            f"runs in different precision cannot be compared ({details})",
            key="training.precision",
            remedy="delete those of one precision, and run the same command on one machine",
        )


def checkpoint_digest(folder: Path) -> str:
    """Return the SHA-256 of `model.safetensors`, or of all shards in the order of their names.

    Raises:
        UserError: the folder has no weights.
    """
    single = folder / "model.safetensors"
    shards = [single] if single.is_file() else sorted(folder.glob("model-*.safetensors"))
    if not shards:
        raise UserError("has no model.safetensors", file=folder, remedy="give a folder of 'clips-mllm pretrain'")
    return file_hash(*shards)


def diverged(folder: Path) -> UserError:
    """Return the error for an encoder whose embeddings are not finite."""
    return UserError("its embeddings contain NaN or infinity", file=folder, remedy="it diverged, pretrain it again")
