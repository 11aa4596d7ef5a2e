"""Throughput of a run: samples per second, share of time spent waiting for data, achieved FLOP/s, and MFU."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from transformers import TrainerCallback


class Throughput(TrainerCallback):
    """Accumulates since the last log line; excludes time between steps (evaluation, saving).

    Args:
        world: number of devices.
        peak: peak FLOP/s of one device; MFU is not reported if it is None.
    """

    def __init__(self, world: int, peak: float | None) -> None:
        self.world = world
        self.peak = peak
        self._reset()

    def _reset(self) -> None:
        self._seconds = self._waited = 0.0
        self._samples = self._flops = 0

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Time the reading of a batch, which starts a step."""
        self._started = time.perf_counter()
        yield
        self._waited += time.perf_counter() - self._started

    def add(self, samples: int, flops: int) -> None:
        """Count one forward and backward pass of this device."""
        self._samples += samples
        self._flops += flops

    def on_step_end(self, *_: object, **__: object) -> None:
        """Stop the clock of the step, after the optimizer."""
        self._seconds += time.perf_counter() - self._started

    def take(self) -> dict[str, float]:
        """Return this device's values since the last call and reset. Their mean over devices is the run's value."""
        seconds = max(self._seconds, 1e-9)
        values = {
            "samples_per_second": self._samples * self.world / seconds,
            "data_wait": self._waited / seconds,
            "tflops": self._flops / seconds / 1e12,
        }
        if self.peak is not None:
            values["mfu"] = self._flops / seconds / self.peak
        self._reset()
        return values
