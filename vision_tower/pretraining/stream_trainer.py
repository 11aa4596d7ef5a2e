"""A trainer over tar shards with exact resume of the data order.

every step         each batch carries the cursor of its reader; the trainer keeps the cursors of the batches it used
every checkpoint   contains the cursors of each rank
"""

from __future__ import annotations

import collections
import dataclasses
import itertools
import logging
from typing import Any

import torch
import torch.distributed as dist
from transformers import TrainerCallback

from vision_tower.data.pairs import PairStream
from vision_tower.data.readers import ReaderPosition
from vision_tower.training.resume import ResumableTrainer

logger = logging.getLogger(__name__)


class StreamTrainer(ResumableTrainer):
    """Trainer over a `PairStream` whose checkpoints contain the position of every reader."""

    state_file = "readers"
    train_dataset: PairStream

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.args.ignore_data_skip = True  # readers resume at their position; transformers must not skip batches
        self._cursors: dict[int, ReaderPosition] = {}  # by reader
        self._batches = 0  # micro-batches since the start of the run
        self._sums: dict[str, torch.Tensor] = {}  # logged values, summed since the last log line
        self._steps = 0  # number of summands
        self.add_callback(StreamEpochs())

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> Any:
        """Read the micro-batches of one optimizer step and keep their cursors."""
        batches, count = super().get_batch_samples(epoch_iterator, num_batches, device)
        for batch in batches:
            cursor = batch.pop("cursor")
            self._cursors[cursor.reader] = cursor
        self._batches += len(batches)
        return batches, count

    def skipped(self) -> tuple[int, collections.Counter[str], collections.Counter[str]]:
        """Return (samples seen, unreadable samples by cause, unreadable shards by cause) over all ranks."""
        own = [place for cursor in self._cursors.values() for place in cursor.places]
        by_rank: list[Any] = [own]
        if self.args.world_size > 1:
            by_rank = [None] * self.args.world_size
            dist.all_gather_object(by_rank, own)
        seen = 0
        bad: collections.Counter[str] = collections.Counter()
        broken: dict[str, str] = {}  # by shard, because readers may share one
        for place in itertools.chain.from_iterable(by_rank):
            seen += place.seen
            bad.update(place.bad)
            broken |= place.broken
        return seen, bad, collections.Counter(broken.values())

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Add the samples seen and skipped since the start of the run. Omit the epoch: a stream has no length."""
        if "loss" in logs:  # collective: all ranks log at the same steps
            _, bad, broken = self.skipped()
            batch = self.args.train_batch_size * self.args.gradient_accumulation_steps * self.args.world_size
            logs = logs | {
                "samples_seen": self.state.global_step * batch,
                "skipped_samples": bad.total(),
                "skipped_shards": broken.total(),
            }
        epoch, self.state.epoch = self.state.epoch, None  # Trainer logs the epoch unless it is None
        super().log(logs, *args, **kwargs)
        self.state.epoch = epoch

    def own_state(self) -> dict[str, Any]:
        """Return the readers' positions and the sums since the last log line."""
        return super().own_state() | {
            "batches": self._batches,
            "cursors": [dataclasses.asdict(cursor) for cursor in self._cursors.values()],
            "sums": {name: value.item() for name, value in self._sums.items()},
            "steps": self._steps,
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Load what `own_state` returned. Called before the loader starts its processes."""
        super().restore(state)
        cursors = [ReaderPosition.from_json(value) for value in state["cursors"]]
        self._cursors = {cursor.reader: cursor for cursor in cursors}
        self._batches = state["batches"]
        self.train_dataset.resume_from(self._cursors, self._batches % max(self.args.dataloader_num_workers, 1))
        self._sums = {name: torch.tensor(value, device=self.args.device) for name, value in state["sums"].items()}
        self._steps = state["steps"]

    def layout(self) -> dict[str, Any]:
        """Return settings that the readers' positions depend on."""
        return super().layout() | {
            "workers": self.args.dataloader_num_workers,
            "shards": self.train_dataset.fingerprint(),
        }


class StreamEpochs(TrainerCallback):
    """Sets the epoch to the completed fraction of the run, with and without resume."""

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Overwrite the epoch: the stream is endless, so a run is one epoch."""
        state.epoch = state.global_step / state.max_steps


def log_skipped(trainer: StreamTrainer) -> None:
    """Log the samples and shards that could not be read in this run, by cause. Every rank must call this."""
    seen, bad, broken = trainer.skipped()
    if trainer.is_world_process_zero() and (bad or broken):
        ranked = sorted((bad + broken).items(), key=lambda item: item[1], reverse=True)
        causes = ", ".join(f"{count:,} x {cause}" for cause, count in ranked)
        logger.warning(
            "skipped %s of %s samples and %s shards: %s", f"{bad.total():,}", f"{seen:,}", f"{broken.total():,}", causes
        )
