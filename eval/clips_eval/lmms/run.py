"""One variant of an evaluation: every task runs through lmms-eval by itself, so that a failing one affects no other."""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from clips_eval.lmms.answer_cache import AnswerCache, weight_stamps
from clips_eval.lmms.data import data_digest
from clips_eval.lmms.engines import model_for
from clips_eval.lmms.recipe import EvaluateRecipe, TaskSpec, Variant
from clips_eval.lmms.requests import image_errors
from clips_eval.lmms.requirements import split_runnable
from clips_eval.lmms.result import provenance, write_result
from clips_eval.lmms.scores import add_intervals, lower_is_better, sample_rows, save_gallery, task_scores
from clips_eval.lmms.tasks import index_tasks, load_task, reword
from vision_tower.common.errors import UserError, disk_is_full
from vision_tower.common.hashes import image_hash
from vision_tower.common.launcher import is_main_process

if TYPE_CHECKING:
    from lmms_eval.api.model import lmms
    from lmms_eval.api.task import Task
    from lmms_eval.tasks import TaskManager

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class TaskSurvey:
    """Tasks of a recipe that can run on this machine, the reasons for the others, and lmms-eval's task index."""

    runnable: list[TaskSpec]
    skipped: dict[str, str]
    manager: TaskManager


def survey_tasks(recipe: EvaluateRecipe) -> TaskSurvey:
    """Find the tasks and check their requirements. Imports lmms-eval.

    Raises:
        UserError: an unknown task, or no task can run.
    """
    manager = index_tasks(recipe.specs)
    runnable, skipped = split_runnable(recipe.specs, manager)
    return TaskSurvey(runnable=runnable, skipped=skipped, manager=manager)


def log_warnings_only() -> None:
    """Show only warnings of lmms-eval, and no progress bars of `datasets`. Called once per process, by a command.

    Both have one process-wide switch: lmms-eval logs to loguru's only logger, which shows debug messages by default.
    """
    import datasets
    from loguru import logger as loguru_logger

    loguru_logger.configure(handlers=[{"sink": sys.stderr, "level": "WARNING", "format": "{level}: {message}"}])
    datasets.disable_progress_bars()


def run_variant(
    recipe: EvaluateRecipe, variant: Variant, loaded: Any, survey: TaskSurvey, cache: Path, command: str
) -> dict[str, Any]:
    """Evaluate all tasks under one variant; the main process writes the result file. Return its content.

    Args:
        loaded: the model, as `engines.load` returns it.
        cache: folder for temporary files of `datasets`.
        command: the command line, for the result file.
    """
    run = VariantRun(recipe, variant, loaded, survey, cache)
    for spec in survey.runnable:
        run.evaluate(spec)
    result = run.result(command)
    if is_main_process() and result["tasks"]:
        write_result(run.output, result, run.rows)
        if not result["failed"]:
            run.answers.delete()
    return result


class VariantRun:
    """Evaluates tasks one by one and collects scores, intervals, samples and failures."""

    def __init__(self, recipe: EvaluateRecipe, variant: Variant, loaded: Any, survey: TaskSurvey, cache: Path) -> None:
        self.recipe, self.variant, self.manager, self.cache = recipe, variant, survey.manager, cache
        self.start = time.perf_counter()
        self.output = recipe.result_of(variant)
        rank = int(os.environ.get("RANK", "0"))
        self.answers = AnswerCache(self.output.with_name(f".{self.output.stem}_answers"), _source(recipe), rank)
        self.model = model_for(recipe, loaded, variant, self.answers)
        self.scores: dict[str, dict[str, float]] = {}
        self.intervals: dict[str, dict[str, dict[str, Any]]] = {}
        self.lower_is_better: dict[str, list[str]] = {}
        self.failed: dict[str, str] = {}
        self.skipped = dict(survey.skipped)
        self.rows: list[dict[str, Any]] = []
        # Digests, not only paths: two results can be compared only if they are of the same documents.
        local = {spec.task: spec.data for spec in survey.runnable if spec.data is not None}
        self.digests = {task: data_digest(data, task) for task, data in local.items()} if is_main_process() else {}

    def evaluate(self, spec: TaskSpec) -> None:
        """Load and score a task, or each task of a group. A failure is recorded in `failed` and logged.

        Raises:
            Exception: a full disk, or an error that only one of several processes can have: the others would wait for
                it in their next collective, so it ends the command.
        """
        started = False
        try:
            for name, task in load_task(spec, self.manager, self.cache, self.recipe.mode).items():
                if not reword(task, self.variant.wording):
                    self.skipped[name] = "its prompt has no line with known other wordings"
                    continue
                if not len(task.eval_docs):
                    raise UserError("its split has no documents", key="tasks", value=name, remedy="give other data")
                started = True
                results = evaluate_task(self.model, task, self.manager, self.recipe, self.output)
                if is_main_process():
                    self._score(name, task, results)
        except Exception as error:
            expected = isinstance(error, UserError)
            # While a task is loaded, every process reads the same data and has the same UserError.
            one_process = "RANK" in os.environ and (started or not expected)
            if one_process or (not expected and disk_is_full(error)):
                raise
            if not expected:
                logger.exception("task %s failed", spec.task)
            message = " ".join(str(error).split())[:200]
            self.failed[spec.task] = str(error) if expected else f"{type(error).__name__}: {message}"

    def _score(self, name: str, task: Task, results: Mapping[str, Any]) -> None:
        count = min(self.recipe.limit or len(task.eval_docs), len(task.eval_docs))
        scores = task_scores(name, results, count)
        rows = sample_rows(name, results, _clusters(name, task, count, self.model))
        intervals = add_intervals(name, results, scores, rows, self.recipe.seed)
        if self.variant == Variant():  # under a control the model saw other images than the document's
            save_gallery(rows, task, self.output.with_name(f"{self.output.stem}_images"), self.recipe.gallery)
        self.scores[name], self.intervals[name] = scores, intervals
        if lower := lower_is_better(name, task.config.metric_list):
            self.lower_is_better[name] = lower
        self.rows += rows

    def result(self, command: str) -> dict[str, Any]:
        """Return the content of the result file."""
        return {
            "tasks": self.scores,
            "intervals": self.intervals,
            "failed": self.failed,
            "skipped": self.skipped,
            "lower_is_better": self.lower_is_better,
            "data_sha256": self.digests,
            **provenance(self.recipe, self.variant, command),
            "seconds": round(time.perf_counter() - self.start, 1),
            "reused_answers": self.answers.reused,
            "samples_file": f"{self.output.stem}_samples.jsonl",
        }


def evaluate_task(
    model: lmms, task: Task, manager: TaskManager, recipe: EvaluateRecipe, output: Path
) -> dict[str, Any]:
    """Return lmms-eval's result for one task; empty on all processes but the first.

    Raises:
        UserError: lmms-eval returned no results.
    """
    from lmms_eval.evaluator import simple_evaluate

    results: dict[str, Any] | None = simple_evaluate(
        model=model,
        tasks=[task],
        task_manager=manager,  # without one it would index its 1,000 YAML files again, five seconds per task
        batch_size=model.batch_size,
        limit=recipe.limit,
        bootstrap_iters=0,
        random_seed=recipe.seed,
        numpy_random_seed=recipe.seed,
        torch_random_seed=recipe.seed,
        process_docs_parallel=1,
        cli_args=cli_arguments(output),
    )
    if not results and model.rank == 0:
        raise UserError("lmms-eval returned no results", file=recipe.checkpoint, remedy="see the messages above")
    return results or {}


def cli_arguments(output: Path) -> SimpleNamespace:
    """Return arguments that lmms-eval's command line passes to tasks.

    Tasks write submissions to `output_path`; without media, images are not decoded a second time for scoring.
    """
    return SimpleNamespace(output_path=str(output.parent), process_with_media=False, reasoning_tags=None)


def _clusters(name: str, task: Task, count: int, model: lmms) -> dict[int, str]:
    """Return each document's images as a digest of their pixels; for a document without images its own name."""
    from clips_eval.lmms.model import ClipsMllm

    # Our model has the digests of the documents' images, except under controls that show it others.
    known = model.images if isinstance(model, ClipsMllm) and model.control in ("none", "shuffled") else {}
    clusters: dict[int, str] = {}
    for doc_id in range(count):
        digests = known.get((name, doc_id))
        if digests is None:
            with image_errors(f"task {name}, document {doc_id}"):
                visuals = task.doc_to_visual(task.eval_docs[doc_id]) or []
                digests = [image_hash(visual.convert("RGB")) for visual in visuals if hasattr(visual, "convert")]
        clusters[doc_id] = " ".join(digests) or f"document {doc_id}"
    return clusters


def _source(recipe: EvaluateRecipe) -> dict[str, Any]:
    """Describe what generates the answers, for the answer cache."""
    names = ("checkpoint", "model", "model_args", "mode", "dtype", "quantize")
    return {name: getattr(recipe, name) for name in names} | {"weights": weight_stamps(recipe.checkpoint)}
