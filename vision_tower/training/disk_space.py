"""How large a checkpoint will be, and how much room there is."""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from pathlib import Path

from torch import nn

from vision_tower.training.model_tools import size


def expected_bytes(saved: Iterable[nn.Parameter]) -> int:
    """A checkpoint's size before there is one: the weights that are saved, and two fp32 moments of what trains.

    A lower bound (DeepSpeed also keeps fp32 weights), so that nothing is refused that would have fitted.
    """
    return sum(size(weights) * (weights.element_size() + 8 * weights.requires_grad) for weights in saved)


def free_bytes(folder: Path) -> int:
    """Free space where `folder` is or will be."""
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


def folder_bytes(folder: Path) -> int:
    """What the files below `folder` take."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def gigabytes(count: int) -> str:
    """For people."""
    return f"{count / 1e9:.1f} GB" if count >= 1e8 else f"{count / 1e6:.1f} MB"
