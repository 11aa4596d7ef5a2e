"""Going on after an interruption as if it had not happened.

every step         batches bring their readers' cursors; the trainer notes those of the batches it has used
every save_every   checkpoint-N appears whole: written to a hidden folder, flushed, renamed
kill -9            the same command finds the newest checkpoint and goes on with the same batches and the same log
SIGTERM            the step is finished, a checkpoint saved, and the command ends with code 143
"""

from __future__ import annotations

import collections
import dataclasses
import json
import os
import shutil
import signal
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from transformers import Trainer, TrainerCallback
from transformers.trainer_utils import rotate_checkpoints

from vision_tower.data import PairStream
from vision_tower.errors import Stopped, UserError
from vision_tower.files import write_text
from vision_tower.readers import Cursor
from vision_tower.recipe import parse_recipe

# A resumed run may write elsewhere or more often; everything else would make it another run.
MAY_DIFFER = frozenset(
    {
        "output_dir",
        "training.save_every",
        "training.keep_checkpoints",
        "training.log_every",
        "training.report_to",
        "training.peak_tflops",
    }
)
STAGING = ".checkpoint.partial"


def refuse_other_recipe(file: Path, recipe: Any) -> None:
    """Raise UserError where the run that left `file` (its recipe.yaml) had other values than `recipe`."""
    before = _flat(parse_recipe(type(recipe), ["--config", str(file)], command="pretrain"))
    now = _flat(recipe)
    changed = sorted(name for name in before | now if before.get(name) != now.get(name) and not _may_differ(name))
    if changed:
        said = ", ".join(f"{name}={now.get(name)} (was {before.get(name)})" for name in changed)
        raise UserError(
            f"{file.parent}: holds checkpoints of another recipe: {said}; give it back, or take another output_dir"
        )


def _may_differ(name: str) -> bool:
    return name in MAY_DIFFER or name.partition(".")[0] == "evaluation"


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    """Dotted names of a recipe's values."""
    flat: dict[str, Any] = {}
    for field in dataclasses.fields(value):
        item = getattr(value, field.name)
        nested = dataclasses.is_dataclass(item)
        flat |= _flat(item, f"{prefix}{field.name}.") if nested else {f"{prefix}{field.name}": item}
    return flat


class ResumableTrainer(Trainer):
    """Trainer over a `PairStream` whose checkpoints are whole and hold everything a run depends on."""

    train_dataset: PairStream

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.args.ignore_data_skip = True  # the readers know their place; nothing is read only to be thrown away
        self._cursors: dict[int, Cursor] = {}
        self._batches = 0
        self._sums: dict[str, torch.Tensor] = {}  # of what is logged, since the last line
        self._steps = 0
        self._folder: Path | None = None
        self.stop = StopOnSigterm()
        self.add_callback(self.stop)

    # --- readers

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
        """Add how much was skipped since the run began."""
        if "loss" in logs:  # every rank logs, so every rank is here
            _, bad, broken = self.skipped()
            logs = logs | {"skipped_samples": bad.total(), "skipped_shards": broken.total()}
        super().log(logs, *args, **kwargs)

    # --- checkpoints

    def _get_output_dir(self, trial: Any) -> str:
        return str(self._folder) if self._folder is not None else super()._get_output_dir(trial)

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
        """Write into a hidden folder, rename it when every rank is done, and only then remove old checkpoints."""
        folder = Path(super()._get_output_dir(trial))
        name = f"checkpoint-{self.state.global_step}"
        self._folder = folder / STAGING
        if self.args.should_save:
            shutil.rmtree(self._folder, ignore_errors=True)
            self._folder.mkdir(parents=True)
        self.accelerator.wait_for_everyone()
        try:
            super()._save_checkpoint(model, trial)
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                _flush(self._folder)
                shutil.rmtree(folder / name, ignore_errors=True)
                os.replace(self._folder / name, folder / name)
                self._folder.rmdir()
                rotate_checkpoints(str(folder), self.args.save_total_limit)
        finally:
            self._folder = None
        self.accelerator.wait_for_everyone()

    def _save_rng_state(self, output_dir: str) -> None:
        """Per rank: what transformers saves, and the readers' places and the half-summed line of the log."""
        super()._save_rng_state(output_dir)
        state = self._layout() | {
            "batches": self._batches,
            "cursors": [dataclasses.asdict(cursor) for cursor in self._cursors.values()],
            "loss": self._tr_loss.item(),
            "last_logged": self._globalstep_last_logged,
            "sums": {name: value.item() for name, value in self._sums.items()},
            "steps": self._steps,
        }
        write_text(Path(output_dir) / self._state_name(), json.dumps(state))

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """The other way round; it runs just before the loader starts its processes."""
        super()._load_rng_state(checkpoint)
        assert checkpoint is not None
        file = Path(checkpoint) / self._state_name()
        state = json.loads(file.read_text()) if file.is_file() else {}
        for what, now in self._layout().items():
            if state.get(what) != now:
                raise UserError(
                    f"{file}: the checkpoint was written with {what}={state.get(what)}, now it is {now}; "
                    "give it back, or take another output_dir"
                )
        cursors = [Cursor.from_json(value) for value in state["cursors"]]
        self._cursors = {cursor.reader: cursor for cursor in cursors}
        self._batches = state["batches"]
        self.train_dataset.go_on_from(self._cursors, self._batches % max(self.args.dataloader_num_workers, 1))
        self._tr_loss = torch.tensor(state["loss"], device=self.args.device)
        self._globalstep_last_logged = state["last_logged"]
        self._sums = {name: torch.tensor(value, device=self.args.device) for name, value in state["sums"].items()}
        self._steps = state["steps"]

    def _state_name(self) -> str:
        return f"readers_{self.args.process_index}.json"

    def _layout(self) -> dict[str, Any]:
        """What the readers' places mean nothing without."""
        return {
            "ranks": self.args.world_size,
            "workers": self.args.dataloader_num_workers,
            "shards": self.train_dataset.fingerprint(),
        }


def _flush(folder: Path) -> None:
    """To the disk itself, so that a checkpoint that is there is whole even after the machine went down."""
    for path in [*folder.rglob("*"), folder]:
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


class StopOnSigterm(TrainerCallback):
    """SIGTERM to any rank makes all of them save after the same step and leave the loop."""

    def __init__(self) -> None:
        self.asked = False
        self.stopped_at: int | None = None
        self._before: Any = None
        self._group: Any = None
        self._vote: tuple[torch.Tensor, Any] | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Take the signal over."""
        self._before = signal.signal(signal.SIGTERM, self._ask)
        if args.world_size > 1:
            self._group = dist.new_group(backend="gloo")  # of its own, on the CPU: no step waits for a device

    def _ask(self, *_: Any) -> None:
        self.asked = True

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Save and stop where it was asked for; and a resumed run counts its epochs as a whole one does."""
        state.epoch = state.global_step / state.max_steps
        if self._agreed(args.world_size) and state.global_step < state.max_steps:
            control.should_save = control.should_training_stop = True
            self.stopped_at = state.global_step

    def _agreed(self, world: int) -> bool:
        """Whether some rank was asked. Over several ranks it is the answer of the last step, which nobody waits for."""
        if world == 1:
            return self.asked
        answer = False
        if self._vote is not None:
            flag, work = self._vote
            work.wait()
            answer = bool(flag)
        flag = torch.tensor(int(self.asked))
        self._vote = flag, dist.all_reduce(flag, dist.ReduceOp.MAX, group=self._group, async_op=True)
        return answer

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Give the signal back."""
        if self._vote is not None:
            self._vote[1].wait()
        signal.signal(signal.SIGTERM, self._before)


def report_skipped(trainer: ResumableTrainer) -> None:
    """One line about what could not be read in the whole run, by cause. Every rank must call it."""
    seen, bad, broken = trainer.skipped()
    if trainer.is_world_process_zero() and (bad or broken):
        causes = ", ".join(f"{count:,} x {cause}" for cause, count in (bad + broken).most_common())
        line = f"skipped {bad.total():,} of {seen:,} samples and {broken.total():,} shards: {causes}"
        print(line, file=sys.stderr, flush=True)


def end_if_stopped(trainer: ResumableTrainer) -> None:
    """Raise Stopped where a signal ended the training loop before its time."""
    if trainer.stop.stopped_at is not None:
        raise Stopped(
            f"SIGTERM: stopped after step {trainer.stop.stopped_at} of {trainer.args.max_steps}, checkpoint saved in "
            f"{trainer.args.output_dir}; run the same command again to go on"
        )
