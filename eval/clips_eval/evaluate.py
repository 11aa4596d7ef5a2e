"""`clips-mllm evaluate CHECKPOINT --config RECIPE`: lmms-eval's benchmarks on an MLLM.

recipe --check data--> tasks that can run --+
                                            +-- task by task --> lmms.json, lmms_samples.jsonl, lmms_images/
checkpoint --load--> ClipsMllm -------------+

Answers are stored as they are generated: after an interruption or a failed task, the same command resumes with the
first missing document.
"""

from __future__ import annotations

import logging
import shlex
import sys
import tempfile
from pathlib import Path

from clips_eval.experiments.processes import sigterm_stops
from clips_eval.lmms.recipe import EvaluateRecipe
from clips_eval.lmms.result import check_overwrite, table
from vision_tower.common.errors import UserError, run_command
from vision_tower.common.files import check_model_exists
from vision_tower.common.launcher import is_main_process
from vision_tower.common.recipe import parse_recipe

logger = logging.getLogger(__name__)


def main(argv: list[str]) -> None:
    """Run the command.

    Raises:
        UserError: an unknown task, data that a task cannot use, a finished result that this run would make smaller, an
            unusable checkpoint, or failed tasks.
        Stopped: SIGTERM; the answers so far are kept.
    """
    recipe = parse_recipe(EvaluateRecipe, argv, command="evaluate", positional=("checkpoint",))
    if recipe.model == "clips_mllm":
        check_model_exists(recipe.checkpoint, "checkpoint")
    recipe.check()
    check_overwrite(recipe)
    logger.info("loading lmms-eval and the tasks")

    from clips_eval.lmms.engines import load
    from clips_eval.lmms.run import log_warnings_only, run_variant, survey_tasks

    log_warnings_only()
    folder = recipe.results.parent
    folder.mkdir(parents=True, exist_ok=True)
    failed: dict[str, str] = {}
    with sigterm_stops("evaluate"), tempfile.TemporaryDirectory(prefix=".lmms-", dir=folder) as cache:
        survey = survey_tasks(recipe)
        for task, reason in survey.skipped.items():
            logger.warning("skipped: %s: %s", task, reason)
        loaded = load(recipe)
        for variant in recipe.variants:
            command = shlex.join(["clips-mllm", "evaluate", *argv])
            result = run_variant(recipe, variant, loaded, survey, Path(cache), command)
            if is_main_process():
                print(table(result, recipe.result_of(variant), logged=survey.skipped))
            failed |= result["failed"]
    if failed:
        reasons = "; ".join(f"{task}: {reason}" for task, reason in failed.items())
        raise UserError(
            f"{len(failed)} of {len(survey.runnable)} tasks failed ({reasons})", remedy="fix the cause and run it again"
        )


if __name__ == "__main__":
    sys.exit(run_command(main))
