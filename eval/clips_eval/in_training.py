"""lmms-eval tasks on a model that is being trained: small ones, at chosen steps.

    evaluation: {every: 200, tasks: configs/eval/sample.yaml, scorer: clips_eval.in_training:load_scorer}

The run that measures draws and learns what it would without: random states are put back, weights are only read.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from clips_eval.lmms.recipe import EvaluateRecipe
from vision_tower.common.errors import UserError
from vision_tower.common.recipe import parse_recipe

if TYPE_CHECKING:
    from lmms_eval.tasks import TaskManager

    from clips_mllm.model.checkpoint import Mllm

# What a run can measure: its own model, with the tasks' images and words.
MEASURED = {"model": "clips_mllm", "control": "none", "wording": "0", "mode": "chat", "quantize": "none"}


def load_scorer(recipe: str) -> TaskScorer:
    """The scorer of a recipe of `clips-mllm evaluate`; of it the tasks, their data, limit, batch size and seed count.

    Device and precision are the run's, and no result file is written.

    Raises:
        UserError: an unknown task or one that cannot run here, data that cannot be used, or a recipe of another
            measurement than the run can make; said before the training starts.
    """
    from vision_tower.common.randomness import untouched_randomness

    parsed = parse_recipe(
        EvaluateRecipe, ["in-training", "--config", recipe], command="evaluate", positional=("checkpoint",)
    )
    parsed.check()
    for name, only in MEASURED.items():
        if (value := getattr(parsed, name)) != only:
            raise UserError(
                f"{name} '{value}': not measured inside a run", file=recipe, remedy=f"take {name} out of this recipe"
            )
    with untouched_randomness(), tempfile.TemporaryDirectory(prefix="lmms-") as folder:
        from clips_eval.lmms.run import quiet_libraries, survey_tasks
        from clips_eval.lmms.scores import metric_names
        from clips_eval.lmms.tasks import load_task

        try:
            with quiet_libraries():
                _, skipped, manager = survey_tasks(parsed)
                if skipped:  # a score that is there at no step is noticed days later
                    told = "; ".join(f"{task}: {reason}" for task, reason in skipped.items())
                    raise UserError(f"tasks that cannot run here ({told})", remedy="mend the cause, or take them out")
                tasks = [load_task(spec, manager, Path(folder)) for spec in parsed.specs]
        except UserError as error:
            raise UserError(f"{error}", file=recipe) from error
    names = [_score_name(name, key) for some in tasks for name, task in some.items() for key in metric_names(task)]
    return TaskScorer(parsed, manager, names)


class TaskScorer:
    """Measures the recipe's tasks whenever it is asked to; `names` are those of the scores."""

    def __init__(self, recipe: EvaluateRecipe, manager: TaskManager, names: list[str]) -> None:
        self.recipe = recipe
        self.manager = manager
        self.names = names

    def evaluate(self, mllm: Mllm, step: int) -> dict[str, float]:
        """`{task}_{metric}` of the model as it is; our tasks without their "clips_".

        Every rank of a run must call it: each answers all documents, in step with the others.

        Raises:
            UserError: a task that cannot be measured; `step` is in the message.
        """
        from clips_eval.lmms.model import ClipsMllm
        from clips_eval.lmms.run import evaluate_task, quiet_libraries
        from clips_eval.lmms.scores import task_scores
        from clips_eval.lmms.tasks import load_task
        from vision_tower.common.randomness import untouched_randomness

        recipe, scores, rank = self.recipe, {}, int(os.environ.get("RANK", "0"))
        training = mllm.model.training
        mllm.model.eval()
        try:
            with (
                untouched_randomness(),
                quiet_libraries(),
                alone(),
                tempfile.TemporaryDirectory(prefix="lmms-") as folder,
            ):
                model = ClipsMllm(mllm=mllm, batch_size=recipe.batch_size, seed=recipe.seed)
                model.accelerator = None  # the run has one; lmms-eval would make another
                model._rank = rank  # only the first draws progress bars
                for spec in recipe.specs:
                    for name, task in load_task(spec, self.manager, Path(folder)).items():
                        found = evaluate_task(model, task, self.manager, recipe, Path(folder) / "lmms.json")
                        count = min(recipe.limit or len(task.eval_docs), len(task.eval_docs))
                        for metric, value in task_scores(name, found, count).items():
                            if metric != "n":
                                scores[_score_name(name, metric)] = value
        except UserError as error:
            raise UserError(f"step {step}: {error}") from error
        finally:
            mllm.model.train(training)
        return scores


def _score_name(task: str, metric: str) -> str:
    return f"{task.removeprefix('clips_')}_{metric}"


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """lmms-eval takes ranks from the environment and would divide the documents among them.

    Ranks whose weights are divided (ZeRO-3) must compute the same batches; the others would wait for one in any case.
    """
    kept = {name: os.environ.pop(name) for name in ("RANK", "WORLD_SIZE") if name in os.environ}
    try:
        yield
    finally:
        os.environ.update(kept)
