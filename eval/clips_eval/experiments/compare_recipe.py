"""The recipe of `clips-mllm compare` and the jobs that it expands to."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Literal

from vision_tower.common.errors import UserError


@dataclass(frozen=True, kw_only=True)
class PretrainSpec:
    """How to pretrain an encoder that does not exist yet.

    Args:
        run: its folder, one of the runs.
        config: recipe of `clips-mllm pretrain`.
        options: further options, for example --objective=clip-web.
    """

    run: Path
    config: Path
    options: list[str] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class CompareRecipe:
    """Train the same MLLM with each vision tower and seed, and compare the towers with paired tests.

    Args:
        runs: encoder runs (folders with tower/); the others are compared with the first.
        output_dir: folder for a run per tower and seed, compare.json, compare.md and compare.html.
        align: recipe of stage 1.
        finetune: recipe of stage 2.
        evaluate: recipe of the benchmarks.
        retrieval: Karpathy-style JSON to evaluate the encoders on (optional).
        pretrain: how to pretrain runs that do not exist yet; give them recipes with the same number of samples.
        stage_options: options for both stages, for example --training.max_steps=100.
        projector: module that writes the initial projector of stage 1, called with the options of stage 1 (optional).
        launcher: launcher of a stage, followed by the module name (default: this Python), for example
            [deepspeed, --num_gpus, "8", --module].
        seeds: seeds of projector, data order and dropout in both stages; the towers are the same for all seeds.
    """

    runs: list[Path]
    output_dir: Path
    align: Path
    finetune: Path
    evaluate: Path
    retrieval: Path | None = None
    pretrain: list[PretrainSpec] = field(default_factory=list)
    stage_options: list[str] = field(default_factory=list)
    projector: str | None = None
    launcher: list[str] = field(default_factory=list)
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2])

    def check(self) -> None:
        """Raise UserError if the recipe is invalid or a file is missing."""
        if len(self.runs) < 2:
            raise UserError("at least two encoder runs are needed", key="runs", remedy="give the baseline first")
        names = [run.name for run in self.runs]
        if len(set(names)) < len(names):
            raise UserError(f"folder names must differ: {', '.join(names)}", key="runs", remedy="rename one")
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise UserError("needs different seeds", key="seeds", value=self.seeds, remedy="give three or more")
        made = {spec.run for spec in self.pretrain}
        for run in self.runs:
            if run not in made and not (run / "tower").is_dir():
                raise UserError("contains no tower/", file=run, remedy="pretrain it, or add it to 'pretrain'")
        files = [self.align, self.finetune, self.evaluate, *(spec.config for spec in self.pretrain)]
        for file in [*files, *([self.retrieval] if self.retrieval else [])]:
            if not file.is_file():
                raise UserError("no such file", file=file, remedy="correct the recipe")


@dataclass(frozen=True, kw_only=True)
class Job:
    """One command, run in its own process; the file `done` is written when it has succeeded."""

    step: Literal["pretrain", "projector", "align", "finetune", "evaluate", "retrieve"]
    of: str
    module: str
    arguments: list[str]
    folder: Path
    launched: bool = False
    output: Path | None = None  # output_dir of a stage, whose checkpoints are removed when it is done

    @property
    def title(self) -> str:
        """Label for the log."""
        return f"{self.of}: {self.step}"

    @property
    def done(self) -> Path:
        """File with the command, to detect another recipe in the same folder."""
        return self.folder / f".{self.step}.done.json"

    @property
    def content(self) -> str:
        """Expected content of `done`."""
        return json.dumps([self.module, *self.arguments])


def cell(recipe: CompareRecipe, run: Path, seed: int) -> Path:
    """Return the run folder of a tower and seed, which `clips-mllm report` reads."""
    return recipe.output_dir / f"{run.name}-seed{seed}"


def jobs(recipe: CompareRecipe) -> list[Job]:
    """Return all jobs: pretraining first, then all towers with the first seed, and so on."""
    found = []
    for spec in (spec for spec in recipe.pretrain if spec.run in recipe.runs):
        words = ["--config", str(spec.config), "--output_dir", str(spec.run), *spec.options]
        found.append(
            Job(step="pretrain", of=spec.run.name, module="vision_tower.pretrain", arguments=words, folder=spec.run)
        )
    for seed in recipe.seeds:
        for run in recipe.runs:
            found += _cell_jobs(recipe, run, seed)
    return found


def _cell_jobs(recipe: CompareRecipe, run: Path, seed: int) -> list[Job]:
    folder, of = cell(recipe, run, seed), f"{run.name}, seed {seed}"
    align, finetune = folder / "align", folder / "finetune"
    common = [*recipe.stage_options, f"--training.seed={seed}"]
    first = ["--config", str(recipe.align), "--output_dir", str(align), "--model.tower", str(run / "tower"), *common]
    second = ["--config", str(recipe.finetune), "--output_dir", str(finetune), "--model.checkpoint", str(align)]
    second += common
    words = [str(finetune), "--config", str(recipe.evaluate)]
    found = []
    if recipe.projector is not None:
        first += ["--model.projector", str(folder / "projector.safetensors")]
        found.append(Job(step="projector", of=of, module=recipe.projector, arguments=first, folder=folder))
    stage = partial(Job, of=of, module="clips_mllm.train", folder=folder, launched=True)
    found += [
        stage(step="align", arguments=first, output=align),
        stage(step="finetune", arguments=second, output=finetune),
        Job(step="evaluate", of=of, module="clips_eval.evaluate", arguments=words, folder=folder),
    ]
    if recipe.retrieval is not None:
        words = [str(run), "--data", str(recipe.retrieval), "--output", str(folder / "encoder" / "retrieval.json")]
        found.append(Job(step="retrieve", of=of, module="clips_eval.retrieve", arguments=words, folder=folder))
    return found
