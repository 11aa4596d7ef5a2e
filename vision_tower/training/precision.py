"""What a recipe's `precision: auto` is on this device.

A CPU without instructions for bf16 imitates them, and takes several times as long as in fp32 (docs/log.md).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from vision_tower.training.recipe import TrainingRecipe

Training = TypeVar("Training", bound=TrainingRecipe)

# As cpuinfo names them: x86's two, then those of ARM.
CPU_BF16 = ("avx512_bf16", "amx_bf16", "bf16", "sve_bf16")


def settle_precision(training: Training, bf16: Callable[[], bool]) -> Training:
    """The recipe with bf16 or fp32 in place of `auto`; `bf16` is asked for nothing else."""
    if training.precision != "auto":
        return training
    return dataclasses.replace(training, precision="bf16" if bf16() else "fp32")


def computes_bf16() -> bool:
    """Whether the device that training would take computes in bf16 itself."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return cpu_computes_bf16()


def cpu_computes_bf16() -> bool:
    """Whether this CPU has instructions for bf16; of a PyTorch that cannot tell, no."""
    import torch

    # The question is newer than the oldest PyTorch that is supported.
    capabilities: Mapping[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    return any(capabilities.get(name, False) for name in CPU_BF16)
