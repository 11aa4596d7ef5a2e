"""How fast a run is: samples a second, the share of time spent waiting for data, achieved FLOPs and MFU."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from transformers import TrainerCallback


class Throughput(TrainerCallback):
    """Sums over the steps since the last line of the log. What lies between steps, such as evaluation, is not in it.

    Args:
        world: devices of the run.
        peak: FLOP/s that one device can do, or none where nobody knows; then there is no MFU.
    """

    def __init__(self, world: int, peak: float | None) -> None:
        self.world = world
        self.peak = peak
        self._forget()

    def _forget(self) -> None:
        self._seconds = self._waited = 0.0
        self._samples = self._flops = 0

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Around the loader's `next`: a step begins here."""
        self._begun = time.perf_counter()
        yield
        self._waited += time.perf_counter() - self._begun

    def add(self, samples: int, flops: int) -> None:
        """Work of one forward and backward pass on this device."""
        self._samples += samples
        self._flops += flops

    def on_step_end(self, *_: Any, **__: Any) -> None:
        """A step ends when the optimiser is done."""
        self._seconds += time.perf_counter() - self._begun

    def take(self) -> dict[str, float]:
        """This device's view since the last call; the mean over devices is the run's."""
        seconds = max(self._seconds, 1e-9)
        values = {
            "samples_per_second": self._samples * self.world / seconds,
            "data_wait": self._waited / seconds,
            "tflops": self._flops / seconds / 1e12,
        }
        if self.peak is not None:
            values["mfu"] = self._flops / seconds / self.peak
        self._forget()
        return values
