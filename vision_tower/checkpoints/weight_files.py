"""Read weight files of other projects: safetensors, or pickles restricted to tensors, so that no code runs."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from pathlib import Path

import torch

from vision_tower.common.errors import UserError


def read_tensors(file: Path) -> dict[str, torch.Tensor]:
    """Read the tensors of a `.safetensors`, `.bin` or `.pt` file by name, on the CPU.

    For a training checkpoint these are its `state_dict`, without DistributedDataParallel's prefix `module.`.

    Raises:
        UserError: a damaged file, a pickle with other objects than tensors, or a weight that is NaN or infinite.
    """
    tree = _read_safetensors(file) if file.suffix == ".safetensors" else _read_pickle(file)
    if isinstance(tree, dict) and isinstance(tree.get("state_dict"), dict):
        tree = tree["state_dict"]
    if not (isinstance(tree, dict) and tree and all(isinstance(value, torch.Tensor) for value in tree.values())):
        raise UserError("not a mapping of names to tensors", file=file, remedy="give a weight file")
    refuse_not_finite(file, tree)
    return {str(name).removeprefix("module."): value for name, value in tree.items()}


def refuse_not_finite(source: Path, weights: Mapping[str, torch.Tensor]) -> None:
    """Raise UserError if a weight is NaN or infinite."""
    for name, value in weights.items():
        if not value.isfinite().all():
            raise UserError("is NaN or infinite", file=source, key=name, remedy="it diverged: give another checkpoint")


def _read_safetensors(file: Path) -> object:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(file)
    except (SafetensorError, OSError) as error:
        raise UserError(f"not a readable safetensors file ({error})", file=file, remedy="download it again") from error


def _read_pickle(file: Path) -> object:
    try:
        return torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise UserError(
            "contains objects other than tensors, which could run code when loaded",
            file=file,
            remedy="download it again, or convert its weights to safetensors first",
        ) from error
    except (RuntimeError, EOFError, OSError, ValueError) as error:
        cause = (str(error).splitlines() or ["truncated"])[0]
        raise UserError(f"not a readable weight file ({cause})", file=file, remedy="download it again") from error
