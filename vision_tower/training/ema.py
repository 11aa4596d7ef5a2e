"""Exponential moving average of the weights, as an option of pretraining.

    average <- decay * average + (1 - decay) * weights        after every optimiser step

The decay of the first steps is smaller, min(decay, (1 + step) / (10 + step)), so that the random start is soon
forgotten (the rule of TensorFlow's ExponentialMovingAverage).
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
    """Keeps an fp32 average of what trains, part for part where ZeRO-3 has divided the weights.

    Args:
        decay: of the average, for example 0.9999.
        checkpoint: the checkpoint the run goes on from, or none.
    """

    def __init__(self, decay: float, checkpoint: str | None) -> None:
        self.decay = decay
        self.checkpoint = checkpoint
        self._held: dict[str, torch.Tensor] = {}
        self._divided = False

    def on_train_begin(self, args: Any, state: Any, control: Any, *, model: nn.Module, **_: Any) -> None:
        """Start from the weights, or from the checkpoint. Not earlier: ZeRO-3 divides the weights only now."""
        self._held = {name: held.detach().float().clone() for name, held in _trained(model).items()}
        self._divided = is_divided(model)
        if self.checkpoint is not None:
            self._load(self.checkpoint)

    def on_step_end(self, args: Any, state: Any, control: Any, *, model: nn.Module, **_: Any) -> None:
        """One step of the average."""
        weight = 1 - min(self.decay, (1 + state.global_step) / (10 + state.global_step))
        with torch.no_grad():
            current = [held.float() for held in _trained(model).values()]
            torch._foreach_lerp_(list(self._held.values()), current, weight)

    @contextmanager
    def applied(self, model: nn.Module) -> Iterator[None]:
        """Within this context the model has the averaged weights; afterwards its own, bit for bit."""
        own = {name: held.detach().clone() for name, held in _trained(model).items()}
        _fill(model, self._held)
        try:
            yield
        finally:
            _fill(model, own)

    def whole(self) -> dict[str, torch.Tensor]:
        """The fp32 average where every rank holds it whole; empty under ZeRO-3."""
        return {} if self._divided else self._held

    def save(self, folder: str) -> None:
        """Write this rank's part, or all of it once where every rank holds the whole."""
        from safetensors.torch import save_file

        if self._divided or rank() == 0:
            Path(folder).mkdir(parents=True, exist_ok=True)
            save_file(self._held, self._file(folder))

    def _load(self, folder: str) -> None:
        from safetensors.torch import load_file

        file = self._file(folder)
        if not file.is_file():
            raise UserError(
                "missing, this run began without training.ema_decay",
                file=file,
                remedy="take it out, or start in another folder",
            )
        for name, value in load_file(file).items():
            self._held[name].copy_(value)

    def _file(self, folder: str) -> Path:
        return Path(folder) / (f"average-{rank()}.safetensors" if self._divided else "average.safetensors")


def _trained(model: nn.Module) -> dict[str, torch.Tensor]:
    """What this rank holds of every trainable parameter: the whole, or under ZeRO-3 its part."""
    return {
        name: parameter.ds_tensor if hasattr(parameter, "ds_tensor") else parameter
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }


@torch.no_grad()
def _fill(model: nn.Module, values: dict[str, torch.Tensor]) -> None:
    for name, held in _trained(model).items():
        held.copy_(values[name])
    # ZeRO-3 also keeps whole copies of its small parameters; they are put together again from the parts.
    whole: list[Any] = [parameter for parameter in model.parameters() if getattr(parameter, "ds_persist", False)]
    if whole:
        whole[0].partition(whole)
        whole[0].all_gather(whole)


def is_divided(model: nn.Module) -> bool:
    """Whether each rank holds a part of the weights only, as under ZeRO-3."""
    return any(hasattr(parameter, "ds_tensor") for parameter in model.parameters())
