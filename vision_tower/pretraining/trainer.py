"""Trainer of the contrastive and captioning objectives."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader
from transformers import TrainerCallback

from vision_tower.checkpoints.loading import load_model
from vision_tower.data.images import normalize
from vision_tower.model.flops import known_peak, training_flops
from vision_tower.model.modeling import MAX_SCALE
from vision_tower.model.step_loss import StepLoss
from vision_tower.pretraining.recipe import EncoderTraining
from vision_tower.pretraining.stream_trainer import StreamTrainer
from vision_tower.training.ema import WeightAverage
from vision_tower.training.loader_signals import ignore_signals_in_worker
from vision_tower.training.model_tools import final_state, parameter_groups
from vision_tower.training.throughput import Throughput


class PretrainTrainer(StreamTrainer):
    """Adds the loss, weight decay of matrices only, the weight average, and the logged values.

    Args:
        step_loss: loss of an optimizer step; with accumulation, it contrasts the pairs of all micro-batches.
        training: recipe, for settings that transformers does not have.
        checkpoint: checkpoint to resume from, or None.
    """

    def __init__(
        self, *, step_loss: StepLoss, training: EncoderTraining, checkpoint: str | None = None, **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        self.step_loss = step_loss
        self.model_accepts_loss_kwargs = False  # the loss is already a mean over the global batch
        self._keys: list[str] = []  # sample keys of the current step
        self.throughput = Throughput(self.args.world_size, peak_flops(training))
        self.add_callback(self.throughput)
        self.average = WeightAverage(training.ema_decay, checkpoint) if training.ema_decay else None
        if self.average is not None:
            self.add_callback(self.average)
        if self.is_deepspeed_enabled:
            self.add_callback(ScaleLimit())

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        """Read the micro-batches of a step; time the wait for them."""
        with self.throughput.waiting():
            batches, items = super().get_batch_samples(*args, **kwargs)
        self._keys = [key for batch in batches for key in batch["keys"]]
        self.step_loss.start(batches)
        return batches, items

    def step_samples(self) -> list[str]:
        """Return the keys of this step's samples."""
        return self._keys

    def training_step(self, model: torch.nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> torch.Tensor:
        """Run forward and backward on a micro-batch."""
        return super().training_step(model, self._normalize(inputs), *args, **kwargs)

    def _normalize(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """Normalize the images on the device: the loader sends bytes, a quarter of the size of floats."""
        pixels = normalize(inputs["pixel_values"].to(self.args.device, non_blocking=True))
        return inputs | {"pixel_values": pixels}

    def _to_device(self, inputs: dict[str, Any]) -> dict[str, Any]:
        return self._prepare_inputs(self._normalize(inputs))  # type: ignore[no-any-return]

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """Return the model FLOPs of a micro-batch on this device. transformers calls this after each one."""
        flops = training_flops(self.model, inputs)
        self.throughput.add(len(inputs["pixel_values"]), flops)
        return flops

    def compute_loss(self, model: torch.nn.Module, inputs: dict[str, Any], *_: Any, **__: Any) -> torch.Tensor:
        """Return the loss of one micro-batch; the mean over micro-batches and ranks is the loss of the global batch."""
        losses = self.step_loss(model, inputs, self._to_device)
        for name, value in losses.report.items():
            self._sums[name] = self._sums.get(name, torch.zeros_like(value)) + value
        self._steps += 1
        return losses.total

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Add loss terms and throughput, as means over ranks and over the steps since the last log line."""
        if "loss" in logs and self._steps:
            terms = {name: value / self._steps for name, value in self._sums.items()}
            speed = {name: torch.tensor(value) for name, value in self.throughput.take().items()}
            means = self._mean_over_ranks(terms | speed)  # collective: all ranks log at the same steps
            logs = logs | {name: round(mean, 6) for name, mean in means.items()}
            self._sums, self._steps = {}, 0
        super().log(logs, *args, **kwargs)

    def _mean_over_ranks(self, values: dict[str, torch.Tensor]) -> dict[str, float]:
        stacked = torch.stack([value.to(self.args.device, torch.float32) for value in values.values()])
        return dict(zip(values, self.accelerator.reduce(stacked, reduction="mean").tolist(), strict=True))

    def write_state(self, folder: Path) -> None:
        """Write the extra state and the weight average."""
        super().write_state(folder)
        if self.average is not None:
            self.average.save(folder)

    def read_model(self, folder: str) -> None:
        """Load by `from_pretrained`, which maps the names that files use for ViTModel."""
        self.model.load_state_dict(load_model(folder).state_dict())

    def full_weights(self) -> dict[str, torch.Tensor] | None:
        """Return the fp32 state dict on the main process and None elsewhere. Every rank must call this."""
        state = final_state(self)
        masters = self._masters() if self.is_deepspeed_enabled else {}
        return None if state is None else {name: masters.get(name, value).float() for name, value in state.items()}

    def averaged_weights(self) -> dict[str, torch.Tensor] | None:
        """Return the same with averaged weights; None if the run keeps no average."""
        if self.average is None:
            return None
        with self.average.applied(self.model):
            state = final_state(self)
            exact = self.average.unsharded()  # fp32, while the model may be in bf16
            if state is None:
                return None
            return {name: exact.get(name, value).float().cpu().clone() for name, value in state.items()}

    def _masters(self) -> dict[str, torch.Tensor]:
        """Return the fp32 master weights of DeepSpeed's optimizer; the model's own weights may be bf16."""
        from deepspeed.utils import safe_get_full_fp32_param

        masters = {name: safe_get_full_fp32_param(weights) for name, weights in self.model.named_parameters()}
        return {name: master.cpu() for name, master in masters.items() if master is not None}

    def create_optimizer(self, model: torch.nn.Module | None = None) -> torch.optim.Optimizer:
        """Create AdamW with the groups of `parameter_groups`."""
        if self.optimizer is None:  # type: ignore[has-type]
            kind, options = self.get_optimizer_cls_and_kwargs(self.args)
            self.optimizer = kind(parameter_groups(self.model, self.args.weight_decay), **options)
        return self.optimizer  # type: ignore[has-type]

    def get_train_dataloader(self) -> DataLoader:  # type: ignore[type-arg]
        """Return a plain DataLoader: the stream divides its samples over ranks, so accelerate must not."""
        return DataLoader(
            self.train_dataset,  # type: ignore[arg-type]
            batch_size=self.args.per_device_train_batch_size,
            collate_fn=self.data_collator,
            num_workers=self.args.dataloader_num_workers,
            worker_init_fn=ignore_signals_in_worker,
            pin_memory=torch.cuda.is_available(),
            drop_last=True,
        )


class ScaleLimit(TrainerCallback):
    """Clamps DeepSpeed's fp32 master of the logit scale to `MAX_SCALE`.

    The model clamps its own weight, but DeepSpeed updates and saves the master.
    """

    def on_step_end(self, args: Any, state: Any, control: Any, *, model: torch.nn.Module, **_: Any) -> None:
        """Clamp on all ranks, because the weight may be on any of them."""
        from deepspeed.utils import safe_get_full_fp32_param, safe_set_full_fp32_param

        master, maximum = safe_get_full_fp32_param(model.logit_scale), math.log(MAX_SCALE)
        if master is not None and master.item() > maximum:
            safe_set_full_fp32_param(model.logit_scale, master.clamp(max=maximum))


def peak_flops(training: EncoderTraining) -> float | None:
    """Return the peak FLOP/s of one device: from the recipe or, for bf16, from the table of known GPUs."""
    if training.peak_tflops is not None:
        return training.peak_tflops * 1e12
    return known_peak() if training.precision == "bf16" else None
