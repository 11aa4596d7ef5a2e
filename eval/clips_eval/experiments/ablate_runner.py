"""Training the grid: several runs at a time, each once, in processes of their own."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import os
import time
from collections.abc import Callable, Generator, Iterator
from multiprocessing import connection
from multiprocessing.context import BaseContext
from multiprocessing.process import BaseProcess
from pathlib import Path

from clips_eval.experiments.ablate_cell import LOG, ORDER, cell_context, run_cell
from clips_eval.experiments.ablate_grid import AblateRecipe, Setting, settings
from clips_eval.experiments.processes import EVERY, end, show_progress, sigterm_stops
from vision_tower.common.errors import UserError
from vision_tower.common.files import read_object, write_text
from vision_tower.common.hashes import file_hash

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
                "made with another recipe or other data",
                file=file,
                remedy=f"remove {cell.folder}, or choose another output_dir",
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
        "recipe_sha256": file_hash(recipe.pretrain),
    }
    return Cell(setting=setting, seed=seed, folder=folder, order=json.dumps(order, indent=1))


def run_cells(recipe: AblateRecipe, say: Callable[[str], None]) -> list[Cell]:
    """Train and measure what is not done yet.

    Raises:
        UserError: runs that failed, with the log of the first.
        Stopped: SIGTERM. The runs under way have saved a checkpoint, from which they go on.
    """
    everything = cells(recipe)
    waiting = [cell for cell in everything if not cell.done]
    processes = recipe.processes or max((os.cpu_count() or 1) // recipe.threads, 1)
    say(f"{len(everything)} runs, {len(everything) - len(waiting)} done before; {processes} at a time")
    failed: list[Cell] = []
    started = time.monotonic()
    with (
        sigterm_stops("ablate"),
        _environment_of_cells(recipe.threads),
        contextlib.closing(_run_all(waiting, processes, recipe.threads)) as ended,
    ):
        for number, cell in enumerate(ended, start=1):
            if not cell.done:
                failed.append(cell)
            left = (time.monotonic() - started) / number * (len(waiting) - number)
            say(f"[{number}/{len(waiting)}] {_outcome(cell, recipe.metric)}; about {left / 60:.0f} min left")
    if failed:
        log = failed[0].folder / LOG
        raise UserError(
            f"{log}: {len(failed)} of {len(everything)} runs failed, this is the first one's log",
            remedy="mend the cause and run the same command, which goes on from here",
        )
    return everything


def _run_all(waiting: list[Cell], processes: int, threads: int) -> Generator[Cell]:
    """The runs in the order in which they end. When this is closed, those under way save and end."""
    context, rest = cell_context(), iter(waiting)
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
    write_text(cell.folder / ORDER, cell.order)
    process = context.Process(target=run_cell, args=(cell.folder, threads))  # type: ignore[attr-defined]
    process.start()
    return process  # type: ignore[no-any-return]


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
