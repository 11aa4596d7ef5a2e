"""Numbers that ship in catalog.yaml: sizes of models, rows of data files, constants of devices. No torch."""

from __future__ import annotations

import dataclasses
import functools
import os
from importlib import resources
from typing import Any, Literal

import psutil
import yaml

Kind = Literal["cpu", "gpu"]
GB = 1e9


@dataclasses.dataclass(frozen=True, kw_only=True)
class Device:
    """Constants of one device; catalog.yaml gives the source of each.

    Attributes:
        memory_gb: memory in 10^9 bytes.
        tflops: peak speed in 10^12 floating-point operations per second.
        utilization: fraction of `tflops` that training reaches.
        process_gb: memory used before any tensor is allocated, in 10^9 bytes.
        slack: memory that the allocator holds in excess of what it was asked for, as a fraction.
    """

    kind: Kind
    memory_gb: float
    tflops: float
    utilization: float
    process_gb: float
    slack: float

    @property
    def flops(self) -> float:
        """Floating-point operations per second in training."""
        return self.tflops * 1e12 * self.utilization


@functools.cache
def read_catalog() -> dict[str, Any]:
    """Parse catalog.yaml."""
    text = (resources.files("clips_mllm.planning") / "catalog.yaml").read_text(encoding="utf-8")
    return dict(yaml.safe_load(text))


def default_device(kind: Kind, *, precision: Literal["bf16", "fp32"] = "bf16", ranks: int = 1) -> Device:
    """Return the catalog's GPU, or one rank's part of this machine's CPUs.

    Args:
        precision: selects the measured speed of a CPU core.
        ranks: processes that share the CPU cores and the memory; ignored for GPUs.
    """
    values = dict(read_catalog()["devices"][kind])
    if kind == "cpu":
        values["tflops"] = values.pop("tflops_per_core")[precision] * (os.cpu_count() or 1) / ranks
        values["memory_gb"] = psutil.virtual_memory().total / ranks / GB
    return Device(kind=kind, **values)
