"""`clips-mllm compare RUN RUN ... --config RECIPE`: train the same MLLM on several vision towers and compare.

runs x seeds --align, finetune, evaluate, retrieve--> run folders --paired tests--> compare.json, .md, .html

Finished jobs are skipped; an interrupted stage resumes from its last checkpoint.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

from clips_eval.experiments.compare_recipe import CompareRecipe, Job, cell, jobs
from clips_eval.experiments.processes import EVERY, end, show_progress, sigterm_stops
from vision_tower.common.errors import UserError, run_command
from vision_tower.common.files import write_text
from vision_tower.common.recipe import parse_recipe

logger = logging.getLogger(__name__)


def main(argv: list[str]) -> None:
    """Run the command.

    Raises:
        UserError: invalid recipe, results of another recipe in the folder, or a failed job.
        Stopped: SIGTERM; the active job has saved.
    """
    recipe = parse_recipe(CompareRecipe, argv, command="compare", positional=("runs",))
    recipe.check()
    everything = jobs(recipe)
    for job in everything:
        if job.done.is_file() and job.done.read_text() != job.content:
            raise UserError(
                "written with another recipe", file=job.done, remedy=f"remove {job.folder}, or change output_dir"
            )
    with sigterm_stops("compare"):
        _run_all([job for job in everything if not job.done.is_file()], recipe.launcher)

    from clips_eval.experiments.compare_report import write_report
    from clips_eval.stats.provenance import refuse_mixed_precision

    refuse_mixed_precision(recipe.runs)
    cells = [cell(recipe, run, seed) for run in recipe.runs for seed in recipe.seeds]
    refuse_mixed_precision(folder / stage for folder in cells for stage in ("align", "finetune"))
    print(write_report(recipe, shlex.join(["clips-mllm", "compare", *argv])))
    print(f"written: {recipe.output_dir}/compare.html, compare.md, compare.json")


def _run_all(waiting: list[Job], launcher: list[str]) -> None:
    took: dict[str, float] = {}  # seconds of the last job per step
    for number, job in enumerate(waiting, start=1):
        steps = [other.step for other in waiting[number - 1 :]]
        left = sum(took.get(step, math.nan) for step in steps)
        about = "" if math.isnan(left) else f"; about {left / 60:.0f} min left"
        log, started = job.folder / "log.txt", time.monotonic()
        logger.info("[%d/%d] %s, log %s%s", number, len(waiting), job.title, log, about)
        job.folder.mkdir(parents=True, exist_ok=True)
        start = launcher if job.launched and launcher else [sys.executable, "-m"]
        code = _run([*start, job.module, *job.arguments], log)
        if code:
            raise UserError(f"{job.title} exited with code {code}", file=log, remedy="fix the cause and run it again")
        took[job.step] = time.monotonic() - started
        write_text(job.done, job.content)
        if job.output is not None:  # checkpoints of finished stages are most of the disk use, and not needed
            for checkpoint in job.output.glob("checkpoint-*"):
                shutil.rmtree(checkpoint)


def _run(words: list[str], log: Path) -> int:
    """Run a command and return its exit code, 143 if SIGTERM stopped it. If this process ends, so does the command."""
    stopped = log.with_suffix(".stopped")  # written by a command that SIGTERM stopped, which exits with code 0
    stopped.unlink(missing_ok=True)
    with log.open("a") as stream:
        process = subprocess.Popen(
            words, stdout=stream, stderr=stream, env=os.environ | {"STOPPED_FILE": str(stopped.resolve())}
        )
        try:
            while process.poll() is None:
                show_progress([log])
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(timeout=EVERY)
        finally:
            show_progress([])
            if process.returncode is None:
                end([process.pid])
    return 128 + signal.SIGTERM if stopped.exists() else process.returncode


if __name__ == "__main__":
    sys.exit(run_command(main))
