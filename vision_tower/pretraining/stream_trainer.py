"""A trainer over shards that goes on with the very samples that come next.

every step         batches bring their readers' cursors; the trainer notes those of the batches it has used
every checkpoint   holds the cursors of each rank
"""

from __future__ import annotations

import collections
import dataclasses
import sys
from typing import Any

import torch
import torch.distributed as dist
from transformers import TrainerCallback

from vision_tower.data.pairs import PairStream
from vision_tower.data.readers import ReaderPosition
from vision_tower.training.resume import ResumableTrainer


class StreamTrainer(ResumableTrainer):
    """Trainer over a `PairStream` whose checkpoints hold where every reader stands."""

    state_file = "readers"
    train_dataset: PairStream

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.args.ignore_data_skip = True  # the readers know their place; nothing is read only to be thrown away
        self._cursors: dict[int, ReaderPosition] = {}
        self._batches = 0
        self._sums: dict[str, torch.Tensor] = {}  # of what is logged, since the last line
        self._steps = 0
        self.add_callback(StreamEpochs())

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> Any:
        """The batches of one optimiser step; their cursors are noted."""
        batches, count = super().get_batch_samples(epoch_iterator, num_batches, device)
        for batch in batches:
            cursor = batch.pop("cursor")
            self._cursors[cursor.reader] = cursor
        self._batches += len(batches)
        return batches, count

    def skipped(self) -> tuple[int, collections.Counter[str], collections.Counter[str]]:
        """(samples seen, unreadable samples by cause, unreadable shards by cause) over all ranks."""
        places = [place for cursor in self._cursors.values() for place in cursor.places]
        found: list[Any] = [places]
        if self.args.world_size > 1:
            found = [None] * self.args.world_size
            dist.all_gather_object(found, places)
        places = [place for rank in found for place in rank]
        bad: collections.Counter[str] = collections.Counter()
        broken: dict[str, str] = {}  # readers may share a shard
        for place in places:
            bad.update(place.bad)
            broken |= place.broken
        return sum(place.seen for place in places), bad, collections.Counter(broken.values())

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Add samples seen and skipped since the run began. A share of the steps is no epoch, and is left out."""
        if "loss" in logs:  # every rank logs, so every rank is here
            _, bad, broken = self.skipped()
            batch = self.args.train_batch_size * self.args.gradient_accumulation_steps * self.args.world_size
            logs = logs | {
                "samples_seen": self.state.global_step * batch,
                "skipped_samples": bad.total(),
                "skipped_shards": broken.total(),
            }
        share, self.state.epoch = self.state.epoch, None  # Trainer logs it unless it is None
        super().log(logs, *args, **kwargs)
        self.state.epoch = share

    def own_state(self) -> dict[str, Any]:
        """The readers' places and the half-summed line of the log."""
        return super().own_state() | {
            "batches": self._batches,
            "cursors": [dataclasses.asdict(cursor) for cursor in self._cursors.values()],
            "sums": {name: value.item() for name, value in self._sums.items()},
            "steps": self._steps,
        }

    def restore(self, state: dict[str, Any]) -> None:
        """The other way round; it runs just before the loader starts its processes."""
        super().restore(state)
        cursors = [ReaderPosition.from_json(value) for value in state["cursors"]]
        self._cursors = {cursor.reader: cursor for cursor in cursors}
        self._batches = state["batches"]
        self.train_dataset.resume_from(self._cursors, self._batches % max(self.args.dataloader_num_workers, 1))
        self._sums = {name: torch.tensor(value, device=self.args.device) for name, value in state["sums"].items()}
        self._steps = state["steps"]

    def layout(self) -> dict[str, Any]:
        """What the readers' places mean nothing without."""
        return super().layout() | {
            "workers": self.args.dataloader_num_workers,
            "shards": self.train_dataset.fingerprint(),
        }


class StreamEpochs(TrainerCallback):
    """A resumed run counts its epochs as a whole one does."""

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """The stream is endless: the run is one epoch."""
        state.epoch = state.global_step / state.max_steps


def report_skipped(trainer: StreamTrainer) -> None:
    """One line about what could not be read in the whole run, by cause. Every rank must call it."""
    seen, bad, broken = trainer.skipped()
    if trainer.is_world_process_zero() and (bad or broken):
        causes = ", ".join(f"{count:,} x {cause}" for cause, count in (bad + broken).most_common())
        line = f"skipped {bad.total():,} of {seen:,} samples and {broken.total():,} shards: {causes}"
        print(line, file=sys.stderr, flush=True)
