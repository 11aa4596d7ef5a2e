"""Position embeddings of image patches: 2D sin-cos (MoCo v3, arXiv 2104.02057) and interpolation of learned ones."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F


def sincos_positions(side: int, width: int, class_token: bool = False) -> torch.Tensor:
    """Return the positions of a `side` x `side` grid in reading order, (side * side, width), fp32.

    With a class token, a row of zeros comes first. The four quarters of the width are sin x, cos x, sin y, cos y, with
    omega_i = 10000 ** (-i / (width / 4 - 1)).
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


def interpolate_positions(table: torch.Tensor, side: int, class_token: bool = False) -> torch.Tensor:
    """Interpolate learned positions to a `side` x `side` grid: bicubic and antialiased, as in open_clip.

    Args:
        table: (p, w), or (1 + p, w) with a class token, whose position is kept.
    """
    first, grid = table[: int(class_token)], table[int(class_token) :]
    old = math.isqrt(len(grid))
    image = grid.view(1, old, old, -1).permute(0, 3, 1, 2).float()
    resized = F.interpolate(image, size=(side, side), mode="bicubic", antialias=True)
    return torch.cat([first, resized.permute(0, 2, 3, 1).flatten(0, 2).to(table.dtype)])


def resized_positions(table: torch.Tensor, side: int, class_token: bool, sincos: bool | None = None) -> torch.Tensor:
    """Return a tower's position table for a `side` x `side` grid: sin-cos recomputed, or learned interpolated.

    Args:
        table: (p, w), or (1 + p, w) with a class token; leading dimensions of 1 are kept.
        sincos: kind of the positions; None compares the table with the sin-cos one.
    """
    flat = table.detach().flatten(end_dim=-2)
    width = flat.shape[-1]
    if sincos is None:
        old = math.isqrt(len(flat) - int(class_token))
        # bf16 rounds values below 1 by up to 2e-3.
        sincos = width % 4 == 0 and torch.allclose(flat.float(), sincos_positions(old, width, class_token), atol=4e-3)
    new = sincos_positions(side, width, class_token) if sincos else interpolate_positions(flat, side, class_token)
    return new.to(table.dtype).view(*table.shape[:-2], *new.shape)
