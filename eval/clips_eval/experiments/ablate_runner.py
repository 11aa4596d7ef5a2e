"""Train the grid of `clips-mllm ablate`: several runs at a time, each in its own process.

Importing torch and transformers takes as long as many steps of a small run. The processes are therefore forked from one
that has imported them (`multiprocessing`'s fork server).
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import itertools
import json
import logging
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Generator
from multiprocessing import connection
from multiprocessing.context import BaseContext
from multiprocessing.process import BaseProcess
from pathlib import Path

from clips_eval.experiments.ablate_grid import AblateRecipe, Setting, settings
from clips_eval.experiments.processes import EVERY, end, show_progress, sigterm_stops
from vision_tower.common.errors import UserError, run_command
from vision_tower.common.files import read_object, write_text
from vision_tower.common.hashes import file_hash

logger = logging.getLogger(__name__)

SCORES = "retrieval.json"
JOB = "cell.json"  # the command lines of a run
LOG = "log.txt"
PRELOADED = [
    "vision_tower.pretraining.trainer",
    "vision_tower.data.pairs",
    "vision_tower.checkpoints.encoder",
    "torchvision.transforms.v2",
]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cell:
    """One run of the grid: a setting with a seed, and the JSON of its command lines."""

    setting: Setting
    seed: int
    folder: Path
    job: str

    @property
    def done(self) -> bool:
        """True if the run has its scores."""
        return (self.folder / SCORES).is_file()


def cells(recipe: AblateRecipe) -> list[Cell]:
    """Return all runs, grouped by seed.

    Raises:
        UserError: a folder contains a run of another recipe.
    """
    found = [_cell(recipe, setting, seed) for seed in recipe.seeds for setting in settings(recipe)]
    for cell in found:
        file = cell.folder / JOB
        if file.is_file() and file.read_text() != cell.job:
            raise UserError(
                "written with another recipe or other data",
                file=file,
                remedy=f"remove {cell.folder}, or change output_dir",
            )
    return found


def _cell(recipe: AblateRecipe, setting: Setting, seed: int) -> Cell:
    folder = Path(recipe.output_dir) / "runs" / f"{setting.name}-seed{seed}"
    pretrain = [f"--config={recipe.pretrain}", f"--output_dir={folder}", *setting.options, f"--training.seed={seed}"]
    if recipe.shards is not None:
        pretrain.append(f"--data.shards={recipe.shards}")
    job = {
        "pretrain": pretrain,
        "retrieve": [str(folder), f"--data={recipe.data}"],
        "recipe_sha256": file_hash(recipe.pretrain),
    }
    return Cell(setting=setting, seed=seed, folder=folder, job=json.dumps(job, indent=1))


def run_cells(recipe: AblateRecipe) -> list[Cell]:
    """Train and evaluate the runs that are not done yet.

    Raises:
        UserError: some runs failed; names the log of the first.
        Stopped: SIGTERM; active runs have saved a checkpoint.
    """
    everything = cells(recipe)
    waiting = [cell for cell in everything if not cell.done]
    processes = recipe.processes or max((os.cpu_count() or 1) // recipe.threads, 1)
    logger.info("%d runs, %d done before; %d at a time", len(everything), len(everything) - len(waiting), processes)
    failed: list[Cell] = []
    started = time.monotonic()
    with sigterm_stops("ablate"), contextlib.closing(_run_all(waiting, processes, recipe.threads)) as ended:
        for number, cell in enumerate(ended, start=1):
            if not cell.done:
                failed.append(cell)
            left = (time.monotonic() - started) / number * (len(waiting) - number)
            outcome = _outcome(cell, recipe.metric)
            logger.info("[%d/%d] %s; about %.0f min left", number, len(waiting), outcome, left / 60)
    if failed:
        log = failed[0].folder / LOG
        raise UserError(
            f"{len(failed)} of {len(everything)} runs failed; this is the log of the first",
            file=log,
            remedy="fix the cause and run the same command again to resume",
        )
    return everything


def _run_all(waiting: list[Cell], processes: int, threads: int) -> Generator[Cell]:
    """Yield runs as they finish. Closing the generator stops active runs after they have saved."""
    context, rest = _process_context(), iter(waiting)
    running: dict[int, tuple[Cell, BaseProcess]] = {}
    try:
        while True:
            for cell in itertools.islice(rest, processes - len(running)):
                process = _start(cell, context, threads)
                running[process.sentinel] = cell, process
            if not running:
                return
            while not (ended := connection.wait(list(running), timeout=EVERY)):
                show_progress([cell.folder / LOG for cell, _ in running.values()])
            show_progress([])
            for sentinel in ended:
                cell, process = running.pop(sentinel)  # type: ignore[arg-type]
                process.join()
                yield cell
    finally:
        show_progress([])
        end(process.pid for _, process in running.values() if process.pid is not None)


def _start(cell: Cell, context: BaseContext, threads: int) -> BaseProcess:
    cell.folder.mkdir(parents=True, exist_ok=True)
    write_text(cell.folder / JOB, cell.job)
    process = context.Process(target=run_cell, args=(cell.folder, threads))  # type: ignore[attr-defined]
    process.start()
    return process  # type: ignore[no-any-return]


def _process_context() -> BaseContext:
    """Return the start method: fork server, or spawn with CUDA, which does not survive a fork."""
    import torch

    if torch.cuda.is_available():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    return context


def run_cell(folder: Path, threads: int) -> None:
    """Entry point of a run's process: pretrain and retrieve as JOB says; SCORES is written last."""
    # Ctrl-C reaches this process too. It has to save first: the parent sends SIGTERM.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_stop_with_parent, daemon=True).start()
    log = os.open(folder / LOG, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    os.dup2(log, 1)
    os.dup2(log, 2)
    _limit_threads(threads)
    code = run_command(_pretrain_and_retrieve, [str(folder)])
    for loader in multiprocessing.active_children():  # loaders ignore the one SIGTERM that multiprocessing sends
        loader.kill()
    sys.exit(code)


def _limit_threads(threads: int) -> None:
    """Use this many CPU threads in this process and its children: several runs share the cores."""
    os.environ.update(OMP_NUM_THREADS=str(threads), MKL_NUM_THREADS=str(threads), TOKENIZERS_PARALLELISM="false")
    import torch

    torch.set_num_threads(threads)  # with the fork server, torch has read the environment already


def _stop_with_parent() -> None:
    """Send SIGTERM to this process when the parent ends, also after a kill -9 of the parent."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os.kill(os.getpid(), signal.SIGTERM)


def _pretrain_and_retrieve(argv: list[str]) -> None:
    job = json.loads((Path(argv[0]) / JOB).read_text())
    for name, module in (("pretrain", "vision_tower.pretrain"), ("retrieve", "clips_eval.retrieve")):
        importlib.import_module(module).main(job[name])


def _outcome(cell: Cell, metric: str) -> str:
    name = f"{cell.setting.name}, seed {cell.seed}"
    return f"{name}: {metric.upper()} {100 * score(cell, metric):.1f} %" if cell.done else f"{name}: FAILED"


def score(cell: Cell, metric: str) -> float:
    """Return the recall of a finished run, averaged over both directions."""
    tree = read_object(cell.folder / SCORES)
    return float(tree[f"i2t_{metric}"] + tree[f"t2i_{metric}"]) / 2
