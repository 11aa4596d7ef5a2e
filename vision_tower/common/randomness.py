"""Measuring inside a run without touching what the run draws."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


@contextmanager
def untouched_randomness() -> Iterator[None]:
    """Whatever is drawn within, the draws afterwards are those that would have come without it."""
    python, numbers = random.getstate(), np.random.get_state()
    own = [torch.cuda.current_device()] if torch.cuda.is_available() else []  # untested on GPU
    try:
        with torch.random.fork_rng(devices=own):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numbers)
