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

from clips_eval.lmms_recipe import EvaluateRecipe
from vision_tower.errors import UserError
from vision_tower.recipe import parse_recipe

if TYPE_CHECKING:
    from clips_mllm.checkpoint import Mllm


def load_scorer(recipe: str) -> TaskScorer:
    """The scorer of a recipe of `clips-mllm evaluate`; of it the tasks, limit, batch size and control count.

    Raises:
        UserError: a recipe or data that cannot be used, said before the training starts.
    """
    parsed = parse_recipe(
        EvaluateRecipe, ["in-training", "--config", recipe], command="evaluate", positional=("checkpoint",)
    )
    parsed.check()
    if parsed.model != "clips_mllm" or len(parsed.variants) > 1:
        raise UserError(f"{recipe}: inside a run one control of our own model is measured; take model and 'all' out")
    return TaskScorer(parsed)


class TaskScorer:
    """Measures the recipe's tasks whenever it is asked to."""

    def __init__(self, recipe: EvaluateRecipe) -> None:
        self.recipe = recipe

    def evaluate(self, mllm: Mllm, step: int) -> dict[str, float]:
        """`{task}_{metric}` of the model as it is; our tasks without their "clips_".

        Every rank of a run must call it: each answers all documents, in step with the others.

        Raises:
            UserError: a task that cannot be measured; `step` is in the message.
        """
        from clips_eval.lmms_model import ClipsMllm
        from clips_eval.lmms_run import evaluate_task, quiet_libraries
        from clips_eval.lmms_scores import task_scores
        from clips_eval.lmms_tasks import index_tasks, load_task
        from vision_tower.scoring import untouched_randomness

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
                manager = index_tasks(recipe.specs)
                model = ClipsMllm(mllm=mllm, batch_size=recipe.batch_size, control=recipe.variants[0].control)
                model.accelerator = None  # the run has one; lmms-eval would make another
                model._rank = rank  # only the first draws progress bars
                for spec in recipe.specs:
                    for name, task in load_task(spec, manager, Path(folder)).items():
                        found = evaluate_task(model, task, manager, recipe, Path(folder) / "lmms.json")
                        count = min(recipe.limit or len(task.eval_docs), len(task.eval_docs))
                        for metric, value in task_scores(name, found, count).items():
                            if metric != "n":
                                scores[f"{name.removeprefix('clips_')}_{metric}"] = value
        except UserError as error:
            raise UserError(f"step {step}: {error}") from error
        finally:
            mllm.model.train(training)
        return scores


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
