"""One pass over the tasks: each through lmms-eval by itself, so that one that fails takes no other with it."""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from clips_eval.lmms.data import data_digest
from clips_eval.lmms.earlier import FORMAT
from clips_eval.lmms.engines import model_for
from clips_eval.lmms.journal import Journal, weights_of
from clips_eval.lmms.needs import survey
from clips_eval.lmms.recipe import EvaluateRecipe, TaskSpec, Variant
from clips_eval.lmms.requests import readable
from clips_eval.lmms.scores import add_intervals, lower_is_better, sample_rows, save_gallery, task_scores
from clips_eval.lmms.tasks import index_tasks, load_task
from clips_eval.lmms.wordings import reword
from clips_eval.stats.json_files import write_json
from clips_eval.stats.provenance import checkpoint_digest
from vision_tower.common.errors import UserError, disk_is_full
from vision_tower.common.files import write_text
from vision_tower.common.hashes import image_hash
from vision_tower.common.provenance import hardware, versions

if TYPE_CHECKING:
    from lmms_eval.api.model import lmms
    from lmms_eval.api.task import Task
    from lmms_eval.tasks import TaskManager


def survey_tasks(recipe: EvaluateRecipe) -> tuple[list[TaskSpec], dict[str, str], TaskManager]:
    """The tasks that can run, why the others cannot, and the index they are found in.

    Raises:
        UserError: an unknown task, or none that can run.
    """
    manager = index_tasks(recipe.specs)
    return *survey(recipe.specs, manager), manager


def run_variant(
    recipe: EvaluateRecipe,
    variant: Variant,
    loaded: Any,
    specs: list[TaskSpec],
    skipped: dict[str, str],
    manager: TaskManager,
    cache: Path,
    command: str,
) -> dict[str, Any]:
    """Evaluate, and on the first process write; returns the content of the result file.

    A task that fails is named in it under "failed", and on the screen with its traceback where it is not the user's.
    """
    output, started, rank = recipe.result_of(variant), time.perf_counter(), int(os.environ.get("RANK", "0"))
    journal = Journal(output.with_name(f".{output.stem}_answers"), _source(recipe), rank)
    model = model_for(recipe, loaded, variant, journal)
    result: dict[str, Any] = {"tasks": {}, "intervals": {}, "failed": {}, "skipped": dict(skipped)}
    result["lower_is_better"] = {}
    # The paths alone would not tell whether two results are of the same documents.
    local = {} if rank else {spec.task: spec.data for spec in specs if spec.data is not None}
    result["data_sha256"] = {task: data_digest(data, task) for task, data in local.items()}
    rows: list[dict[str, Any]] = []
    for spec in specs:
        asked = False
        try:
            for name, task in load_task(spec, manager, cache, recipe.mode).items():
                if not reword(task, variant.wording):
                    result["skipped"][name] = "its prompt has no line that other words are known for"
                    continue
                if not len(task.eval_docs):
                    raise UserError(
                        f"task {name}: its split has no documents", remedy=f"give data that has some by --data.{name}"
                    )
                asked = True
                found = evaluate_task(model, task, manager, recipe, output)
                if rank:
                    continue
                scores, intervals, answers = _scored(name, task, found, recipe, model)
                if variant == Variant():  # under a control the model saw other images than the document's
                    save_gallery(answers, task, output.with_name(f"{output.stem}_images"), recipe.gallery)
                result["tasks"][name], result["intervals"][name] = scores, intervals
                if lower := lower_is_better(name, task.config.metric_list):
                    result["lower_is_better"][name] = lower
                rows += answers
        except UserError as error:
            if asked and "RANK" in os.environ:  # it may be of this process's documents alone: end all, as below
                raise
            result["failed"][spec.task] = str(error)
        except Exception as error:
            if disk_is_full(error) or "RANK" in os.environ:  # other processes wait for this one: end them all
                raise
            traceback.print_exc()
            result["failed"][spec.task] = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    result |= _about(recipe, variant, command, round(time.perf_counter() - started, 1), journal.reused)
    result["samples_file"] = f"{output.stem}_samples.jsonl"
    if rank == 0 and result["tasks"]:
        # Scores last: a file with scores is a finished evaluation of the tasks that it names.
        write_text(output.parent / result["samples_file"], "".join(json.dumps(row) + "\n" for row in rows))
        write_json(output, result)
        if not result["failed"]:
            journal.forget()
    return result


def evaluate_task(
    model: lmms, task: Task, manager: TaskManager, recipe: EvaluateRecipe, output: Path
) -> dict[str, Any]:
    """lmms-eval's own result for one task; empty on all processes but the first.

    Raises:
        UserError: lmms-eval came back without results.
    """
    from lmms_eval.evaluator import simple_evaluate

    found: dict[str, Any] | None = simple_evaluate(
        model=model,
        tasks=[task],
        task_manager=manager,  # without one it would index its 1,000 YAML files again, five seconds a task
        batch_size=model.batch_size,
        limit=recipe.limit,
        bootstrap_iters=0,
        random_seed=recipe.seed,
        numpy_random_seed=recipe.seed,
        torch_random_seed=recipe.seed,
        process_docs_parallel=1,
        # As its command line passes them: where tasks write submissions, and no second decoding of every image.
        cli_args=SimpleNamespace(output_path=str(output.parent), process_with_media=False, reasoning_tags=None),
    )
    if not found and model.rank == 0:
        raise UserError("lmms-eval returned no results", file=recipe.checkpoint, remedy="the evaluation failed")
    return found or {}


def _scored(
    name: str, task: Task, found: dict[str, Any], recipe: EvaluateRecipe, model: lmms
) -> tuple[dict[str, float], dict[str, dict[str, Any]], list[dict[str, Any]]]:
    """Scores, intervals and rows of one task."""
    expected = min(recipe.limit or len(task.eval_docs), len(task.eval_docs))
    scores = task_scores(name, found, expected)
    rows = sample_rows(name, found, _clusters(name, task, expected, model))
    return scores, add_intervals(name, found, scores, rows, recipe.seed), rows


def _clusters(name: str, task: Task, count: int, model: lmms) -> dict[int, str]:
    """The image that each document shows, by the digest of its pixels; the document's own name if it shows none."""
    from clips_eval.lmms.model import ClipsMllm

    # Digests of what our model was given are at hand, except where a control gave it something else.
    known = model.images if isinstance(model, ClipsMllm) and model.control in ("none", "shuffled") else {}
    found: dict[int, str] = {}
    for doc_id in range(count):
        digests = known.get((name, doc_id))
        if digests is None:
            with readable(f"task {name}, document {doc_id}"):
                visuals = task.doc_to_visual(task.eval_docs[doc_id]) or []
                digests = [image_hash(visual.convert("RGB")) for visual in visuals if hasattr(visual, "convert")]
        found[doc_id] = " ".join(digests) or f"document {doc_id}"
    return found


def _source(recipe: EvaluateRecipe) -> dict[str, Any]:
    """What gives the answers, for the journal."""
    names = ("checkpoint", "model", "model_args", "mode", "dtype", "quantize")
    return {name: getattr(recipe, name) for name in names} | {"weights": weights_of(recipe.checkpoint)}


def _about(recipe: EvaluateRecipe, variant: Variant, command: str, seconds: float, reused: int) -> dict[str, Any]:
    folder = Path(recipe.checkpoint)
    weights = folder.is_dir() and any(folder.glob("model*.safetensors"))
    return {
        "format": FORMAT,
        "model": recipe.checkpoint,
        "sha256": checkpoint_digest(folder) if weights else None,
        "engine": recipe.model,
        "mode": recipe.mode,
        "control": variant.control,
        "wording": variant.wording,
        "versions": versions(),
        "hardware": hardware(),
        "processes": int(os.environ.get("WORLD_SIZE", "1")),
        "recipe": json.loads(json.dumps(asdict(recipe), default=str)),
        "command": command,
        "seconds": seconds,
        "answers_from_before": reused,
    }


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """lmms-eval's and datasets' chatter off, their warnings on stderr, our own progress bars untouched."""
    import datasets
    import lmms_eval.api.task
    import lmms_eval.evaluator
    from loguru import logger

    logger.remove()
    logger.add(sys.stderr, level="WARNING", format="{level}: {message}")
    loud = (lmms_eval.api.task.tqdm, lmms_eval.evaluator.tqdm)
    datasets.disable_progress_bars()
    lmms_eval.api.task.tqdm = lmms_eval.evaluator.tqdm = _SilentBar
    try:
        yield
    finally:
        lmms_eval.api.task.tqdm, lmms_eval.evaluator.tqdm = loud
        datasets.enable_progress_bars()


class _SilentBar:
    """Stands in for the unlabelled bars that lmms-eval draws around a second's work for each task."""

    def __init__(self, items: Any = (), **_: Any) -> None:
        self.items = items

    def __iter__(self) -> Iterator[Any]:
        return iter(self.items)

    def update(self, n: int = 1) -> None:
        """Nothing to draw."""

    def close(self) -> None:
        """Nothing to draw."""


def table(result: dict[str, Any], output: Path, told: Collection[str] = ()) -> str:
    """The scores for the terminal, with their intervals.

    Args:
        told: skipped tasks that the user has been told of.
    """
    lines = [f"{'task':<24}{'metric':<18}{'value':>8}{'95 %':>16}{'n':>8}"]
    for task, scores in result["tasks"].items():
        for metric, score in scores.items():
            if metric != "n":
                found = result["intervals"][task][metric]
                span = "–" if found["low"] is None else f"{found['low']:.3f}–{found['high']:.3f}"
                value = f"{score:.3f}" if found["n"] else "–"  # a precision without a "yes" is no score
                lines.append(f"{task:<24}{metric:<18}{value:>8}{span:>16}{found['n']:>8}")
    notes = [f"skipped: {task}: {reason}" for task, reason in result["skipped"].items() if task not in told]
    notes += [f"failed: {task}: {reason}" for task, reason in result["failed"].items()]
    if result["control"] != "none":
        notes.append(f"control: {result['control'].replace('_', ' ')}")
    if result["wording"]:
        notes.append(f"wording: {result['wording']}")
    return "\n".join([*lines, *notes, f"written to {output}" if result["tasks"] else "nothing written"])
