"""Batches of like length and modality: less padding, and ranks that see images or text together."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch.utils.data import Sampler


class LengthGroupedSampler(Sampler[int]):
    """Random order in which the samples of one global batch are alike in modality and length (LLaVA-1.5).

    Shuffle; cut into chunks of fifty batches, images and text apart; sort each chunk by length; shuffle the batches.
    With `text_first` the batches of text alone, in their random order, come before all others. An order takes 8 bytes a
    sample.
    """

    def __init__(self, lengths: Sequence[int] | np.ndarray, batch: int, seed: int, *, text_first: bool = False) -> None:
        self.lengths = np.asarray(lengths)
        self.batch = batch
        self.seed = seed
        self.text_first = text_first
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Another order in every epoch; called by the trainer."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        order = torch.randperm(len(self.lengths), generator=generator).numpy()
        whole: list[np.ndarray] = []  # chunks of full batches
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
