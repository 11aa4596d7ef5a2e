"""Resolves `precision: auto` for the device.

A CPU without bf16 instructions emulates them, which takes several times as long as fp32 (docs/log.md).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from vision_tower.training.recipe import TrainingRecipe

Training = TypeVar("Training", bound=TrainingRecipe)

# Names of cpuinfo: the first two are x86, the others ARM.
CPU_BF16 = ("avx512_bf16", "amx_bf16", "bf16", "sve_bf16")


def settle_precision(training: Training, bf16: Callable[[], bool]) -> Training:
    """Replace `auto` by bf16 if `bf16()` returns True and by fp32 otherwise. Called only for `auto`."""
    if training.precision != "auto":
        return training
    return dataclasses.replace(training, precision="bf16" if bf16() else "fp32")


def computes_bf16() -> bool:
    """Return True if the training device has bf16 hardware."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return cpu_computes_bf16()


def cpu_computes_bf16() -> bool:
    """Return True if this CPU has bf16 instructions. PyTorch versions that cannot tell count as False."""
    import torch

    # get_capabilities is newer than the oldest supported PyTorch.
    capabilities: Mapping[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    return any(capabilities.get(name, False) for name in CPU_BF16)
