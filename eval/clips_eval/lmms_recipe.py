"""The recipe of an evaluation.

Alone in its module: jsonargparse imports what a recipe's module names under TYPE_CHECKING, and lmms-eval there would
cost `--help` seven seconds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from clips_eval.lmms_data import check_data
from clips_eval.tasks import OWN_TASKS
from vision_tower.errors import UserError


@dataclass(frozen=True, kw_only=True)
class TaskSpec:
    """One task of a recipe.

    Args:
        task: a task of ours (clips_...) or of lmms-eval's.
        data: a parquet file, or a pattern of them, in place of the data set that the task names.
    """

    task: str
    data: str | None = None


@dataclass(frozen=True, kw_only=True)
class EvaluateRecipe:
    """Measure an MLLM on lmms-eval tasks, ours over local files or lmms-eval's own.

    Args:
        model: folder of a stock LLaVA checkpoint.
        tasks: what to run, each {task: NAME, data: FILE.parquet}; without data the task's own data set is used.
        output: where the scores go; MODEL/lmms.json (MODEL/lmms_shuffled.json for the control) if not given.
        control: "shuffled" shows every question another question's picture: what is left is language prior.
        limit: the first so many documents of each task; all if not given.
        batch_size: documents at a time.
        device: auto, cpu or cuda.
        dtype: auto (the checkpoint's), float32 or bfloat16.
        seed: of the control and of sampling; greedy answers do not depend on it.
        gallery: right and wrong answers a task whose pictures are saved for the report.
    """

    model: Path
    tasks: list[TaskSpec]
    output: Path | None = None
    control: Literal["none", "shuffled"] = "none"
    limit: int | None = None
    batch_size: int = 16
    device: str = "auto"
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    seed: int = 0
    gallery: int = 8


def check_specs(specs: Sequence[TaskSpec]) -> None:
    """What can be said before lmms-eval is imported.

    Raises:
        UserError: no task, one twice, one of ours without data, or data that it cannot use.
    """
    if not specs:
        raise UserError("tasks: the list is empty; name at least one task")
    names = [spec.task for spec in specs]
    for spec in specs:
        if names.count(spec.task) > 1:
            raise UserError(f"tasks: {spec.task} is there twice; remove one")
        if spec.data is None and spec.task in OWN_TASKS:
            raise UserError(f"tasks: {spec.task} has no data of its own; add 'data: FILE.parquet'")
        if spec.data is not None:
            check_data(spec.data, spec.task)
