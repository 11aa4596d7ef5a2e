"""How many processes train together, and which of them this is; one where nothing is distributed."""

from __future__ import annotations

import torch.distributed as dist


def world() -> int:
    """Ranks."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """This rank's number."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0
