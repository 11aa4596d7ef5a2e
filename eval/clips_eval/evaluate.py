"""`clips-mllm evaluate CHECKPOINT --config configs/eval/quickstart.yaml`: lmms-eval's benchmarks on an MLLM.

recipe --check data--> tasks that can run --+
                                            +-- task by task --> lmms.json, lmms_samples.jsonl, lmms_images/
checkpoint --load--> ClipsMllm -------------+

Answers are kept as they come: after an interruption, or a task that failed, the same command goes on from the first
missing document.
"""

from __future__ import annotations

import os
import shlex
import sys
import tempfile
from pathlib import Path

from clips_eval.experiments.processes import sigterm_stops
from clips_eval.lmms.earlier import refuse_smaller
from clips_eval.lmms.recipe import EvaluateRecipe
from vision_tower.common.errors import UserError, run_command
from vision_tower.common.files import check_model_exists
from vision_tower.common.recipe import parse_recipe


def main(argv: list[str]) -> None:
    """Run the command.

    Raises:
        UserError: an unknown task, data that a task cannot use, a finished result that this run would make smaller, an
            unusable checkpoint, or tasks that failed.
        Stopped: SIGTERM; the answers that there are stay.
    """
    recipe = parse_recipe(EvaluateRecipe, argv, command="evaluate", positional=("checkpoint",))
    if recipe.model == "clips_mllm":
        check_model_exists(recipe.checkpoint, "checkpoint")
    recipe.check()
    refuse_smaller(recipe)
    command = shlex.join(["clips-mllm", "evaluate", *argv])
    _say("loading lmms-eval and the tasks")

    from clips_eval.lmms.run import quiet_libraries, run_variant, survey_tasks, table

    folder = recipe.results.parent
    folder.mkdir(parents=True, exist_ok=True)
    failed: dict[str, str] = {}
    with (
        sigterm_stops("evaluate"),
        quiet_libraries(),
        tempfile.TemporaryDirectory(prefix=".lmms-", dir=folder) as cache,
    ):
        ready, skipped, manager = survey_tasks(recipe)
        for task, reason in skipped.items():
            _say(f"skipped: {task}: {reason}")

        from clips_eval.lmms.engines import load

        loaded = load(recipe)
        for variant in recipe.variants:
            result = run_variant(recipe, variant, loaded, ready, skipped, manager, Path(cache), command)
            if os.environ.get("RANK", "0") == "0":
                print(table(result, recipe.result_of(variant), told=skipped))
            failed |= result["failed"]
    if failed:
        told = "; ".join(f"{task}: {reason}" for task, reason in failed.items())
        raise UserError(
            f"{len(failed)} of {len(ready)} tasks failed ({told})", remedy="the same command goes on with them"
        )


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(run_command(main))
