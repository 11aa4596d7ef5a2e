"""The run folder of a training stage, used by one run at a time.

recipe.yaml        the resolved recipe
provenance.json    command, inputs, revision, versions, hardware (`common/provenance.py`)
metrics.jsonl      one line per log entry
checkpoint-N/      checkpoints to resume from, written by `resume.py`
"""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vision_tower.common.errors import UserError
from vision_tower.common.files import make_folder, write_text
from vision_tower.common.hashes import file_hash
from vision_tower.common.launcher import drop_launcher_arguments, is_main_process
from vision_tower.common.provenance import start_provenance
from vision_tower.common.recipe import dump_recipe, parse_recipe

if TYPE_CHECKING:
    from transformers import Trainer


# Values that may change on resume without changing the result of the run.
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


@contextmanager
def only_run_in(folder: Path) -> Iterator[None]:
    """Lock the folder against other runs inside this context, on the main process. A killed run leaves no lock.

    Raises:
        UserError: another run has the lock.
    """
    import fcntl

    if not is_main_process():
        yield
        return
    make_folder(folder)
    file = folder / ".run.lock"
    with file.open("a+") as handle:
        try:
            fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)  # lockf, not flock: loader processes do not inherit it
        except (BlockingIOError, PermissionError) as error:
            handle.seek(0)
            raise UserError(
                f"another run is writing here ({handle.read() or 'just started'})",
                file=folder,
                key="output_dir",
                remedy="wait until it ends, or choose another output_dir",
            ) from error
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS):
                raise  # on network file systems without locks, continue unlocked
        handle.truncate(0)
        handle.write(f"process {os.getpid()} on {socket.gethostname()}")
        handle.flush()
        try:
            yield
        finally:
            file.unlink(missing_ok=True)


def start_run_folder(
    folder: Path, recipe: Any, command: str, argv: list[str], inputs: Mapping[str, str | None], **facts: Any
) -> None:
    """Write the resolved recipe and provenance.json before training starts; arguments as for `start_provenance`."""
    file = folder / "recipe.yaml"
    write_text(file, dump_recipe(recipe))
    facts |= {"seed": recipe.training.seed, "recipe_sha256": file_hash(file)}
    start_provenance(folder, command, drop_launcher_arguments(argv), inputs, **facts)


def check_same_recipe(file: Path, recipe: Any, command: str) -> None:
    """Raise UserError if the run that wrote `file` has a different recipe.

    Args:
        file: recipe.yaml of the existing run.
        recipe: the recipe of the new run.
        command: the command that both belong to.
    """
    try:
        before = _flatten(parse_recipe(type(recipe), ["--config", str(file)], command=command))
    except UserError as error:
        raise UserError(
            f"output_dir does not contain a `{command}` run of this version ({error})",
            file=file.parent,
            key="output_dir",
            remedy="choose another output_dir, or delete it",
        ) from error
    now, resumes = _flatten(recipe), latest_checkpoint(file.parent) is not None
    changed = sorted(name for name in before | now if before.get(name) != now.get(name))
    changed = [name for name in changed if not _may_differ(name, resumes)]
    if changed:
        was, is_now = (", ".join(str(values.get(name)) for name in changed) for values in (before, now))
        raise UserError(
            f"output_dir belongs to a run with a different recipe (was {was}; now {is_now})",
            file=file.parent,
            key=", ".join(changed),
            remedy="restore the recipe, choose another output_dir, or delete it",
        )


def _may_differ(name: str, resumes: bool) -> bool:
    """Return True if a value may change. Evaluation settings may change on resume, except the held-out share."""
    evaluation = name.startswith("evaluation.") and name != "evaluation.share"
    return name in MAY_DIFFER or (evaluation and resumes)


def _flatten(value: Any, prefix: str = "") -> dict[str, Any]:
    """Return a recipe's values by dotted name."""
    flat: dict[str, Any] = {}
    for field in dataclasses.fields(value):
        item = getattr(value, field.name)
        nested = dataclasses.is_dataclass(item)
        flat |= _flatten(item, f"{prefix}{field.name}.") if nested else {f"{prefix}{field.name}": item}
    return flat


def holds_run(folder: Path) -> bool:
    """Return True if the folder contains checkpoints or the result of a run, which another run would overwrite."""
    results = ("config.json", "adapter_config.json")
    finished = (folder / "recipe.yaml").is_file() and any((folder / name).is_file() for name in results)
    return finished or latest_checkpoint(folder) is not None


def latest_checkpoint(folder: Path) -> str | None:
    """Return the newest complete checkpoint in `folder`. Incomplete ones lack `trainer_state.json`, written last."""
    steps = checkpoint_steps(folder)
    return str(folder / f"checkpoint-{steps[-1]}") if steps else None


def checkpoint_steps(folder: Path) -> list[int]:
    """Return the steps of the complete checkpoints in `folder`, ascending. Ignores folders with other names."""
    names = [path.parent.name.removeprefix("checkpoint-") for path in folder.glob("checkpoint-*/trainer_state.json")]
    return sorted(int(name) for name in names if name.isdecimal())


def keep_lines(file: Path, step: int) -> None:
    """Delete the lines of a JSONL file that a run resumed at `step` will write again."""
    lines = file.read_text().splitlines(keepends=True) if file.exists() else []
    complete = [line for line in lines if line.endswith("\n")]  # an interruption may truncate the last one
    write_text(file, "".join(line for line in complete if json.loads(line)["step"] <= step))


def add_metrics_file(trainer: Trainer, file: Path) -> None:
    """Append every log entry of the trainer to `file`. A resumed run first deletes the lines it will repeat."""
    from transformers import TrainerCallback

    class MetricsFile(TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.is_world_process_zero:
                keep_lines(file, state.global_step)

        def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
            if state.is_world_process_zero and logs and "loss" in logs:
                with file.open("a") as stream:
                    stream.write(json.dumps({"step": state.global_step, **logs}) + "\n")

    trainer.add_callback(MetricsFile())
