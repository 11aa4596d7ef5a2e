"""What `clips-mllm plan` is asked: a recipe of `train` as it is, and the devices it would run on. No torch."""

from __future__ import annotations

import dataclasses
from typing import Literal

from clips_mllm.plan_shapes import UNKNOWN_TILES
from clips_mllm.train_recipe import InstructionRecipe, MllmRecipe, TrainRecipe
from vision_tower.errors import UserError


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
        memory_gb: memory of one of them, in 10^9 bytes.
        tflops: what one of them computes at most, in 10^12 bf16 operations a second; 312 is an A100.
        utilisation: share of that which training reaches.
        tokens: of the longest sample; 0 takes it from the data, or from data.max_length.
        table: print the ways to train 7B, 8B and 13B on 1, 4 and 8 GPUs of 24, 40 and 80 GB instead.
        json: print JSON instead of tables.
    """

    output_dir: str = ""
    model: MllmRecipe = dataclasses.field(default_factory=MllmRecipe)
    data: InstructionRecipe | None = None  # type: ignore[assignment]  # the table does without
    devices: int = 1
    device: Literal["gpu", "cpu"] = "gpu"
    memory_gb: float = 80.0
    tflops: float = 312.0
    utilisation: float = 0.4
    tokens: int = 0
    table: bool = False
    json: bool = False

    def check_plan(self) -> None:
        """Raise UserError where a number has no meaning, or the recipe is not there."""
        for name in ("devices", "memory_gb", "tflops", "utilisation"):
            if getattr(self, name) <= 0:
                raise UserError(f"{name}={getattr(self, name)}: must be above 0")
        if self.tokens < 0:
            raise UserError(f"tokens={self.tokens}: 0 (from the data) or a number of tokens")
        if self.data is None:
            raise UserError("plan: no recipe; give --config configs/mllm/NAME.yaml, or --table")
        if self.model.tiles is not None:
            raise UserError(f"model.tiles: {UNKNOWN_TILES}")
