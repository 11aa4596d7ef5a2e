"""The optimization recipe of all three training stages.

A recipe states the *global* batch size; the accumulation steps follow from it. The module has no TYPE_CHECKING block:
jsonargparse executes such blocks in recipe modules, and importing torch there would add seven seconds to `--help`.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Literal

from vision_tower.common.errors import UserError
from vision_tower.common.recipe import check_ranges


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainingRecipe:
    """Optimization.

    Args:
        global_batch_size: samples per optimizer step, over all devices and accumulation steps.
        device_batch_size: samples per forward pass on one device.
        learning_rate: peak learning rate.
        schedule: learning rate schedule after warmup.
        warmup_steps: optimizer steps of linear warmup.
        warmup_ratio: linear warmup as a fraction of all steps; used if `warmup_steps` is 0.
        max_steps: optimizer steps; if 0, `epochs` sets the length of the run.
        epochs: passes over the data; used if `max_steps` is 0.
        weight_decay: weight decay of weight matrices; other parameters have none.
        beta1: AdamW beta1.
        beta2: AdamW beta2.
        clip_norm: maximum gradient norm; 0 disables clipping.
        precision: bf16 (bf16 activations, fp32 master weights) or fp32; auto selects bf16 on devices with bf16
            hardware and fp32 on others.
        gradient_checkpointing: recompute activations in the backward pass to save memory.
        deepspeed: DeepSpeed JSON config (configs/deepspeed/); null for plain data parallelism.
        save_every: optimizer steps between checkpoints; 0 writes no intermediate checkpoints.
        keep_checkpoints: number of newest checkpoints to keep.
        log_every: optimizer steps between lines of metrics.jsonl.
        workers: data loader processes per device.
        report_to: additional experiment trackers.
        seed: random seed of initialization, data order and augmentation.
        extra: other fields of transformers.TrainingArguments, if the recipe has no field for them.
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
        """Raise UserError if a value is out of range."""
        from_1, from_0 = "[1, inf)", "[0, inf)"
        check_ranges(self, "training.", global_batch_size=from_1, device_batch_size=from_1, log_every=from_1)
        check_ranges(self, "training.", keep_checkpoints=from_1, max_steps=from_0, save_every=from_0, workers=from_0)
        check_ranges(self, "training.", learning_rate=from_0, weight_decay=from_0, clip_norm=from_0)
        check_ranges(self, "training.", warmup_steps=from_0, warmup_ratio="[0, 1)", beta1="[0, 1)", beta2="[0, 1)")
        if not self.max_steps and not 0 < self.epochs < math.inf:
            raise UserError("must be above 0 if training.max_steps is 0", key="training.epochs", value=self.epochs)

    def accumulation(self, world: int) -> int:
        """Return the forward passes per optimizer step. Raise UserError if the batch sizes do not divide."""
        per_pass = self.device_batch_size * world
        if self.global_batch_size % per_pass:
            raise UserError(
                f"is not a multiple of training.device_batch_size={self.device_batch_size} x {world} devices",
                key="training.global_batch_size",
                value=self.global_batch_size,
                remedy="change one of the three",
            )
        return self.global_batch_size // per_pass
