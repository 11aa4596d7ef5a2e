"""From names in a recipe to lmms-eval's task objects, with the data where the recipe says it is."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from clips_eval.lmms.data import data_files
from clips_eval.lmms.recipe import TaskSpec
from clips_eval.lmms.requests import readable
from clips_eval.tasks import OWN_TASKS, TASKS_DIR
from vision_tower.common.errors import UserError

if TYPE_CHECKING:
    from lmms_eval.api.task import Task
    from lmms_eval.tasks import TaskManager


Mode = Literal["chat", "simple"]
# They fetch their images from a second data set; a local copy brings them in a column of its own.
IMAGES_APART = ("gqa",)


def index_tasks(specs: Sequence[TaskSpec]) -> TaskManager:
    """The index in which the specs' tasks are found. Imports lmms-eval.

    Raises:
        UserError: an unknown task (with the nearest names).
    """
    from lmms_eval.tasks import TaskManager

    # lmms-eval's own 1,000 YAML files take five seconds to index, ours none.
    only_ours = all(spec.task in OWN_TASKS for spec in specs)
    manager = TaskManager(include_path=str(TASKS_DIR), include_defaults=not only_ours, model_name="clips_mllm")
    for spec in specs:
        if spec.task not in manager.task_index:
            near = difflib.get_close_matches(spec.task, manager.all_tasks, n=3, cutoff=0.5)
            remedy = f"nearest names: {', '.join(near)}" if near else "see 'python -m lmms_eval --tasks list'"
            raise UserError(f"unknown task '{spec.task}'", key="tasks", remedy=f"{remedy}")
    return manager


def load_task(spec: TaskSpec, manager: TaskManager, cache_dir: Path, mode: Mode = "chat") -> dict[str, Task]:
    """The task by its name; a group becomes its tasks.

    Args:
        cache_dir: where `datasets` may put the local files that it converts.
    Raises:
        UserError: data that cannot be loaded, or an image in it that cannot be decoded.
    """
    return _stock_task(spec.task, manager, mode) if spec.data is None else _local_task(spec, manager, cache_dir, mode)


def _stock_task(name: str, manager: TaskManager, mode: Mode) -> dict[str, Task]:
    """With the data set that lmms-eval names, from the hub or its cache."""
    from lmms_eval.evaluator_utils import get_task_list
    from lmms_eval.tasks import get_task_dict
    from tenacity import RetryError

    try:
        outputs = get_task_list(get_task_dict([name], manager, mode))
    except RetryError as error:
        cause = " ".join(str(error.last_attempt.exception()).split())
        raise UserError(
            f"task {name}: its data set cannot be loaded ({cause})",
            remedy="check the network, or give a local copy by 'data'",
        ) from error
    return {output.task_name: output.task for output in outputs}


def _local_task(spec: TaskSpec, manager: TaskManager, cache_dir: Path, mode: Mode) -> dict[str, Task]:
    """The task's own YAML with another data location.

    Built here, since lmms-eval loads a task with changed settings in simple mode only.
    """
    from lmms_eval.api.task import ConfigurableMessagesTask, ConfigurableTask
    from lmms_eval.utils import load_yaml_config

    assert spec.data is not None
    if manager.task_index[spec.task]["type"] != "task":
        raise UserError(
            f"task {spec.task}: is a group, which takes no data", remedy="name its tasks with one data each"
        )
    config: dict[str, Any] = load_yaml_config(manager.task_index[spec.task]["yaml_path"], mode="full")
    split = config.get("test_split") or config["validation_split"]
    config |= {
        "dataset_path": "parquet",
        "dataset_name": None,
        "dataset_kwargs": {
            "data_files": {split.strip(): data_files(spec.data, spec.task)},
            "cache_dir": str(cache_dir),
        },
    }
    if spec.task in IMAGES_APART:
        config.pop("process_docs", None)
    kind = ConfigurableMessagesTask if mode == "chat" else ConfigurableTask
    # lmms-eval looks at the first document as it builds the task, and a task's own process_docs may look at any.
    place = "one of its documents" if "process_docs" in config else "document 0"
    try:
        with readable(f"task {spec.task}, {place}"):
            return {spec.task: kind(config=config, model_name=manager.model_name)}
    except KeyError as error:
        raise UserError(f"no column {error}, which task {spec.task} needs", file=spec.data, remedy="add it") from error
