"""What a run on a CPU does with memory: freed memory is kept for the next tensors, what they do not need given back.

By itself glibc returns every large tensor to the system as soon as it is freed, and gets the next one in new pages,
which the system zeroes: a fifth of a step's time. And batches of ever-changing length leave holes in the heap: a
process of 4 GB grows to 9 GB within an hour (docs/log.md). On GPUs the tensors live elsewhere.
"""

from __future__ import annotations

import ctypes
import os
from typing import Any

import psutil
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

# By oneDNN, and by PyTorch's layer over it; with 16 a step in bf16 was no slower (docs/log.md).
PRIMITIVES = {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "64", "LRU_CACHE_CAPACITY": "64"}
M_TRIM_THRESHOLD, M_MMAP_MAX, M_ARENA_MAX = -1, -4, -8  # of glibc's malloc.h


def spare_memory() -> None:
    """On a CPU, before the first product of matrices."""
    keep_freed_memory()
    keep_few_primitives()


def keep_few_primitives() -> None:
    """oneDNN makes a primitive for each shape of a product in 16 bits and keeps the last 1,024, each with memory of its
    own: with batches of ever-changing length a run grows by 10 MB a step (docs/log.md)."""
    for name, count in PRIMITIVES.items():
        os.environ.setdefault(name, count)


def keep_freed_memory() -> bool:
    """From now on freed tensors stay in the heap, one heap for all threads; False where the C library is not glibc.

    The forward and the backward thread would each fill a heap of its own with holes that the other cannot use.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    for option, value in ((M_ARENA_MAX, 1), (M_MMAP_MAX, 0), (M_TRIM_THRESHOLD, 2**31 - 1)):
        mallopt(option, value)
    return True


class TrimHeap(TrainerCallback):
    """Trims the heap of a run on a CPU that has grown beyond what its steps need.

    First it gives back what loading and preparing have left. What the steps need is learnt from the first ones, and
    again from those after a trim: batches differ in length, and pages that were trimmed for nothing come back zeroed, a
    fifth of a step's time.

    Args:
        growth: share by which resident memory may grow.
        settling: steps that say what is needed.
    """

    def __init__(self, growth: float = 0.05, settling: int = 20) -> None:
        self.growth = growth
        self.settling = settling
        self.usual = 0
        self.steps = 0  # since the last trim

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Called by the trainer."""
        if args.device.type == "cpu":
            trim_heap()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Called by the trainer."""
        if args.device.type != "cpu":
            return
        resident = psutil.Process().memory_info().rss
        self.steps += 1
        if self.steps <= self.settling:
            self.usual = max(self.usual, resident)
        elif resident > (1 + self.growth) * self.usual:
            trim_heap()
            self.usual = self.steps = 0


def trim_heap() -> bool:
    """Give every free page back, also from the middle of the heap; False where the C library is not glibc."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is None:
        return False
    trim(ctypes.c_size_t(0))
    return True
