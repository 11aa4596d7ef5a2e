"""Size of the process group and index of this process; 1 and 0 if nothing is distributed."""

from __future__ import annotations

import torch.distributed as dist


def world() -> int:
    """Return the number of ranks."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Return the index of this rank."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0
