"""Sampler that groups by length and modality: less padding, and all ranks see images or text together."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch.utils.data import Sampler


class LengthGroupedSampler(Sampler[int]):
    """Random order with samples of similar length and equal modality in each global batch, as in LLaVA-1.5.

    Shuffle; split into images and text, and each into chunks of fifty batches; sort each chunk by length; shuffle the
    batches. With `text_first`, all text-only batches come first. An order takes 8 bytes per sample.
    """

    def __init__(self, lengths: Sequence[int] | np.ndarray, batch: int, seed: int, *, text_first: bool = False) -> None:
        self.lengths = np.asarray(lengths)
        self.batch = batch
        self.seed = seed
        self.text_first = text_first
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Change the order. The trainer calls this before each epoch."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        order = torch.randperm(len(self.lengths), generator=generator).numpy()
        whole: list[np.ndarray] = []  # multiples of a batch
        left: list[np.ndarray] = []
        with_image = self.lengths[order] > 0
        for members in (order[with_image], order[~with_image]):
            for start in range(0, len(members), 50 * self.batch):
                chunk = members[start : start + 50 * self.batch]
                chunk = chunk[np.argsort(-np.abs(self.lengths[chunk]), kind="stable")]
                cut = len(chunk) - len(chunk) % self.batch
                whole.append(chunk[:cut])
                left.append(chunk[cut:])
        rest = np.concatenate(left) if left else order[:0]
        cut = len(rest) - len(rest) % self.batch
        batches = np.concatenate([*whole, rest[:cut]]).reshape(-1, self.batch)
        batches = batches[torch.randperm(len(batches), generator=generator).numpy()]
        if self.text_first:
            batches = batches[np.argsort((self.lengths[batches] > 0).any(axis=1), kind="stable")]
        yield from batches.ravel().tolist()
        yield from rest[cut:].tolist()
