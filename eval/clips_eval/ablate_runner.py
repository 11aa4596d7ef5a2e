"""Training the grid: several runs at a time, each once, in processes of their own."""

from __future__ import annotations

import concurrent.futures
import contextlib
import dataclasses
import hashlib
import json
import os
import time
from collections.abc import Callable, Iterator
from multiprocessing.context import BaseContext
from pathlib import Path

from clips_eval.ablate_cell import LOG, ORDER, cell_context, run_cell
from clips_eval.ablate_grid import AblateRecipe, Setting, settings
from vision_tower.errors import UserError
from vision_tower.files import read_object, write_text

SCORES = "retrieval.json"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cell:
    """One run: a setting with a seed, and what its process is to do."""

    setting: Setting
    seed: int
    folder: Path
    order: str

    @property
    def done(self) -> bool:
        """Whether its scores are there."""
        return (self.folder / SCORES).is_file()


def cells(recipe: AblateRecipe) -> list[Cell]:
    """All runs; the whole grid with the first seed comes first.

    Raises:
        UserError: a folder holds a run that was asked for with other values.
    """
    found = [_cell(recipe, setting, seed) for seed in recipe.seeds for setting in settings(recipe)]
    for cell in found:
        file = cell.folder / ORDER
        if file.is_file() and file.read_text() != cell.order:
            raise UserError(
                f"{file}: made with another recipe or other data; remove {cell.folder}, or choose another output_dir"
            )
    return found


def _cell(recipe: AblateRecipe, setting: Setting, seed: int) -> Cell:
    folder = Path(recipe.output_dir) / "runs" / f"{setting.name}-seed{seed}"
    pretrain = [f"--config={recipe.pretrain}", f"--output_dir={folder}", *setting.options, f"--training.seed={seed}"]
    if recipe.shards is not None:
        pretrain.append(f"--data.shards={recipe.shards}")
    order = {
        "pretrain": pretrain,
        "retrieve": [str(folder), f"--data={recipe.data}"],
        "recipe_sha256": hashlib.sha256(recipe.pretrain.read_bytes()).hexdigest(),
    }
    return Cell(setting=setting, seed=seed, folder=folder, order=json.dumps(order, indent=1))


def run_cells(recipe: AblateRecipe, say: Callable[[str], None]) -> list[Cell]:
    """Train and measure what is not done yet.

    Raises:
        UserError: runs that failed, with the log of the first.
    """
    everything = cells(recipe)
    waiting = [cell for cell in everything if not cell.done]
    processes = recipe.processes or max((os.cpu_count() or 1) // recipe.threads, 1)
    say(f"{len(everything)} runs, {len(everything) - len(waiting)} done before; {processes} at a time")
    failed: list[Cell] = []
    context, started = cell_context(), time.monotonic()
    with _environment_of_cells(recipe.threads), concurrent.futures.ThreadPoolExecutor(processes) as pool:
        jobs = {pool.submit(_run, cell, context, recipe.threads): cell for cell in waiting}
        try:
            for number, job in enumerate(concurrent.futures.as_completed(jobs), start=1):
                cell = jobs[job]
                if job.result():
                    failed.append(cell)
                left = (time.monotonic() - started) / number * (len(waiting) - number)
                say(f"[{number}/{len(waiting)}] {_outcome(cell, recipe.metric)}; about {left / 60:.0f} min left")
        except KeyboardInterrupt:  # the running processes have had the signal too
            pool.shutdown(cancel_futures=True)
            raise
    if failed:
        log = failed[0].folder / LOG
        raise UserError(
            f"{log}: {len(failed)} of {len(everything)} runs failed, this is the first one's log; mend the cause and "
            "run the same command, which goes on from here"
        )
    return everything


def _run(cell: Cell, context: BaseContext, threads: int) -> int | None:
    """The process's exit code."""
    cell.folder.mkdir(parents=True, exist_ok=True)
    write_text(cell.folder / ORDER, cell.order)
    process = context.Process(target=run_cell, args=(cell.folder, threads))  # type: ignore[attr-defined]
    process.start()
    process.join()
    return process.exitcode  # type: ignore[no-any-return]


@contextlib.contextmanager
def _environment_of_cells(threads: int) -> Iterator[None]:
    """Several runs on few cores: threads that spin while they wait would take them from the others."""
    before = dict(os.environ)
    os.environ |= {name: str(threads) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
    os.environ |= {"OMP_WAIT_POLICY": "PASSIVE", "TOKENIZERS_PARALLELISM": "false"}
    try:
        yield
    finally:
        os.environ.clear()
        os.environ |= before


def _outcome(cell: Cell, metric: str) -> str:
    name = f"{cell.setting.name}, seed {cell.seed}"
    return f"{name}: {metric.upper()} {100 * score(cell, metric):.1f} %" if cell.done else f"{name}: FAILED"


def score(cell: Cell, metric: str) -> float:
    """Recall of a finished run, the mean of both directions."""
    tree = read_object(cell.folder / SCORES)
    return float(tree[f"i2t_{metric}"] + tree[f"t2i_{metric}"]) / 2
