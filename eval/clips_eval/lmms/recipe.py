"""The recipe of an evaluation.

Alone in its module: jsonargparse executes the TYPE_CHECKING imports of the module that holds a recipe, and importing
lmms-eval would make `--help` take seven seconds.
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
from vision_tower.common.recipe import check_ranges, refuse_unused

ControlName = Literal["none", "shuffled", "blank", "no_image"]
Engine = Literal["clips_mllm", "llava_hf", "vllm", "openai"]
PACKAGES: dict[str, str] = {"vllm": "vllm", "openai": "openai"}  # lmms-eval's own error does not name the package
CONTROLS: tuple[ControlName, ...] = ("shuffled", "blank", "no_image")
WORDINGS = 3  # of the line that asks for the answer's form; wording 0 is the task's own
# Options that only some engines use; with another one a value other than the default is refused.
ENGINE_OPTIONS: dict[str, tuple[Engine, ...]] = {
    "control": ("clips_mllm",),
    "quantize": ("clips_mllm",),
    "dtype": ("clips_mllm", "llava_hf"),
    "model_args": ("llava_hf", "vllm", "openai"),
}


@dataclass(frozen=True, kw_only=True)
class TaskSpec:
    """One task of a recipe.

    Args:
        task: a task of ours (clips_...) or of lmms-eval.
        data: a parquet file or a pattern, instead of the data set that the task names.
    """

    task: str
    data: str | None = None


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One pass over the tasks: the image control and the wording of the prompt."""

    control: ControlName = "none"
    wording: int = 0

    @property
    def suffix(self) -> str:
        """Suffix of the result's file name: lmms.json, lmms_shuffled.json, lmms_wording1.json."""
        control = "" if self.control == "none" else f"_{self.control}"
        return control + (f"_wording{self.wording}" if self.wording else "")


@dataclass(frozen=True, kw_only=True)
class EvaluateRecipe:
    """Measure an MLLM on lmms-eval tasks, ours over local files or lmms-eval's own.

    Args:
        checkpoint: full, adapter or merged checkpoint, folder or hub id; with openai the served model's name.
        tasks: tasks to run, each {task: NAME, data: FILE.parquet}; without data the task's own data set is used.
        data: local copies by task, which override those in tasks; --data.gqa /data/gqa/*.parquet.
        output: result file; by default CHECKPOINT/lmms.json, for a hub id runs/baselines/NAME/lmms.json.
        control: images to show instead of the question's, to measure language prior: those of another question
            (shuffled), blank ones, or none (no_image). "all" measures the model itself and then each control, into
            lmms_shuffled.json and so on next to lmms.json.
        wording: wording of the line that asks for the answer's form; 0 is the task's own, 1 and 2 are others, "all"
            measures each.
        model: model implementation; clips_mllm is ours, the others are lmms-eval's, for cross-checks.
        model_args: further arguments of lmms-eval's models, in the form of its own --model_args.
        mode: chat, or lmms-eval's older simple mode.
        limit: number of documents per task, from the first; by default all.
        batch_size: documents per batch; lmms-eval's llava_hf always uses 1.
        device: auto, cpu or cuda.
        dtype: auto (the checkpoint's), float32 or bfloat16.
        quantize: none, or 4bit (nf4) or 8bit for the LLM's weights, to save memory; only for clips_mllm.
        seed: seed of the shuffled control, of sampling and of the intervals; greedy answers do not depend on it.
        gallery: number of correct and of wrong answers per task whose images are saved for the report.
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
        """Raise UserError on everything that can be checked before lmms-eval is imported."""
        check_ranges(self, limit="[1, inf)", batch_size="[1, inf)")
        if self.output is not None and self.output.is_dir():
            raise UserError("is a folder", key="output", value=self.output, remedy="name a file in it, as lmms.json")
        for name, engines in ENGINE_OPTIONS.items():
            if self.model not in engines:
                remedy = f"remove it, or choose --model {' or '.join(engines)}"
                refuse_unused(self, [name], f"has no effect with --model {self.model}", remedy=remedy)
        package = PACKAGES.get(self.model)
        if package is not None and find_spec(package) is None:
            raise UserError("not installed", key="model", value=self.model, remedy=f"pip install {package}")
        check_specs(self.specs)

    @property
    def specs(self) -> list[TaskSpec]:
        """The tasks with the data paths of `data`.

        Raises:
            UserError: `data` has a task that is not in `tasks`.
        """
        names = [spec.task for spec in self.tasks]
        for task in self.data:
            if task not in names:
                near = difflib.get_close_matches(task, names, n=1)
                remedy = f"did you mean '{near[0]}'?" if near else f"its tasks are {', '.join(names)}"
                raise UserError("not a task of the recipe", key="data", value=task, remedy=remedy)
        return [replace(spec, data=self.data.get(spec.task, spec.data)) for spec in self.tasks]

    @property
    def variants(self) -> list[Variant]:
        """Passes over the tasks: the model itself first, then controls, then wordings."""
        controls = ("none", *CONTROLS) if self.control == "all" else (self.control,)
        wordings = tuple(range(WORDINGS)) if self.wording == "all" else (int(self.wording),)
        passes = [Variant(control=control, wording=wordings[0]) for control in controls]
        return passes + [Variant(control=controls[0], wording=wording) for wording in wordings[1:]]

    @property
    def results(self) -> Path:
        """Result file of the model itself; those of other variants are next to it."""
        if self.output is not None:
            return self.output
        folder = Path(self.checkpoint)
        if folder.is_dir() and self.model == "clips_mllm":
            return folder / "lmms.json"
        name = f"{self.model}-{self.checkpoint.strip('/').replace('/', '--')}"
        return Path("runs") / "baselines" / name / "lmms.json"

    def result_of(self, variant: Variant) -> Path:
        """Return the variant's result file: --output itself if there is only one variant."""
        if self.output is not None and len(self.variants) == 1:
            return self.output
        return self.results.with_name(f"{self.results.stem}{variant.suffix}.json")


def check_specs(specs: Sequence[TaskSpec]) -> None:
    """Check the tasks of a recipe and their local data.

    Raises:
        UserError: no task, a duplicate, one of ours without data, or data that the task cannot use.
    """
    if not specs:
        raise UserError("must not be empty", key="tasks", remedy="name at least one task")
    names = [spec.task for spec in specs]
    for spec in specs:
        if names.count(spec.task) > 1:
            raise UserError("is listed twice", key="tasks", value=spec.task, remedy="remove one")
        if spec.data is None and spec.task in OWN_TASKS:
            raise UserError("needs local data", key="tasks", value=spec.task, remedy="add 'data: FILE.parquet'")
        if spec.data is not None:
            check_data(spec.data, spec.task)
