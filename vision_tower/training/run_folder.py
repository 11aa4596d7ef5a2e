"""The folder of a run, of whatever stage: held by one run at a time, and what it tells of itself.

recipe.yaml        the resolved recipe
provenance.json    command, inputs, revision, versions, hardware (`common/provenance.py`)
metrics.jsonl      a line of the log each
checkpoint-N/      to go on from (`resume.py` writes them)
"""

from __future__ import annotations

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
from vision_tower.common.recipe import dump_recipe

if TYPE_CHECKING:
    from transformers import Trainer


@contextmanager
def only_run_in(folder: Path) -> Iterator[None]:
    """Within this context no other run writes into the folder; on the main process. A killed run holds nothing.

    Raises:
        UserError: another one does.
    """
    import fcntl

    if not is_main_process():
        yield
        return
    make_folder(folder)
    file = folder / ".run.lock"
    with file.open("a+") as handle:
        try:
            fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)  # of this process: loader processes do not inherit it
        except (BlockingIOError, PermissionError) as error:
            handle.seek(0)
            raise UserError(
                f"another run is writing here ({handle.read() or 'just begun'})",
                file=folder,
                remedy="wait for its end, or take another output_dir",
            ) from error
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS):
                raise  # some network file systems have no locks
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


def holds_run(folder: Path) -> bool:
    """Whether a run has left something here that another recipe's would overwrite: a checkpoint, or its result."""
    results = ("config.json", "adapter_config.json")
    done = (folder / "recipe.yaml").is_file() and any((folder / name).is_file() for name in results)
    return done or latest_checkpoint(folder) is not None


def latest_checkpoint(folder: Path) -> str | None:
    """The newest complete checkpoint below `folder`: transformers writes `trainer_state.json` last."""
    steps = checkpoint_steps(folder)
    return str(folder / f"checkpoint-{steps[-1]}") if steps else None


def checkpoint_steps(folder: Path) -> list[int]:
    """Steps of the complete checkpoints below `folder`, rising; a copy by another name is the user's own."""
    names = [path.parent.name.removeprefix("checkpoint-") for path in folder.glob("checkpoint-*/trainer_state.json")]
    return sorted(int(name) for name in names if name.isdecimal())


def keep_lines(file: Path, step: int) -> None:
    """Drop the lines of a JSON-lines file that a run resumed at `step` will write again."""
    lines = file.read_text().splitlines(keepends=True) if file.exists() else []
    whole = [line for line in lines if line.endswith("\n")]  # others were cut by an interruption
    write_text(file, "".join(line for line in whole if json.loads(line)["step"] <= step))


def add_metrics_file(trainer: Trainer, file: Path) -> None:
    """Append every log line of the trainer to `file`; a resumed run first drops the lines it will repeat."""
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
