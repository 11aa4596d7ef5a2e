"""What `clips-mllm plan` is asked: a recipe of `train` as it is, and the devices it would run on. No torch."""

from __future__ import annotations

import dataclasses
import os
from typing import Literal

import psutil

from clips_mllm.data.recipe import InstructionRecipe
from clips_mllm.model.recipe import MllmRecipe
from clips_mllm.planning.shapes import UNKNOWN_TILES
from clips_mllm.training.recipe import TrainRecipe
from vision_tower.common.errors import UserError

GB = 1e9
# What one device has, and does, where the user does not say.
GPU_MEMORY, GPU_FLOPS, GPU_UTILISATION = 80 * GB, 312e12, 0.4  # an A100 in bf16
CORE_FLOPS = {"fp32": 0.085e12, "bf16": 0.198e12}  # `linear` on cores with AVX2, and with AVX-512 bf16 (docs/log.md)
CORE_UTILISATION = 0.6


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlanRecipe(TrainRecipe):
    """Memory, batch and time of a recipe of `train` before anything runs; with --table, of LLaVA-1.5's sizes on GPUs.

    Args:
        output_dir: not written to.
        model: what the MLLM is made of; sizes come from config.json, weights are not needed.
        data: the conversations; where the file is there, lengths come from it.
        stage: what trains.
        training: how to optimise.
        evaluation: not looked at.
        devices: how many devices train.
        device: their kind.
        memory_gb: memory of one of them, in 10^9 bytes; if not given, 80 for a GPU, and for CPUs this machine's.
        tflops: what one of them computes at most, in 10^12 operations a second; if not given, 312 for a GPU (an A100 in
            bf16), and for CPUs so much for each core of this machine as docs/log.md found in one.
        utilisation: share of that which training reaches; if not given, 0.4 on GPUs and 0.6 on CPUs.
        tokens: of the longest sample; 0 takes it from the data, or from data.max_length.
        table: print the ways to train 7B, 8B and 13B on 1, 4 and 8 GPUs of 24, 40 and 80 GB instead.
        json: print JSON instead of tables.
    """

    output_dir: str = ""
    model: MllmRecipe = dataclasses.field(default_factory=MllmRecipe)
    data: InstructionRecipe | None = None  # type: ignore[assignment]  # the table does without
    devices: int = 1
    device: Literal["gpu", "cpu"] = "gpu"
    memory_gb: float | None = None
    tflops: float | None = None
    utilisation: float | None = None
    tokens: int = 0
    table: bool = False
    json: bool = False

    def check_plan(self) -> None:
        """Raise UserError where a number has no meaning, or the recipe is not there."""
        for name in ("devices", "memory_gb", "tflops", "utilisation"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise UserError(f"{name}={value}: must be above 0")
        if self.tokens < 0:
            raise UserError(f"tokens={self.tokens}: 0 (from the data) or a number of tokens")
        if self.data is None:
            raise UserError("plan: no recipe", remedy="give --config configs/mllm/NAME.yaml, or --table")
        if self.model.tiles is not None:
            raise UserError(f"{UNKNOWN_TILES}", key="model.tiles")

    @property
    def available(self) -> float:
        """Memory of one device in bytes; CPU ranks share the machine's."""
        if self.memory_gb is not None:
            return self.memory_gb * GB
        return GPU_MEMORY if self.device == "gpu" else psutil.virtual_memory().total / self.devices

    @property
    def flops(self) -> float:
        """Operations that one device really does in a second; with `training.precision` settled."""
        cores = (os.cpu_count() or 1) / self.devices
        most = GPU_FLOPS if self.device == "gpu" else CORE_FLOPS[self.training.precision] * cores
        reached = GPU_UTILISATION if self.device == "gpu" else CORE_UTILISATION
        return (most if self.tflops is None else self.tflops * 1e12) * (self.utilisation or reached)
