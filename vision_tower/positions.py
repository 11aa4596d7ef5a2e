"""Fixed two-dimensional sin-cos positions (MoCo v3, arXiv 2104.02057)."""

from __future__ import annotations

import torch


def sincos_positions(side: int, width: int, class_token: bool = False) -> torch.Tensor:
    """Positions of a `side` x `side` grid in reading order, (side * side, width), fp32; a class token's zeros before.

    Order of the four quarters: sin x, cos x, sin y, cos y; omega_i = 10000 ** (-i / (width / 4 - 1)).
    """
    if width % 4:
        raise ValueError(f"sin-cos positions need a width divisible by 4, got {width}")
    quarter = width // 4
    omega = 10000.0 ** (-torch.arange(quarter, dtype=torch.float64) / max(quarter - 1, 1))
    y, x = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    angle_x = x.flatten()[:, None] * omega
    angle_y = y.flatten()[:, None] * omega
    table = torch.cat([angle_x.sin(), angle_x.cos(), angle_y.sin(), angle_y.cos()], dim=1).float()
    return torch.cat([torch.zeros(1, width), table]) if class_token else table
