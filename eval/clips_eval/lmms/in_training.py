"""Evaluate lmms-eval tasks on a model during training: small tasks, at chosen steps.

    evaluation: {every: 200, tasks: configs/eval/sample.yaml, scorer: clips_eval.lmms.in_training:load_scorer}

Training is not affected: random states are restored and weights are only read.
"""

from __future__ import annotations

import itertools
import tempfile
from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clips_eval.lmms.recipe import EvaluateRecipe
from vision_tower.common.errors import UserError
from vision_tower.common.recipe import parse_recipe

if TYPE_CHECKING:
    from lmms_eval.api.model import lmms
    from lmms_eval.api.task import Task
    from lmms_eval.tasks import TaskManager

    from clips_mllm.model.checkpoint import Mllm

# The only values that can be evaluated inside a run: its own model, with the tasks' images and wording.
SUPPORTED = {"model": "clips_mllm", "control": "none", "wording": "0", "mode": "chat", "quantize": "none"}
FEWSHOT_SEED = 1234  # lmms-eval's default


def load_scorer(recipe: str) -> TaskScorer:
    """Load the tasks of a `clips-mllm evaluate` recipe, and use its data, limit, batch size and seed.

    Called once by `clips-mllm train`, before training. Device and precision are the run's, and no result file is
    written.

    Raises:
        UserError: an unknown task, a task that cannot run here, unusable data, or an unsupported option.
    """
    from vision_tower.common.randomness import untouched_randomness

    parsed = parse_recipe(
        EvaluateRecipe, ["in-training", "--config", recipe], command="evaluate", positional=("checkpoint",)
    )
    parsed.check()
    for name, only in SUPPORTED.items():
        if (value := getattr(parsed, name)) != only:
            raise UserError("not supported in a training run", file=recipe, key=name, value=value, remedy="remove it")
    with untouched_randomness(), tempfile.TemporaryDirectory(prefix="lmms-") as folder:
        from clips_eval.lmms.run import log_warnings_only, survey_tasks
        from clips_eval.lmms.scores import metric_names
        from clips_eval.lmms.tasks import load_task

        log_warnings_only()
        try:
            survey = survey_tasks(parsed)
            if survey.skipped:  # an error, since a missing score would be noticed only after the run
                reasons = "; ".join(f"{task}: {reason}" for task, reason in survey.skipped.items())
                raise UserError(f"cannot run here ({reasons})", key="tasks", remedy="fix the cause, or remove them")
            tasks = [load_task(spec, survey.manager, Path(folder)) for spec in parsed.specs]
        except UserError as error:
            raise UserError(
                error.problem, file=error.file or recipe, key=error.key, value=error.value, remedy=error.remedy
            ) from error
    names = [_score_name(name, key) for group in tasks for name, task in group.items() for key in metric_names(task)]
    return TaskScorer(parsed, survey.manager, names)


class TaskScorer:
    """Evaluates the tasks of a recipe; `names` are those of the scores."""

    def __init__(self, recipe: EvaluateRecipe, manager: TaskManager, names: list[str]) -> None:
        self.recipe = recipe
        self.manager = manager
        self.names = names

    def evaluate(self, mllm: Mllm, step: int) -> dict[str, float]:
        """Return `{task}_{metric}` of the model in its current state; our tasks without the prefix "clips_".

        Every rank must call it and answers all documents: if the weights are sharded (ZeRO-3), ranks must compute the
        same batches.

        Raises:
            UserError: a task that cannot be evaluated; the message has `step`.
        """
        from transformers import set_seed

        from clips_eval.lmms.model import ClipsMllm
        from clips_eval.lmms.scores import task_scores
        from clips_eval.lmms.tasks import load_task
        from vision_tower.common.randomness import untouched_randomness

        recipe, scores = self.recipe, {}
        training = mllm.model.training
        mllm.model.eval()
        try:
            with untouched_randomness(), tempfile.TemporaryDirectory(prefix="lmms-") as folder:
                model = ClipsMllm(mllm=mllm, batch_size=recipe.batch_size, seed=recipe.seed)
                for spec in recipe.specs:
                    for name, task in load_task(spec, self.manager, Path(folder)).items():
                        set_seed(recipe.seed)
                        results = evaluate_alone(model, name, task, recipe.limit, Path(folder))
                        count = min(recipe.limit or len(task.eval_docs), len(task.eval_docs))
                        for metric, value in task_scores(name, results, count).items():
                            if metric != "n":
                                scores[_score_name(name, metric)] = value
        except UserError as error:
            raise UserError(f"step {step}: {error}") from error
        finally:
            mllm.model.train(training)
        return scores


def evaluate_alone(model: lmms, name: str, task: Task, limit: int | None, folder: Path) -> dict[str, Any]:
    """Evaluate a task on all its documents in this process, and return lmms-eval's `results` and `samples`.

    `lmms_eval.simple_evaluate` would take rank and world size from the environment and divide the documents.
    """
    from lmms_eval.evaluator_utils import TaskOutput

    from clips_eval.lmms.run import cli_arguments

    task.args = cli_arguments(folder / "lmms.json")
    task.set_fewshot_seed(seed=FEWSHOT_SEED)
    task.build_all_requests(limit=limit, rank=0, world_size=1)
    model.task_dict[name] = task.dataset
    requests = [request for request in task.instances for _ in range(request.repeats)]
    generate = getattr(model, task.instances[0].request_type)
    for request, answer in zip(requests, generate(requests), strict=True):
        request.resps.append(answer)
    task.apply_filters()
    by_document = defaultdict(list)
    for request in sorted(task.instances, key=lambda request: request.idx):
        by_document[request.doc_id].append(request)
    output = TaskOutput.from_taskdict(name, task)
    samples = []
    for doc_id, document in itertools.islice(enumerate(task.eval_docs_no_media), limit):
        for filter_key in by_document[doc_id][0].filtered_resps:
            responses = [request.filtered_resps[filter_key] for request in by_document[doc_id]]
            for metric, row in task.process_results(document, responses).items():
                output.sample_metrics[metric, filter_key].append(row)
        samples.append({"doc_id": doc_id})
    output.calculate_aggregate_metric(bootstrap_iters=0)
    return {"results": {name: output.agg_metrics}, "samples": {name: samples}}


def _score_name(task: str, metric: str) -> str:
    return f"{task.removeprefix('clips_')}_{metric}"
