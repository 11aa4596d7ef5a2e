"""The optimisation recipe of all three training stages: the values that differ between a laptop and a cluster.

The *global* batch is stated, and accumulation follows from it. Alone in its module, and without a TYPE_CHECKING block:
jsonargparse runs such a block in the module of every recipe, and torch there would cost `--help` seven seconds.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Literal

from vision_tower.common.errors import UserError


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainingRecipe:
    """How to optimise.

    Args:
        global_batch_size: samples in one optimiser step, over all devices and accumulation steps.
        device_batch_size: samples in one forward pass of one device.
        learning_rate: peak learning rate.
        schedule: shape after the warm-up.
        warmup_steps: linear warm-up, as a number of optimiser steps.
        warmup_ratio: linear warm-up, as a share of all steps; used where `warmup_steps` is 0.
        max_steps: optimiser steps; 0 means that `epochs` decides.
        epochs: passes over the data where `max_steps` is 0.
        weight_decay: on weight matrices only.
        beta1: of AdamW.
        beta2: of AdamW.
        clip_norm: largest gradient norm; 0 switches clipping off.
        precision: bf16 activations with fp32 master weights, or fp32 throughout; auto is bf16 where the device computes
            in it, and fp32 on CPUs that would imitate it.
        gradient_checkpointing: trade a second forward pass for memory.
        deepspeed: a DeepSpeed JSON (configs/deepspeed/), or none for plain data parallelism.
        save_every: optimiser steps between checkpoints; 0 saves at the end only.
        keep_checkpoints: how many of the newest checkpoints stay.
        log_every: optimiser steps between lines of metrics.jsonl.
        workers: loader processes per device.
        report_to: where the log goes besides metrics.jsonl; nowhere unless asked.
        seed: of initialisation, data order and augmentation.
        extra: any other field of transformers.TrainingArguments, for which a recipe has none of its own.
    """

    global_batch_size: int = 128
    device_batch_size: int = 16
    learning_rate: float = 1e-3
    schedule: Literal["cosine", "linear", "constant_with_warmup"] = "cosine"
    warmup_steps: int = 0
    warmup_ratio: float = 0.0
    max_steps: int = 0
    epochs: float = 1.0
    weight_decay: float = 0.0
    beta1: float = 0.9
    beta2: float = 0.999
    clip_norm: float = 1.0
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    gradient_checkpointing: bool = False
    deepspeed: str | None = None
    save_every: int = 0
    keep_checkpoints: int = 1
    log_every: int = 10
    workers: int = 1
    report_to: tuple[Literal["tensorboard", "wandb"], ...] = ()
    seed: int = 0
    extra: dict[str, Any] = dataclasses.field(default_factory=dict)

    def check(self) -> None:
        """Raise UserError where a number has no meaning."""
        least = {
            "global_batch_size": 1,
            "device_batch_size": 1,
            "log_every": 1,
            "max_steps": 0,
            "save_every": 0,
            "workers": 0,
            "warmup_steps": 0,
            "keep_checkpoints": 1,
        }
        for name, value in least.items():
            if getattr(self, name) < value:
                raise UserError(f"training.{name}={getattr(self, name)}: at least {value}")
        for name in ("learning_rate", "weight_decay", "clip_norm"):
            if not 0 <= getattr(self, name) < math.inf:
                raise UserError(f"training.{name}={getattr(self, name)}: a number from 0")
        for name in ("beta1", "beta2", "warmup_ratio"):
            if not 0 <= getattr(self, name) < 1:
                raise UserError(f"training.{name}={getattr(self, name)}: from 0 to below 1")
        if not self.max_steps and not 0 < self.epochs < math.inf:
            raise UserError(
                "above 0, where training.max_steps does not decide", key="training.epochs", value=self.epochs
            )

    def accumulation(self, world: int) -> int:
        """Forward passes per optimiser step. Raises UserError where the numbers do not divide."""
        together = self.device_batch_size * world
        if self.global_batch_size % together:
            raise UserError(
                f"training.global_batch_size={self.global_batch_size} is not a multiple of "
                f"device_batch_size={self.device_batch_size} x {world} devices",
                remedy="change one of the three",
            )
        return self.global_batch_size // together
