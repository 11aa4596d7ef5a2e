"""`transformers.Trainer` with the contrastive and captioning objectives."""

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
from vision_tower.training.model_tools import final_state, parameter_groups
from vision_tower.training.nan_guard import refuse
from vision_tower.training.sigterm import leave_signals_to_the_trainer
from vision_tower.training.throughput import Throughput


class PretrainTrainer(StreamTrainer):
    """Adds the loss, decay on weight matrices only, the average of the weights, a stop on NaN, and what the log says.

    Args:
        step_loss: what is minimised; it makes accumulation contrastive-safe.
        training: the recipe's part that transformers does not know.
        checkpoint: the checkpoint the run goes on from, or none.
    """

    def __init__(
        self, *, step_loss: StepLoss, training: EncoderTraining, checkpoint: str | None = None, **kwargs: Any
    ) -> None:
        super().__init__(**kwargs)
        self.step_loss = step_loss
        self.model_accepts_loss_kwargs = False  # the loss is a mean over the global batch already
        self._keys: list[str] = []  # of the samples of this step
        self.throughput = Throughput(self.args.world_size, peak_flops(training))
        self.add_callback(self.throughput)
        self.average = WeightAverage(training.ema_decay, checkpoint) if training.ema_decay else None
        if self.average is not None:
            self.add_callback(self.average)
        if self.is_deepspeed_enabled:
            self.add_callback(ScaleLimit())

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        """The micro-batches of a step, with the time it took to get them."""
        with self.throughput.waiting():
            batches, items = super().get_batch_samples(*args, **kwargs)
        self._keys = [key for batch in batches for key in batch["keys"]]
        self.step_loss.start(batches)
        return batches, items

    def _prepare_inputs(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """On the device, where images are normalised."""
        pixels = normalize(inputs["pixel_values"].to(self.args.device, non_blocking=True))
        return super()._prepare_inputs(inputs | {"pixel_values": pixels})  # type: ignore[no-any-return]

    def _get_grad_norm(self, *args: Any, **kwargs: Any) -> Any:
        """The last place before the optimiser's step: nothing that is not finite goes further."""
        norm = super()._get_grad_norm(*args, **kwargs)
        values = {"loss": self._tr_loss, "gradient norm": torch.as_tensor(0.0 if norm is None else norm)}
        refuse(values, self.state.global_step + 1, self._keys, Path(self.args.output_dir))
        return norm

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """Model FLOPs of a micro-batch on this device; transformers asks after each."""
        flops = training_flops(self.model, inputs)
        self.throughput.add(len(inputs["pixel_values"]), flops)
        return flops

    def compute_loss(self, model: torch.nn.Module, inputs: dict[str, Any], *_: Any, **__: Any) -> torch.Tensor:
        """The loss of one micro-batch of this rank; its mean over micro-batches and ranks is the global one."""
        losses = self.step_loss(model, inputs, self._prepare_inputs)
        for name, value in losses.report.items():
            self._sums[name] = self._sums.get(name, torch.zeros_like(value)) + value
        self._steps += 1
        return losses.total

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Add the means over steps and ranks since the last line: every loss term, and how fast the run is."""
        if "loss" in logs and self._steps:
            terms = {name: value / self._steps for name, value in self._sums.items()}
            speed = {name: torch.tensor(value) for name, value in self.throughput.take().items()}
            means = self._mean_over_ranks(terms | speed)  # every rank logs, so every rank is here
            logs = logs | {name: round(mean, 6) for name, mean in means.items()}
            self._sums, self._steps = {}, 0
        super().log(logs, *args, **kwargs)

    def _mean_over_ranks(self, values: dict[str, torch.Tensor]) -> dict[str, float]:
        stacked = torch.stack([value.to(self.args.device, torch.float32) for value in values.values()])
        return dict(zip(values, self.accelerator.reduce(stacked, reduction="mean").tolist(), strict=True))

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)
        if self.average is not None:
            self.average.save(output_dir)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: torch.nn.Module | None = None) -> None:
        """Weights of a checkpoint, by `from_pretrained`, which knows the names that files use for ViTModel.

        Trainer's own version compares the file's names with the model's, warns, and goes on from the weights that the
        run began with.
        """
        self.model.load_state_dict(load_model(resume_from_checkpoint).state_dict())

    def whole_weights(self) -> dict[str, torch.Tensor] | None:
        """The fp32 state dict on the main process, None elsewhere; to be called on all ranks."""
        state = final_state(self)
        masters = self._masters() if self.is_deepspeed_enabled else {}
        return None if state is None else {name: masters.get(name, value).float() for name, value in state.items()}

    def averaged_weights(self) -> dict[str, torch.Tensor] | None:
        """The same with the averaged weights, None also where there is no average."""
        if self.average is None:
            return None
        with self.average.applied(self.model):
            state = final_state(self)
            exact = self.average.whole()  # the model itself may be in bf16
            if state is None:
                return None
            return {name: exact.get(name, value).float().cpu().clone() for name, value in state.items()}

    def _masters(self) -> dict[str, torch.Tensor]:
        """The fp32 weights of DeepSpeed's optimiser, whose model may hold them in bf16 only."""
        from deepspeed.utils import safe_get_full_fp32_param

        found = {name: safe_get_full_fp32_param(held) for name, held in self.model.named_parameters()}
        return {name: master.cpu() for name, master in found.items() if master is not None}

    def create_optimizer(self, model: torch.nn.Module | None = None) -> torch.optim.Optimizer:
        """AdamW; see `parameter_groups` for what decays."""
        if self.optimizer is None:  # type: ignore[has-type]
            kind, options = self.get_optimizer_cls_and_kwargs(self.args)
            self.optimizer = kind(parameter_groups(self.model, self.args.weight_decay), **options)
        return self.optimizer  # type: ignore[has-type]

    def get_train_dataloader(self) -> DataLoader:  # type: ignore[type-arg]
        """The stream splits itself over ranks; accelerate must not split it again."""
        return DataLoader(
            self.train_dataset,  # type: ignore[arg-type]
            batch_size=self.args.per_device_train_batch_size,
            collate_fn=self.data_collator,
            num_workers=self.args.dataloader_num_workers,
            worker_init_fn=leave_signals_to_the_trainer,
            pin_memory=torch.cuda.is_available(),
            drop_last=True,
        )


class ScaleLimit(TrainerCallback):
    """The model holds its logit scale at `MAX_SCALE`. DeepSpeed's optimiser steps on a weight of its own, which would
    go on above it, and which is saved.
    """

    def on_step_end(self, args: Any, state: Any, control: Any, *, model: torch.nn.Module, **_: Any) -> None:
        """On all ranks, since any may hold the weight."""
        from deepspeed.utils import safe_get_full_fp32_param, safe_set_full_fp32_param

        master, most = safe_get_full_fp32_param(model.logit_scale), math.log(MAX_SCALE)
        if master is not None and master.item() > most:
            safe_set_full_fp32_param(model.logit_scale, master.clamp(max=most))


def peak_flops(training: EncoderTraining) -> float | None:
    """FLOP/s that one device can do, from the recipe or, in bf16, from the table of known GPUs."""
    if training.peak_tflops is not None:
        return training.peak_tflops * 1e12
    return known_peak() if training.precision == "bf16" else None
