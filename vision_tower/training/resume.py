"""Going on after an interruption as if it had not happened.

every save_every   checkpoint-N appears whole: written to a hidden folder, flushed, renamed
full disk          the checkpoint is given up with a warning, the run goes on
kill -9            the same command finds the newest checkpoint and goes on with the same batches and the same log
SIGTERM            the step is finished, a checkpoint saved (`sigterm.py`)
"""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from tqdm import tqdm
from transformers import Trainer
from transformers.trainer_utils import rotate_checkpoints

from vision_tower.common.errors import Stopped, UserError, disk_is_full
from vision_tower.common.files import write_text
from vision_tower.common.recipe import parse_recipe
from vision_tower.training.disk_space import expected_bytes, folder_bytes, free_bytes, gigabytes
from vision_tower.training.run_folder import latest_checkpoint
from vision_tower.training.sigterm import StopOnSigterm

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


def refuse_other_recipe(file: Path, recipe: Any, command: str) -> None:
    """Raise UserError where the run of `command` that left `file` (its recipe.yaml) had other values than `recipe`."""
    try:
        before = _flat(parse_recipe(type(recipe), ["--config", str(file)], command=command))
    except UserError as error:  # of another command or version
        raise UserError(
            f"holds no run of this command ({error})", file=file.parent, remedy="take another output_dir, or remove it"
        ) from error
    now, goes_on = _flat(recipe), latest_checkpoint(file.parent) is not None
    changed = sorted(
        name for name in before | now if before.get(name) != now.get(name) and not _may_differ(name, goes_on)
    )
    if changed:
        said = ", ".join(f"{name}={now.get(name)} (was {before.get(name)})" for name in changed)
        raise UserError(
            f"holds a run of another recipe: {said}",
            file=file.parent,
            remedy="give it back, take another output_dir, or remove it",
        )


def _may_differ(name: str, goes_on: bool) -> bool:
    """What is measured, too, but not what is held out for it; a run that begins anew may end with other weights."""
    measures = name.startswith("evaluation.") and name != "evaluation.share"
    return name in MAY_DIFFER or (measures and goes_on)


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    """Dotted names of a recipe's values."""
    flat: dict[str, Any] = {}
    for field in dataclasses.fields(value):
        item = getattr(value, field.name)
        nested = dataclasses.is_dataclass(item)
        flat |= _flat(item, f"{prefix}{field.name}.") if nested else {f"{prefix}{field.name}": item}
    return flat


class ResumableTrainer(Trainer):
    """Trainer whose checkpoints are whole and hold everything a run depends on, whatever it trains."""

    state_file = "progress"

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.saved_at: int | None = None  # step of the newest checkpoint that this process has written
        self._folder: Path | None = None  # where a checkpoint is being written
        self._failure: BaseException | None = None  # what kept it from being written
        self._bytes = 0  # of the last one
        self.stop = StopOnSigterm()
        self.add_callback(self.stop)

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        """A run that is done is not trained further: transformers looks for the end only after a step."""
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
        else:
            super()._run_epoch(*args, **kwargs)

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """And tell of a run that ends before its learning rate has risen."""
        warmup = self.args.get_warmup_steps(num_training_steps)
        if warmup >= num_training_steps and self.is_world_process_zero():
            print(
                f"warning: the warm-up takes {warmup} steps and the run {num_training_steps}: "
                "training.learning_rate is never reached",
                file=sys.stderr,
            )
        return super().create_scheduler(num_training_steps, optimizer)

    # --- what a checkpoint holds besides weights and optimiser

    def own_state(self) -> dict[str, Any]:
        """This rank's state that transformers does not save: the half-summed line of the log."""
        return {"loss": self._tr_loss.item(), "last_logged": self._globalstep_last_logged}

    def restore(self, state: dict[str, Any]) -> None:
        """The other way round."""
        self._tr_loss = torch.tensor(state["loss"], device=self.args.device)
        self._globalstep_last_logged = state["last_logged"]

    def layout(self) -> dict[str, Any]:
        """What a checkpoint means nothing without."""
        return {"ranks": self.args.world_size}

    def _state_name(self) -> str:
        return f"{self.state_file}_{self.args.process_index}.json"

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        write_text(Path(output_dir) / self._state_name(), json.dumps(self.layout() | self.own_state()))

    def _load_rng_state(self, checkpoint: str | None) -> None:
        super()._load_rng_state(checkpoint)
        assert checkpoint is not None
        file = Path(checkpoint) / self._state_name()
        state = json.loads(file.read_text()) if file.is_file() else {}
        for what, now in self.layout().items():
            if state.get(what) != now:
                raise UserError(
                    f"the checkpoint was written with {what}={state.get(what)}, now it is {now}",
                    file=file,
                    remedy="give it back, or take another output_dir",
                )
        self.restore(state)

    # --- writing it whole

    def _get_output_dir(self, trial: Any) -> str:
        return str(self._folder) if self._folder is not None else super()._get_output_dir(trial)

    def _save_checkpoint(self, model: torch.nn.Module, trial: Any) -> None:
        """Write into a hidden folder, rename it when every rank is done, and only then remove old checkpoints."""
        folder = Path(super()._get_output_dir(trial))
        if not self._room(folder):
            return
        name = f"checkpoint-{self.state.global_step}"
        self._folder = folder / STAGING
        self._failure = None
        if self.args.should_save:
            shutil.rmtree(self._folder, ignore_errors=True)
            self._folder.mkdir(parents=True)
        self.accelerator.wait_for_everyone()
        try:
            with self._held(), self._engine_held():
                super()._save_checkpoint(model, trial)
            if not self._on_any_rank(self._failure is not None) and self.args.should_save:
                with self._held():
                    self._publish(folder, name)
        finally:
            self._folder = None
        if self._on_any_rank(self._failure is not None):
            self._give_up(folder, name)
        else:
            self.saved_at = self.state.global_step
            if self.state.best_global_step == self.saved_at:
                self.state.best_model_checkpoint = str(folder / name)

    def _publish(self, folder: Path, name: str) -> None:
        """On the main process, when all ranks have written their parts."""
        assert self._folder is not None
        staged = self._folder / name
        if self.state.best_global_step == self.state.global_step:  # it knows itself by the name it will have
            self.state.best_model_checkpoint = str(folder / name)
            self.state.save_to_json(str(staged / "trainer_state.json"))
        _flush(staged)
        self._bytes = folder_bytes(staged)
        shutil.rmtree(folder / name, ignore_errors=True)
        os.replace(staged, folder / name)
        self._folder.rmdir()
        rotate_checkpoints(str(folder), self.args.save_total_limit, self.state.best_model_checkpoint)

    # --- a full disk costs the checkpoint, not the run

    def _room(self, folder: Path) -> bool:
        """Whether the next checkpoint fits, on all ranks alike: found out before any of them writes or waits."""
        wanted = self._bytes or expected_bytes(self.saved_parameters())
        short = self.args.should_save and free_bytes(folder) < wanted
        if not self._on_any_rank(short):
            return True
        self._warn(folder, f"checkpoint-{self.state.global_step}", f", about {gigabytes(wanted)} needed")
        return False

    def _give_up(self, folder: Path, name: str) -> None:
        if self.args.should_save:
            shutil.rmtree(folder / STAGING, ignore_errors=True)
        self._warn(folder, name)

    def _warn(self, folder: Path, name: str, needed: str = "") -> None:
        if self.args.should_save:
            last = latest_checkpoint(folder)
            tqdm.write(  # on a line of its own, above the bar
                f"warning: {folder / name}: not saved, no space left on the device ({gigabytes(free_bytes(folder))} "
                f"free{needed}); training goes on, the newest checkpoint is {last or 'none'}",
                file=sys.stderr,
            )

    @contextmanager
    def _held(self) -> Iterator[None]:
        """Within a checkpoint, a write that fails for want of space is remembered until all ranks can be told."""
        try:
            yield
        except Exception as error:
            if self._folder is None or not disk_is_full(error):
                raise
            self._failure = error

    @contextmanager
    def _engine_held(self) -> Iterator[None]:
        """The same for each of DeepSpeed's own writes, between which its ranks wait for each other."""
        if self.deepspeed is None:
            yield
            return
        writer = self.deepspeed.checkpoint_engine
        write = writer.save

        def save(*args: Any, **kwargs: Any) -> Any:
            with self._held():
                return write(*args, **kwargs)

        writer.save = save
        try:
            yield
        finally:
            writer.save = write

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        with self._held():
            self.write_model(output_dir, state_dict)

    def write_model(self, output_dir: str | None, state_dict: dict[str, Any] | None) -> None:
        """Weights, configuration and processor, on the main process."""
        super()._save(output_dir, state_dict)

    def saved_parameters(self) -> Iterator[nn.Parameter]:
        """The weights that a checkpoint holds."""
        return self.model.parameters()

    def _on_any_rank(self, answer: bool) -> bool:
        if self.args.world_size == 1:
            return answer
        flag = torch.tensor(int(answer), device=self.args.device)
        dist.all_reduce(flag, dist.ReduceOp.MAX)
        return bool(flag)


def _flush(folder: Path) -> None:
    """To the disk itself, so that a checkpoint that is there is whole even after the machine went down."""
    for path in [*folder.rglob("*"), folder]:
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        except OSError as error:
            if not path.is_dir() or error.errno not in (errno.EINVAL, errno.ENOTSUP):
                raise  # some network file systems flush files alone
        finally:
            os.close(handle)


def end_if_stopped(trainer: ResumableTrainer) -> None:
    """Raise Stopped where a signal ended the training loop before its time, UserError where it could not be saved."""
    step, folder = trainer.stop.stopped_at, trainer.args.output_dir
    if step is None:
        return
    if trainer.saved_at != step:
        raise UserError(
            f"SIGTERM: stopped after step {step}, but {folder} has no space for a checkpoint", remedy="free some"
        )
    raise Stopped(
        f"SIGTERM: stopped after step {step} of {trainer.state.max_steps}, checkpoint saved in {folder}; run the same "
        "command again to go on"
    )
