"""Freed memory goes back to the system while a run on a CPU goes on.

Batches of ever-changing length leave holes in glibc's heap that it keeps: a process of 4 GB grows to 9 GB within an
hour (docs/LOG.md). On GPUs the tensors live elsewhere.
"""

from __future__ import annotations

import ctypes
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments


class TrimHeap(TrainerCallback):
    """Trims the heap every few steps of a run on a CPU.

    Args:
        every: optimiser steps; more often costs time, since the pages come back zeroed.
    """

    def __init__(self, every: int) -> None:
        self.every = every

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Called by the trainer."""
        if args.device.type == "cpu" and state.global_step % self.every == 0:
            trim_heap()


def trim_heap() -> bool:
    """Give every free page back, also from the middle of the heap; False where the C library is not glibc."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is None:
        return False
    trim(ctypes.c_size_t(0))
    return True
