"""`clips-mllm evaluate MODEL --config configs/eval/quickstart.yaml`: lmms-eval's benchmarks on an MLLM.

recipe --check data--> lmms-eval tasks --+
                                         +--> simple_evaluate --> lmms.json, lmms_samples.jsonl, lmms_images/
checkpoint --load--> ClipsMllm ----------+
"""

from __future__ import annotations

import json
import shlex
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

from clips_eval.lmms_recipe import EvaluateRecipe, check_specs
from clips_eval.lmms_scores import sample_rows, save_gallery, task_scores
from clips_eval.lmms_tasks import load_tasks
from clips_eval.report_files import write_json
from vision_tower.errors import UserError, run_command
from vision_tower.files import write_text
from vision_tower.recipe import parse_recipe

if TYPE_CHECKING:
    from lmms_eval.api.task import Task

    from clips_eval.lmms_model import ClipsMllm


def main(argv: list[str]) -> None:
    """Run the command.

    Raises:
        UserError: an unknown task, data that a task cannot use, an unusable checkpoint, or a failed evaluation.
    """
    recipe = parse_recipe(EvaluateRecipe, argv, command="evaluate", positional=("model",))
    for name in ("limit", "batch_size"):
        value = getattr(recipe, name)
        if value is not None and value < 1:
            raise UserError(f"--{name} {value}: at least 1 is needed")
    if not recipe.model.exists():
        raise UserError(f"{recipe.model}: no such checkpoint; give the folder that 'clips-mllm train' wrote")
    check_specs(recipe.tasks)
    output = recipe.output or recipe.model / ("lmms.json" if recipe.control == "none" else "lmms_shuffled.json")
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".lmms-", dir=output.parent) as cache:
        result, rows = run(recipe, output, Path(cache))
    result["command"] = shlex.join(["clips-mllm", "evaluate", *argv])
    # Scores last: a file with scores is a finished evaluation.
    write_text(output.parent / result["samples_file"], "".join(json.dumps(row) + "\n" for row in rows))
    write_json(output, result)
    print(_table(result, output))


def run(recipe: EvaluateRecipe, output: Path, cache: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Evaluate; returns the content of lmms.json and the rows of the samples file.

    Raises:
        UserError: as `main`.
    """
    print("loading lmms-eval and the tasks", file=sys.stderr, flush=True)
    with quiet_libraries():
        from clips_eval.lmms_model import ClipsMllm

        tasks = load_tasks(recipe.tasks, cache)
        model = ClipsMllm(
            str(recipe.model),
            batch_size=recipe.batch_size,
            device=recipe.device,
            dtype=recipe.dtype,
            control=recipe.control,
            seed=recipe.seed,
        )
        started = time.perf_counter()
        results = _simple_evaluate(model, tasks, recipe, output)
    scores: dict[str, dict[str, float]] = {}
    rows: list[dict[str, Any]] = []
    for name, task in tasks.items():
        expected = min(recipe.limit or len(task.eval_docs), len(task.eval_docs))
        scores[name] = task_scores(name, results, expected)
        answers = sample_rows(name, results)
        if recipe.control == "none":  # under a control the model saw other pictures than the document's
            save_gallery(answers, task, output.with_name(f"{output.stem}_images"), recipe.gallery)
        rows += answers
    return {
        "model": str(recipe.model),
        "control": recipe.control,
        "versions": _versions(),
        "recipe": json.loads(json.dumps(asdict(recipe), default=str)),
        "seconds": round(time.perf_counter() - started, 1),
        "tasks": scores,
        "samples_file": f"{output.stem}_samples.jsonl",
    }, rows


def _simple_evaluate(model: ClipsMllm, tasks: dict[str, Task], recipe: EvaluateRecipe, output: Path) -> dict[str, Any]:
    from lmms_eval.evaluator import simple_evaluate

    results: dict[str, Any] | None = simple_evaluate(
        model=model,
        tasks=list(tasks.values()),
        batch_size=recipe.batch_size,
        limit=recipe.limit,
        bootstrap_iters=0,
        random_seed=recipe.seed,
        numpy_random_seed=recipe.seed,
        torch_random_seed=recipe.seed,
        process_docs_parallel=1,
        # As its command line passes them: where tasks write submissions, and no second decoding of every image.
        cli_args=SimpleNamespace(output_path=str(output.parent), process_with_media=False, reasoning_tags=None),
    )
    if not results:
        raise UserError(f"{recipe.model}: lmms-eval returned no results; the evaluation failed")
    return results


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


def _versions() -> dict[str, str]:
    packages = ("torch", "transformers", "datasets", "lmms-eval")
    return {"python": sys.version.split()[0], **{name: version(name) for name in packages}}


def _table(result: dict[str, Any], output: Path) -> str:
    lines = [f"{'task':<24}{'metric':<18}{'value':>8}{'n':>8}"]
    for task, scores in result["tasks"].items():
        for metric, value in scores.items():
            if metric != "n":
                lines.append(f"{task:<24}{metric:<18}{value:>8.3f}{scores['n']:>8}")
    note = "" if result["control"] == "none" else f"control: {result['control']} images\n"
    return "\n".join([*lines, f"{note}written to {output}"])


if __name__ == "__main__":
    sys.exit(run_command(main))
