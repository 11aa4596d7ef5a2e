"""A part of a data set: what is trained on, and what is held out to measure on."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import numpy as np
from torch.utils.data import Dataset

from vision_tower.common.errors import UserError

if TYPE_CHECKING:
    from clips_mllm.data.dataset import InstructionDataset


@dataclasses.dataclass(frozen=True)
class Part(Dataset[dict[str, Any]]):
    """The samples of `whole` at `places`."""

    whole: InstructionDataset
    places: np.ndarray

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """As the whole set gives it."""
        return self.whole[int(self.places[index])]

    def lengths(self) -> Any:
        """As the whole set tells them, for grouping."""
        return np.asarray(self.whole.lengths())[self.places].tolist()


def train_eval_split(whole: InstructionDataset, share: float, seed: int) -> tuple[Part, Part]:
    """(what is trained on, what is held out), drawn by the seed, in the order of the set."""
    rows = np.arange(len(whole)) if whole.examples.places is None else whole.examples.places
    distinct, first = np.unique(rows, return_index=True)  # a source of weight 2 has every row twice
    order = np.random.default_rng(seed).permutation(len(distinct))
    count = max(round(share * len(distinct)), 1)
    if count >= len(distinct):
        raise UserError(
            f"of {len(distinct)} samples nothing is left to train on",
            key="evaluation.share",
            value=share,
            remedy="lower it",
        )
    held = order[:count]
    return Part(whole, np.flatnonzero(~np.isin(rows, distinct[held]))), Part(whole, np.sort(first[held]))
