"""Batches of like length and modality: less padding, and ranks that see pictures or text together."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch.utils.data import Sampler


class LengthGroupedSampler(Sampler[int]):
    """Random order in which the samples of one global batch are alike in modality and length (LLaVA-1.5).

    Shuffle; cut into chunks of fifty batches, pictures and text apart; sort each chunk by length; shuffle the batches.
    """

    def __init__(self, lengths: list[int], batch: int, seed: int) -> None:
        self.lengths = lengths
        self.batch = batch
        self.seed = seed
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Another order in every epoch; called by the trainer."""
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed(self.seed + self.epoch)
        order = torch.randperm(len(self.lengths), generator=generator).tolist()
        batches: list[list[int]] = []
        rest: list[int] = []
        for with_picture in (True, False):
            members = [index for index in order if (self.lengths[index] > 0) == with_picture]
            for start in range(0, len(members), 50 * self.batch):
                chunk = sorted(members[start : start + 50 * self.batch], key=lambda index: -abs(self.lengths[index]))
                cut = len(chunk) - len(chunk) % self.batch
                batches += [chunk[at : at + self.batch] for at in range(0, cut, self.batch)]
                rest += chunk[cut:]
        batches += [rest[at : at + self.batch] for at in range(0, len(rest) - self.batch + 1, self.batch)]
        tail = rest[len(rest) - len(rest) % self.batch :]
        for position in torch.randperm(len(batches), generator=generator).tolist():
            yield from batches[position]
        yield from tail
