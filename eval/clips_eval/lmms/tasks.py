"""From task names in a recipe to lmms-eval's task objects, with local data and with other wordings of the prompt."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from clips_eval.lmms.data import data_files
from clips_eval.lmms.recipe import TaskSpec
from clips_eval.lmms.requests import image_errors
from clips_eval.tasks import OWN_TASKS, TASKS_DIR
from vision_tower.common.errors import UserError

if TYPE_CHECKING:
    from lmms_eval.api.task import Task
    from lmms_eval.tasks import TaskManager


Mode = Literal["chat", "simple"]
# Tasks that fetch their images from a second data set; a local copy has them in its own column "image".
SEPARATE_IMAGES = ("gqa",)
# The line that asks for the answer's form, and two other wordings of it. LLaVA's models are trained and measured with
# one such line per kind of answer: a score that falls with another wording depends partly on knowing that line.
WORD = ("Reply with one word or a short phrase.", "Give your answer in as few words as you can.")
LETTER = ("Reply only with the letter of the right option.", "Which option is right? Give just its letter.")
WORDINGS: dict[str, tuple[str, str]] = {
    "Answer the question using a single word or phrase.": WORD,
    "Answer the question with a single word.": WORD,
    "Answer with the option's letter from the given choices directly.": LETTER,
    "Answer with the option letter only.": LETTER,
}


def index_tasks(specs: Sequence[TaskSpec]) -> TaskManager:
    """Return lmms-eval's task index, which contains all tasks of `specs`. Imports lmms-eval.

    Raises:
        UserError: an unknown task (with the nearest names).
    """
    from lmms_eval.tasks import TaskManager

    # Indexing lmms-eval's 1,000 YAML files takes five seconds, ours alone no time.
    only_ours = all(spec.task in OWN_TASKS for spec in specs)
    manager = TaskManager(include_path=str(TASKS_DIR), include_defaults=not only_ours, model_name="clips_mllm")
    for spec in specs:
        if spec.task not in manager.task_index:
            near = difflib.get_close_matches(spec.task, manager.all_tasks, n=3, cutoff=0.5)
            remedy = f"did you mean {' or '.join(near)}?" if near else "see 'python -m lmms_eval --tasks list'"
            raise UserError("unknown task", key="tasks", value=spec.task, remedy=remedy)
    return manager


def load_task(spec: TaskSpec, manager: TaskManager, cache_dir: Path, mode: Mode = "chat") -> dict[str, Task]:
    """Return {name: task}; a group has several.

    Args:
        cache_dir: folder for the Arrow files to which `datasets` converts local data.
    Raises:
        UserError: data that cannot be loaded, or an image in it that cannot be decoded.
    """
    return _stock_task(spec.task, manager, mode) if spec.data is None else _local_task(spec, manager, cache_dir, mode)


def _stock_task(name: str, manager: TaskManager, mode: Mode) -> dict[str, Task]:
    """Load a task with the data set that lmms-eval names, from the hub or its cache."""
    from lmms_eval.evaluator_utils import get_task_list
    from lmms_eval.tasks import get_task_dict
    from tenacity import RetryError

    try:
        outputs = get_task_list(get_task_dict([name], manager, mode))
    except RetryError as error:
        cause = " ".join(str(error.last_attempt.exception()).split())
        remedy = f"check the network, or give a local copy with --data.{name} FILE.parquet"
        raise UserError(f"its data set cannot be loaded ({cause})", key="tasks", value=name, remedy=remedy) from error
    return {output.task_name: output.task for output in outputs}


def _local_task(spec: TaskSpec, manager: TaskManager, cache_dir: Path, mode: Mode) -> dict[str, Task]:
    """Build the task from its own YAML with another data location.

    Built here, since lmms-eval loads a task with changed settings in simple mode only.
    """
    from lmms_eval.api.task import ConfigurableMessagesTask, ConfigurableTask
    from lmms_eval.utils import load_yaml_config

    assert spec.data is not None
    if manager.task_index[spec.task]["type"] != "task":
        raise UserError("a group has no data", key="tasks", value=spec.task, remedy="list its tasks with their data")
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
    if spec.task in SEPARATE_IMAGES:
        config.pop("process_docs", None)
    task_class = ConfigurableMessagesTask if mode == "chat" else ConfigurableTask
    # lmms-eval reads the first document when it builds the task; a task's own process_docs can read any.
    document = "one of its documents" if "process_docs" in config else "document 0"
    try:
        with image_errors(f"task {spec.task}, {document}"):
            return {spec.task: task_class(config=config, model_name=manager.model_name)}
    except KeyError as error:
        raise UserError(f"{spec.task} needs a column {error}", file=spec.data, remedy="add the column") from error


def reword(task: Task, wording: int) -> bool:
    """Replace the task's line by its `wording`-th other wording; False if the task has no known line."""
    if wording == 0:
        return True
    settings = task.lmms_eval_specific_kwargs or {}
    post_prompt = settings.get("post_prompt", "")
    line = post_prompt.strip()
    if line not in WORDINGS:
        return False
    replaced = post_prompt.replace(line, WORDINGS[line][wording - 1])
    task.lmms_eval_specific_kwargs = {**settings, "post_prompt": replaced}
    return True
