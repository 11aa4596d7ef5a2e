"""What a score was measured with: the checkpoint's hash, preprocessing, versions, command."""

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
    """The part that all results of an encoder share."""
    return {
        "encoder": str(folder),
        "sha256": checkpoint_digest(folder),
        "preprocessing": {key: value for key, value in encoder.processor.to_dict().items() if value is not None},
        "command": command_line(command, argv),
        "versions": versions(),
        "hardware": hardware(),
    }


def refuse_mixed_precision(folders: Iterable[Path]) -> None:
    """A recipe's `precision: auto` may have been bf16 on one machine and fp32 on the next.

    Raises:
        UserError: runs of both.
    """
    runs: dict[str, Path] = {}
    for folder in folders:
        file = folder / "recipe.yaml"
        if file.is_file():  # a tower of others has none
            training = yaml.safe_load(read_text(file)).get("training", {})
            runs.setdefault(training.get("precision", "unknown precision"), folder)
    if len(runs) > 1:
        said = ", ".join(f"{folder} in {precision}" for precision, folder in runs.items())
        raise UserError(
            f"{said}: not to be compared", remedy="remove those of one, and run the same command on one machine"
        )


def checkpoint_digest(folder: Path) -> str:
    """SHA-256 of `model.safetensors`; of all shards in the order of their names where the weights are sharded.

    Raises:
        UserError: the folder holds no weights.
    """
    single = folder / "model.safetensors"
    shards = [single] if single.is_file() else sorted(folder.glob("model-*.safetensors"))
    if not shards:
        raise UserError(
            "no model.safetensors here", file=folder, remedy="give the folder that 'clips-mllm pretrain' wrote"
        )
    return file_hash(*shards)


def diverged(folder: Path) -> UserError:
    """What to say of an encoder whose embeddings are not finite."""
    return UserError(
        "its embeddings hold NaN or infinity", file=folder, remedy="the training diverged, pretrain it again"
    )
