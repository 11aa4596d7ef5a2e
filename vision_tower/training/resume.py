"""Exact resume: an interrupted run continues bit-identically.

every save_every   checkpoint-N is written to a hidden folder, flushed, and renamed: it is complete or absent
full disk          the checkpoint is skipped with a warning, and training continues
kill -9            the same command resumes from the newest checkpoint, with the same batches and the same log
SIGTERM            the current step is finished and a checkpoint saved (`sigterm.py`)

The methods with an underscore override private methods of transformers.Trainer, whose interface may change in any minor
version. tests/vision_tower/test_trainer_contract.py compares them with the version that pyproject.toml pins.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from transformers import Trainer, TrainerCallback
from transformers.trainer_utils import rotate_checkpoints

from vision_tower.common.errors import Stopped, UserError, disk_is_full
from vision_tower.common.files import write_text
from vision_tower.training.disk_space import expected_bytes, folder_bytes, free_bytes, gigabytes
from vision_tower.training.nan_guard import stop_if_not_finite
from vision_tower.training.run_folder import latest_checkpoint
from vision_tower.training.sigterm import StopOnSigterm

STAGING = ".checkpoint.partial"
logger = logging.getLogger(__name__)


class ResumableTrainer(Trainer):
    """Trainer with exact resume, complete checkpoints, and a stop on NaN.

    Subclasses implement `read_model` and `step_samples`, and extend `write_model`, `own_state`, `restore` and `layout`.
    """

    state_file = "progress"

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.saved_at: int | None = None  # step of the newest checkpoint written by this process
        self._staging: Path | None = None  # parent folder of the checkpoint that is being written
        self._write_error: BaseException | None = None  # the full disk that this checkpoint met on this rank
        self._checkpoint_bytes = 0  # size of the last checkpoint
        self._checkpoint: Path | None = None  # the checkpoint to resume from
        self.stop = StopOnSigterm()
        self.add_callback(RestoreState(self))
        self.add_callback(self.stop)

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs: Any) -> Any:
        """Train, or resume from a checkpoint folder."""
        self._checkpoint = Path(resume_from_checkpoint) if isinstance(resume_from_checkpoint, str) else None
        return super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        """Stop a run that is already complete: transformers would train one more step before it checks."""
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
        else:
            super()._run_epoch(*args, **kwargs)

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """Create the scheduler; warn if training ends before warmup does."""
        warmup = self.args.get_warmup_steps(num_training_steps)
        if warmup >= num_training_steps and self.is_world_process_zero():
            logger.warning(
                "training ends after %d steps and warmup takes %d: training.learning_rate is never reached",
                num_training_steps,
                warmup,
            )
        return super().create_scheduler(num_training_steps, optimizer)

    # --- NaN

    def step_samples(self) -> list[str]:
        """Return identifiers of this rank's samples of the current step, for the NaN report."""
        raise NotImplementedError

    def _get_grad_norm(self, *args: Any, **kwargs: Any) -> Any:
        """Stop on NaN. This is the last hook before the optimizer step that knows loss and gradient norm."""
        norm = super()._get_grad_norm(*args, **kwargs)
        values = {"loss": self._tr_loss, "gradient norm": torch.as_tensor(0.0 if norm is None else norm)}
        stop_if_not_finite(values, self.state.global_step + 1, self.step_samples, Path(self.args.output_dir))
        return norm

    # --- state that transformers does not save

    def own_state(self) -> dict[str, Any]:
        """Return this rank's extra state: the loss summed since the last log line."""
        return {"loss": self._tr_loss.item(), "last_logged": self._globalstep_last_logged}

    def restore(self, state: dict[str, Any]) -> None:
        """Load what `own_state` returned."""
        self._tr_loss = torch.tensor(state["loss"], device=self.args.device)
        self._globalstep_last_logged = state["last_logged"]

    def layout(self) -> dict[str, Any]:
        """Return settings that must be equal on resume, because the state depends on them."""
        return {"ranks": self.args.world_size}

    def write_state(self, folder: Path) -> None:
        """Write this rank's extra state into a checkpoint."""
        write_text(folder / self._state_name(), json.dumps(self.layout() | self.own_state()))

    def read_state(self, folder: Path) -> None:
        """Restore this rank's extra state from a checkpoint. Raise UserError if the layout differs."""
        file = folder / self._state_name()
        state = json.loads(file.read_text()) if file.is_file() else {}
        for name, value in self.layout().items():
            if state.get(name) != value:
                raise UserError(
                    f"the checkpoint was written with {name}={state.get(name)}",
                    file=file,
                    key=name,
                    value=value,
                    remedy=f"restore {name}, or choose another output_dir",
                )
        self.restore(state)

    def _state_name(self) -> str:
        return f"{self.state_file}_{self.args.process_index}.json"

    # --- reading and writing weights

    def write_model(self, output_dir: str | None, state_dict: dict[str, Any] | None) -> None:
        """Write weights, config and processor. Called on all ranks; only the main process writes."""
        super()._save(output_dir, state_dict)

    def read_model(self, folder: str) -> None:
        """Load the weights of a checkpoint into the model."""
        raise NotImplementedError

    def saved_parameters(self) -> Iterator[nn.Parameter]:
        """Return the parameters that a checkpoint contains."""
        return self.model.parameters()

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        with self._catch_full_disk():
            self.write_model(output_dir, state_dict)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """Load by `read_model`.

        The stock method compares names in the file with names in the module. They differ in several model classes, and
        then it only warns and trains on from the initial weights.
        """
        self.read_model(resume_from_checkpoint)

    def _load_best_model(self) -> None:
        """Load the best checkpoint in the same way as any other."""
        assert self.state.best_model_checkpoint is not None
        if self.is_deepspeed_enabled:
            super()._load_best_model()
        else:
            self.read_model(self.state.best_model_checkpoint)

    # --- complete checkpoints

    def _get_output_dir(self, trial: Any) -> str:
        return str(self._staging) if self._staging is not None else super()._get_output_dir(trial)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        """Write into a hidden folder, rename it when all ranks are done, then remove old checkpoints."""
        folder = Path(super()._get_output_dir(trial))
        if not self._has_room(folder):
            return
        name = f"checkpoint-{self.state.global_step}"
        self._staging = folder / STAGING
        self._write_error = None
        if self.args.should_save:
            shutil.rmtree(self._staging, ignore_errors=True)
            self._staging.mkdir(parents=True)
        self.accelerator.wait_for_everyone()
        try:
            with self._catch_full_disk(), self._catch_full_disk_in_deepspeed():
                super()._save_checkpoint(model, trial)
                self.write_state(self._staging / name)
            if not self._any_rank(self._write_error is not None) and self.args.should_save:
                with self._catch_full_disk():
                    self._publish(folder, name)
        finally:
            self._staging = None
        if self._any_rank(self._write_error is not None):
            self._discard(folder, name)
        else:
            self.saved_at = self.state.global_step
            if self.state.best_global_step == self.saved_at:
                self.state.best_model_checkpoint = str(folder / name)

    def _publish(self, folder: Path, name: str) -> None:
        """Move a checkpoint that all ranks have written to its final name. Main process only."""
        assert self._staging is not None
        staged = self._staging / name
        if self.state.best_global_step == self.state.global_step:
            # transformers recorded the path in the hidden folder
            self.state.best_model_checkpoint = str(folder / name)
            self.state.save_to_json(str(staged / "trainer_state.json"))
        _flush(staged)
        self._checkpoint_bytes = folder_bytes(staged)
        shutil.rmtree(folder / name, ignore_errors=True)
        os.replace(staged, folder / name)
        self._staging.rmdir()
        rotate_checkpoints(str(folder), self.args.save_total_limit, self.state.best_model_checkpoint)

    # --- full disk

    def _has_room(self, folder: Path) -> bool:
        """Return True if the next checkpoint fits. All ranks get the same answer, before any of them writes."""
        needed = self._checkpoint_bytes or expected_bytes(self.saved_parameters())
        full = self.args.should_save and free_bytes(folder) < needed
        if not self._any_rank(full):
            return True
        self._warn_full_disk(folder, f"checkpoint-{self.state.global_step}", f", about {gigabytes(needed)} needed")
        return False

    def _discard(self, folder: Path, name: str) -> None:
        if self.args.should_save:
            shutil.rmtree(folder / STAGING, ignore_errors=True)
        self._warn_full_disk(folder, name)

    def _warn_full_disk(self, folder: Path, name: str, needed: str = "") -> None:
        if self.args.should_save:
            logger.warning(
                "%s: not saved, no space left on the device (%s free%s); training continues, newest checkpoint: %s",
                folder / name,
                gigabytes(free_bytes(folder)),
                needed,
                latest_checkpoint(folder) or "none",
            )

    @contextmanager
    def _catch_full_disk(self) -> Iterator[None]:
        """While a checkpoint is written, keep a full-disk error for later: other ranks wait in collectives."""
        try:
            yield
        except Exception as error:
            if self._staging is None or not disk_is_full(error):
                raise
            self._write_error = error

    @contextmanager
    def _catch_full_disk_in_deepspeed(self) -> Iterator[None]:
        """Catch the error in each write of DeepSpeed's engine, because its ranks have barriers between the writes."""
        if self.deepspeed is None:
            yield
            return
        writer = self.deepspeed.checkpoint_engine
        write = writer.save

        def save(*args: Any, **kwargs: Any) -> Any:
            with self._catch_full_disk():
                return write(*args, **kwargs)

        writer.save = save
        try:
            yield
        finally:
            writer.save = write

    def _any_rank(self, flag: bool) -> bool:
        if self.args.world_size == 1:
            return flag
        tensor = torch.tensor(int(flag), device=self.args.device)
        dist.all_reduce(tensor, dist.ReduceOp.MAX)
        return bool(tensor)


class RestoreState(TrainerCallback):
    """Restores the extra state: after transformers has reset its sums, before the loader starts."""

    def __init__(self, trainer: ResumableTrainer) -> None:
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Read the state if the run resumes."""
        if self.trainer._checkpoint is not None:
            self.trainer.read_state(self.trainer._checkpoint)


def _flush(folder: Path) -> None:
    """Flush files and folders to the disk, so that a checkpoint survives a power failure."""
    for path in [*folder.rglob("*"), folder]:
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        except OSError as error:
            # Some network file systems cannot flush folders.
            if not path.is_dir() or error.errno not in (errno.EINVAL, errno.ENOTSUP):
                raise
        finally:
            os.close(handle)


def raise_if_stopped(trainer: ResumableTrainer) -> None:
    """Raise Stopped if a signal ended training early, or UserError if its checkpoint could not be saved."""
    step, folder = trainer.stop.stopped_at, trainer.args.output_dir
    if step is None:
        return
    if trainer.saved_at != step:
        raise UserError(
            f"SIGTERM: stopped after step {step} without a checkpoint, the disk is full",
            file=folder,
            remedy="free space",
        )
    raise Stopped(
        f"SIGTERM: stopped after step {step} of {trainer.state.max_steps}, checkpoint saved in {folder}; run the same "
        "command again to resume"
    )
