"""Weights from files of others: safetensors, or pickles read as plain tensors, never as code."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from pathlib import Path

import torch

from vision_tower.common.errors import UserError


def read_tensors(file: Path) -> dict[str, torch.Tensor]:
    """Names and tensors of a `.safetensors`, `.bin` or `.pt`, on the CPU.

    Of a training checkpoint that is its `state_dict`, and DistributedDataParallel's `module.` is taken off the names.

    Raises:
        UserError: a damaged file, one that wants to run code, one without tensors, or with a weight that is not finite.
    """
    tree = _read_safetensors(file) if file.suffix == ".safetensors" else _read_pickle(file)
    if isinstance(tree, dict) and isinstance(tree.get("state_dict"), dict):
        tree = tree["state_dict"]
    if not (isinstance(tree, dict) and tree and all(isinstance(value, torch.Tensor) for value in tree.values())):
        raise UserError("not a mapping of names to tensors", file=file, remedy="give a file of weights")
    refuse_not_finite(file, tree)
    return {str(name).removeprefix("module."): value for name, value in tree.items()}


def refuse_not_finite(source: Path, weights: Mapping[str, torch.Tensor]) -> None:
    """Raise UserError where a weight is NaN or infinite, naming it."""
    for name, value in weights.items():
        if not value.isfinite().all():
            raise UserError(
                f"{name} holds NaN or infinity",
                file=source,
                remedy="its training has diverged, give another checkpoint",
            )


def _read_safetensors(file: Path) -> object:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(file)
    except (SafetensorError, OSError) as error:
        raise UserError(f"not a readable safetensors file ({error})", file=file, remedy="fetch it again") from error


def _read_pickle(file: Path) -> object:
    try:
        return torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise UserError(
            "holds more than plain tensors, and loading that could run code",
            file=file,
            remedy="fetch it again, or save its weights as safetensors first",
        ) from error
    except (RuntimeError, EOFError, OSError, ValueError) as error:
        cause = (str(error).splitlines() or ["it ends too early"])[0]
        raise UserError(f"not a readable file of weights ({cause})", file=file, remedy="fetch it again") from error
