"""The recipe of an evaluation.

Alone in its module: jsonargparse imports what a recipe's module names under TYPE_CHECKING, and lmms-eval there would
cost `--help` seven seconds.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

from clips_eval.lmms.data import check_data
from clips_eval.tasks import OWN_TASKS
from clips_mllm.model.quantize import Quantize
from vision_tower.common.errors import UserError

ControlName = Literal["none", "shuffled", "blank", "no_image"]
Engine = Literal["clips_mllm", "llava_hf", "vllm", "openai"]
PACKAGES: dict[str, str] = {"vllm": "vllm", "openai": "openai"}  # lmms-eval names none that it lacks
CONTROLS: tuple[ControlName, ...] = ("shuffled", "blank", "no_image")
WORDINGS = 3  # of the line that asks for the answer's form; the first is the task's own


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
class Variant:
    """One pass over the tasks: what is shown, and how the answer's form is asked for."""

    control: ControlName = "none"
    wording: int = 0

    @property
    def suffix(self) -> str:
        """Of its result's file name: lmms.json, lmms_shuffled.json, lmms_wording1.json."""
        if self.wording:
            return f"_wording{self.wording}"
        return "" if self.control == "none" else f"_{self.control}"


@dataclass(frozen=True, kw_only=True)
class EvaluateRecipe:
    """Measure an MLLM on lmms-eval tasks, ours over local files or lmms-eval's own.

    Args:
        checkpoint: full, adapter or merged checkpoint, folder or hub id; for openai the served name.
        tasks: what to run, each {task: NAME, data: FILE.parquet}; without data the task's own data set is used.
        data: local copies task by task, over those in tasks; --data.gqa /data/gqa/*.parquet.
        output: where the scores go; CHECKPOINT/lmms.json if not given, runs/baselines/NAME/lmms.json for a hub id.
        control: shows every question another image, a blank one or none, and what is left is language prior; "all"
            measures the model itself and then under each control, into lmms_shuffled.json and so on beside lmms.json.
        wording: how the answer's form is asked for; 0 as the task does, 1 and 2 in other words, "all" one by one.
        model: whose code answers; clips_mllm is ours, the others are lmms-eval's, for cross-checks.
        model_args: further arguments for lmms-eval's models, as its own --model_args takes them.
        mode: chat, or lmms-eval's older simple mode.
        limit: the first so many documents of each task; all if not given.
        batch_size: documents at a time; lmms-eval's llava_hf takes only 1.
        device: auto, cpu or cuda.
        dtype: auto (the checkpoint's), float32 or bfloat16.
        quantize: none, or the LLM's weights in 4bit (nf4) or 8bit, for less memory; only for clips_mllm.
        seed: of the shuffled control, of sampling and of the intervals; greedy answers do not depend on it.
        gallery: right and wrong answers a task whose images are saved for the report.
    """

    checkpoint: str
    tasks: list[TaskSpec]
    data: dict[str, str] = field(default_factory=dict)
    output: Path | None = None
    control: Literal["none", "shuffled", "blank", "no_image", "all"] = "none"
    wording: Literal["0", "1", "2", "all"] = "0"
    model: Engine = "clips_mllm"
    model_args: str = ""
    mode: Literal["chat", "simple"] = "chat"
    limit: int | None = None
    batch_size: int = 16
    device: str = "auto"
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    quantize: Quantize = "none"
    seed: int = 0
    gallery: int = 8

    def check(self) -> None:
        """Raise UserError for what can be said before anything is imported."""
        for name in ("limit", "batch_size"):
            number = getattr(self, name)
            if number is not None and number < 1:
                raise UserError(f"--{name} {number}: at least 1 is needed")
        if self.output is not None and self.output.is_dir():
            raise UserError(
                f"--output {self.output}: a folder", remedy=f"name the file, such as {self.output / 'lmms.json'}"
            )
        if self.model != "clips_mllm" and self.control != "none":
            raise UserError(
                f"--control {self.control}: only for --model clips_mllm", remedy=f"{self.model} shows what it is given"
            )
        if self.model != "clips_mllm" and self.quantize != "none":
            raise UserError(
                f"--quantize {self.quantize}: only for --model clips_mllm",
                remedy=f"{self.model} has its own --model_args",
            )
        package = PACKAGES.get(self.model)
        if package is not None and find_spec(package) is None:
            raise UserError(f"--model {self.model}: package {package} is missing", remedy=f"pip install {package}")
        check_specs(self.specs)

    @property
    def specs(self) -> list[TaskSpec]:
        """The tasks with their data where it really is.

        Raises:
            UserError: data for a task that is not in the recipe.
        """
        names = [spec.task for spec in self.tasks]
        for task in self.data:
            if task not in names:
                near = difflib.get_close_matches(task, names, n=1)
                remedy = f"did you mean '{near[0]}'?" if near else f"its tasks are {', '.join(names)}"
                raise UserError(f"'{task}' is not a task of the recipe", key="data", remedy=f"{remedy}")
        return [replace(spec, data=self.data.get(spec.task, spec.data)) for spec in self.tasks]

    @property
    def variants(self) -> list[Variant]:
        """The passes over the tasks: the model itself first, then controls, then wordings."""
        controls = ("none", *CONTROLS) if self.control == "all" else (self.control,)
        wordings = tuple(range(WORDINGS)) if self.wording == "all" else (int(self.wording),)
        passes = [Variant(control=control, wording=wordings[0]) for control in controls]
        return passes + [Variant(control=controls[0], wording=wording) for wording in wordings[1:]]

    @property
    def results(self) -> Path:
        """Where the scores of the model itself go; those of a variant lie beside it."""
        if self.output is not None:
            return self.output
        folder = Path(self.checkpoint)
        if folder.is_dir() and self.model == "clips_mllm":
            return folder / "lmms.json"
        return (
            Path("runs") / "baselines" / f"{self.model}-{self.checkpoint.strip('/').replace('/', '--')}" / "lmms.json"
        )

    def result_of(self, variant: Variant) -> Path:
        """Where a variant's scores go: as said by --output, if there is only one."""
        if self.output is not None and len(self.variants) == 1:
            return self.output
        return self.results.with_name(f"{self.results.stem}{variant.suffix}.json")


def check_specs(specs: Sequence[TaskSpec]) -> None:
    """What can be said before lmms-eval is imported.

    Raises:
        UserError: no task, one twice, one of ours without data, or data that it cannot use.
    """
    if not specs:
        raise UserError("the list is empty", key="tasks", remedy="name at least one task")
    names = [spec.task for spec in specs]
    for spec in specs:
        if names.count(spec.task) > 1:
            raise UserError(f"{spec.task} is there twice", key="tasks", remedy="remove one")
        if spec.data is None and spec.task in OWN_TASKS:
            raise UserError(f"{spec.task} has no data of its own", key="tasks", remedy="add 'data: FILE.parquet'")
        if spec.data is not None:
            check_data(spec.data, spec.task)
