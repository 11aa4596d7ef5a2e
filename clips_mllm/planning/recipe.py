"""Recipe of `clips-mllm plan`: a recipe of `train`, and the devices to plan for. No torch."""

from __future__ import annotations

import dataclasses
from typing import Literal

from clips_mllm.data.recipe import InstructionRecipe
from clips_mllm.model.recipe import MllmRecipe
from clips_mllm.planning.catalog import Device, default_device
from clips_mllm.training.recipe import TrainRecipe
from vision_tower.common.errors import UserError
from vision_tower.common.recipe import check_ranges


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlanRecipe(TrainRecipe):
    """Estimate memory, batch size and time of a training recipe; with --table, of LLaVA-1.5's sizes on GPUs.

    Args:
        output_dir: ignored by this command.
        model: tower and LLM, or a checkpoint. Weights are not needed.
        data: the conversations. Lengths are measured on them if the files exist.
        stage: what trains.
        training: how to optimize.
        evaluation: ignored by this command.
        recipes: folder of YAML recipes. If a model folder does not exist yet, its sizes come from the recipe whose
            output_dir makes it.
        devices: number of devices that train.
        device: kind of device.
        memory_gb: memory of one device in 10^9 bytes (default: 80 for a GPU; this machine's memory / devices for CPUs).
        tflops: peak speed of one device in 10^12 operations per second (default: 312 for a GPU, which is an A100 in
            bf16; for CPUs the speed of one measured core x cores of this machine / devices).
        utilization: fraction of tflops that training reaches (default: 0.4 for a GPU, 0.6 for CPUs).
        process_gb: memory of a process before any tensor is allocated, in 10^9 bytes (default: 1.0 for a GPU, 1.6 for
            CPUs).
        slack: memory that the allocator holds in excess of what it was asked for, as a fraction (default: 0.05 for a
            GPU, 0 for CPUs).
        tokens: length of the longest sample; 0 measures it, or takes data.max_length if data.file does not exist.
        text_tokens: mean length of a sample's text, used if lengths cannot be measured.
        samples: samples in an epoch, used if data.file does not exist; 0 takes the size of LLaVA's files.
        table: print how to train 7B, 8B and 13B on 1, 4 and 8 GPUs of 24, 40 and 80 GB instead.
        json: print JSON.
    """

    output_dir: str = ""
    model: MllmRecipe = dataclasses.field(default_factory=MllmRecipe)
    data: InstructionRecipe | None = None  # type: ignore[assignment]  # --table needs none
    recipes: str = "configs"
    devices: int = 1
    device: Literal["gpu", "cpu"] = "gpu"
    memory_gb: float | None = None
    tflops: float | None = None
    utilization: float | None = None
    process_gb: float | None = None
    slack: float | None = None
    tokens: int = 0
    text_tokens: int = 300
    samples: int = 0
    table: bool = False
    json: bool = False

    def check_plan(self) -> None:
        """Raise UserError if a number is out of range, or there is no recipe."""
        check_ranges(self, devices="(0, inf)", memory_gb="(0, inf)", tflops="(0, inf)", utilization="(0, inf)")
        check_ranges(self, process_gb="[0, inf)", slack="[0, inf)")
        check_ranges(self, tokens="[0, inf)", text_tokens="[0, inf)", samples="[0, inf)")
        if self.data is None:
            raise UserError("no recipe", key="--config", remedy="give --config configs/mllm/NAME.yaml, or --table")

    @property
    def hardware(self) -> Device:
        """The device to plan for: the catalog's, with the given options. Needs a settled training.precision."""
        precision: Literal["bf16", "fp32"] = "fp32" if self.training.precision == "fp32" else "bf16"
        known = default_device(self.device, precision=precision, ranks=self.devices)
        names = ("memory_gb", "tflops", "utilization", "process_gb", "slack")
        given = {name: getattr(self, name) for name in names if getattr(self, name) is not None}
        return dataclasses.replace(known, **given)
