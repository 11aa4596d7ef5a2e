"""Exponential moving average (EMA) of the weights, an option of pretraining.

    average <- decay * average + (1 - decay) * weights        after every optimizer step

The first steps use the smaller decay min(decay, (1 + step) / (10 + step)), which reduces the influence of the random
initialization (as in TensorFlow's ExponentialMovingAverage).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback

from vision_tower.common.errors import UserError
from vision_tower.common.ranks import rank


class WeightAverage(TrainerCallback):
    """Keeps an fp32 average of all trainable parameters; under ZeRO-3, each rank averages its own shard.

    Args:
        decay: for example 0.9999.
        checkpoint: checkpoint to resume from, or None.
    """

    def __init__(self, decay: float, checkpoint: str | None) -> None:
        self.decay = decay
        self.checkpoint = checkpoint
        self._average: dict[str, torch.Tensor] = {}  # by parameter name
        self._sharded = False

    def on_train_begin(self, args: Any, state: Any, control: Any, *, model: nn.Module, **_: Any) -> None:
        """Initialize from the weights or the checkpoint. In the constructor, ZeRO-3 has not sharded the weights yet."""
        self._average = {name: weights.detach().float().clone() for name, weights in _trainable(model).items()}
        self._sharded = is_sharded(model)
        if self.checkpoint is not None:
            self._load(Path(self.checkpoint))

    def on_step_end(self, args: Any, state: Any, control: Any, *, model: nn.Module, **_: Any) -> None:
        """Update the average."""
        weight = 1 - min(self.decay, (1 + state.global_step) / (10 + state.global_step))
        with torch.no_grad():
            current = [weights.float() for weights in _trainable(model).values()]
            torch._foreach_lerp_(list(self._average.values()), current, weight)

    @contextmanager
    def applied(self, model: nn.Module) -> Iterator[None]:
        """Replace the model's weights by the average inside this context; restore them exactly afterwards."""
        own = {name: weights.detach().clone() for name, weights in _trainable(model).items()}
        _fill(model, self._average)
        try:
            yield
        finally:
            _fill(model, own)

    def unsharded(self) -> dict[str, torch.Tensor]:
        """Return the fp32 average by parameter name; empty under ZeRO-3, where ranks have shards."""
        return {} if self._sharded else self._average

    def save(self, folder: Path) -> None:
        """Write the average: each rank its shard under ZeRO-3, otherwise rank 0 all of it."""
        from safetensors.torch import save_file

        if self._sharded or rank() == 0:
            save_file(self._average, self._file(folder))

    def _load(self, folder: Path) -> None:
        from safetensors.torch import load_file

        file = self._file(folder)
        if not file.is_file():
            raise UserError(
                "missing: the checkpoint is from a run without training.ema_decay",
                file=file,
                key="training.ema_decay",
                value=self.decay,
                remedy="remove it, or choose another output_dir",
            )
        for name, value in load_file(file).items():
            self._average[name].copy_(value)

    def _file(self, folder: Path) -> Path:
        return folder / (f"average-{rank()}.safetensors" if self._sharded else "average.safetensors")


def _trainable(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return the trainable parameters by name; under ZeRO-3, this rank's shards of them."""
    return {
        name: parameter.ds_tensor if hasattr(parameter, "ds_tensor") else parameter
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }


@torch.no_grad()
def _fill(model: nn.Module, values: dict[str, torch.Tensor]) -> None:
    for name, weights in _trainable(model).items():
        weights.copy_(values[name])
    # ZeRO-3 keeps small parameters gathered (ds_persist): gather these copies again from the changed shards.
    persistent: list[Any] = [parameter for parameter in model.parameters() if getattr(parameter, "ds_persist", False)]
    if persistent:
        persistent[0].partition(persistent)
        persistent[0].all_gather(persistent)


def is_sharded(model: nn.Module) -> bool:
    """Return True under ZeRO-3, where each rank has only a shard of the weights."""
    return any(hasattr(parameter, "ds_tensor") for parameter in model.parameters())
