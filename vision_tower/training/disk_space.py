"""Expected checkpoint size and free disk space."""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from pathlib import Path

from torch import nn

from vision_tower.training.model_tools import size


def expected_bytes(saved: Iterable[nn.Parameter]) -> int:
    """Estimate the size of a checkpoint: the saved weights, and two fp32 moments for each trained weight.

    A lower bound (DeepSpeed also keeps fp32 weights), so a checkpoint that fits is never refused.
    """
    return sum(size(weights) * (weights.element_size() + 8 * weights.requires_grad) for weights in saved)


def free_bytes(folder: Path) -> int:
    """Return the free space of the file system of `folder`, which does not need to exist yet."""
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


def folder_bytes(folder: Path) -> int:
    """Return the total size of all files below a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def gigabytes(count: int) -> str:
    """Format a number of bytes for messages."""
    return f"{count / 1e9:.1f} GB" if count >= 1e8 else f"{count / 1e6:.1f} MB"
