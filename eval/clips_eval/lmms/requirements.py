"""Task requirements (data set, judge API key, Java), checked before anything runs.

A task that cannot run is skipped, with the reason in the results and the report; the others run.
"""

from __future__ import annotations

import os
import shutil
import socket
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clips_eval.lmms.recipe import TaskSpec
from vision_tower.common.errors import UserError

if TYPE_CHECKING:
    from lmms_eval.tasks import TaskManager

# Tasks judged by a model behind an OpenAI-compatible API.
JUDGED = (
    "mmvet",
    "llava_in_the_wild",
    "mathvista_testmini",
    "mmbench_en_dev",
    "mmbench_cn_dev",
    "hallusion_bench_image",
)
JUDGE_KEYS = ("OPENAI_API_KEY", "AZURE_API_KEY", "AZURE_OPENAI_API_KEY")
# Tasks scored by CIDEr and METEOR, whose tokenizer and matcher are Java programs.
CAPTIONED = (
    "nocaps_val",
    "nocaps_test",
    "coco2014_cap_val",
    "coco2017_cap_val",
    "coco_cap",
    "flickr30k_test",
    "textcaps_val",
)
HUB_TIMEOUT = 5.0  # seconds


def split_runnable(specs: Sequence[TaskSpec], manager: TaskManager) -> tuple[list[TaskSpec], dict[str, str]]:
    """Return the tasks that can run on this machine, and the reason for each of the others.

    Raises:
        UserError: no task can run.
    """
    reasons = {spec.task: "; ".join(_missing(spec, manager)) for spec in specs}
    skipped = {task: reason for task, reason in reasons.items() if reason}
    runnable = [spec for spec in specs if spec.task not in skipped]
    if not runnable:
        details = "; ".join(f"{task}: {reason}" for task, reason in skipped.items())
        raise UserError(f"no task can run on this machine ({details})", key="tasks", remedy="fix one of the reasons")
    return runnable, skipped


def _missing(spec: TaskSpec, manager: TaskManager) -> Iterator[str]:
    if spec.task in JUDGED and not any(os.environ.get(key) for key in JUDGE_KEYS):
        yield f"needs a judge, but none of {', '.join(JUDGE_KEYS)} is set"
    if spec.task in CAPTIONED and shutil.which("java") is None:
        yield "its metrics need java, which is not on the PATH"
    if spec.data is None:
        for dataset in _datasets(spec.task, manager):
            if not _reachable(dataset):
                yield (
                    f"data set {dataset} is not cached and the hub cannot be reached; give a local copy with "
                    f"--data.{spec.task} FILE.parquet"
                )


def _datasets(task: str, manager: TaskManager) -> list[str]:
    """Return the `dataset_path` of the task's YAML, or of all tasks of a group."""
    from lmms_eval.utils import load_yaml_config

    entry: Mapping[str, Any] = manager.task_index[task]
    if entry["type"] != "task":
        members = entry.get("task") or []
        names = [name for name in members if isinstance(name, str) and name in manager.task_index and name != task]
        return list(dict.fromkeys(dataset for name in names for dataset in _datasets(name, manager)))
    config = load_yaml_config(entry["yaml_path"], mode="simple")
    return [config["dataset_path"]] if "dataset_path" in config else []


def _reachable(dataset: str) -> bool:
    """Return True if the data set is local, cached, or the hub can be reached."""
    from datasets import config

    if Path(dataset).exists():
        return True
    cached = Path(config.HF_DATASETS_CACHE) / dataset.replace("/", "___")
    hub = Path(os.environ.get("HF_HUB_CACHE", Path(config.HF_CACHE_HOME) / "hub"))
    downloaded = hub / f"datasets--{dataset.replace('/', '--')}"
    return cached.is_dir() or downloaded.is_dir() or (not config.HF_HUB_OFFLINE and _hub_answers())


def _hub_answers() -> bool:
    """Return True if a connection to the hub, or to the mirror in HF_ENDPOINT, can be opened."""
    from urllib.parse import urlsplit

    from huggingface_hub.constants import ENDPOINT

    parts = urlsplit(ENDPOINT)
    try:
        with socket.create_connection((parts.hostname, parts.port or 443), timeout=HUB_TIMEOUT):
            return True
    except OSError:
        return False
