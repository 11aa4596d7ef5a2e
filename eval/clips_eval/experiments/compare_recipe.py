"""The recipe of `clips-mllm compare`: which towers, what is the same for all, and the runs that this asks for."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Literal

from vision_tower.common.errors import UserError


@dataclass(frozen=True, kw_only=True)
class PretrainSpec:
    """How an encoder is made that is not there yet.

    Args:
        run: its folder, as given among the runs.
        config: recipe of 'clips-mllm pretrain'.
        options: further options, such as --objective=clip-web.
    """

    run: Path
    config: Path
    options: list[str] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class CompareRecipe:
    """Swap the vision tower and nothing else: same LLM, data and steps; every tower with every seed, then paired tests.

    Args:
        runs: encoder runs (folders with tower/); the first is what the others are compared with.
        output_dir: gets a run folder for each tower and seed, compare.json, compare.md and compare.html.
        align: recipe of stage 1.
        finetune: recipe of stage 2.
        evaluate: recipe of the benchmarks.
        retrieval: Karpathy-style JSON to measure the encoders on; left out if not given.
        pretrain: how to make those of the runs that are not there yet; equal samples are the recipes' business.
        stage_options: for both stages, such as --training.max_steps=100.
        projector: module that writes the projector which stage 1 starts from; called with the options of stage 1.
        launcher: what starts a stage before the module's name; this Python if not given, for example
            [deepspeed, --num_gpus, "8", --module].
        seeds: of projector, data order and dropout of both stages; the towers stay as they are.
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
        """Raise UserError before anything is trained."""
        if len(self.runs) < 2:
            raise UserError("runs: give at least two encoder runs, the one to compare with first")
        names = [run.name for run in self.runs]
        if len(set(names)) < len(names):
            raise UserError(
                f"runs: {', '.join(names)}: folders of the same name cannot be told apart", remedy="rename one"
            )
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise UserError("seeds: at least one, none twice", remedy="give three for a comparison to trust")
        made = {spec.run for spec in self.pretrain}
        for run in self.runs:
            if run not in made and not (run / "tower").is_dir():
                raise UserError(
                    "no tower/ in it", file=run, remedy="pretrain it first, or say how under 'pretrain' in the recipe"
                )
        files = [self.align, self.finetune, self.evaluate, *(spec.config for spec in self.pretrain)]
        for file in [*files, *([self.retrieval] if self.retrieval else [])]:
            if not file.is_file():
                raise UserError("no such file", file=file, remedy="correct the recipe")


@dataclass(frozen=True, kw_only=True)
class Job:
    """One command in a process of its own; `done` appears when it has succeeded."""

    step: Literal["pretrain", "projector", "align", "finetune", "evaluate", "retrieve"]
    of: str
    module: str
    arguments: list[str]
    folder: Path
    launched: bool = False
    output: Path | None = None  # of a stage: its checkpoints to go on from lie there

    @property
    def title(self) -> str:
        """For people."""
        return f"{self.of}: {self.step}"

    @property
    def done(self) -> Path:
        """Holds the command, so that another recipe in the same folder is noticed."""
        return self.folder / f".{self.step}.done.json"

    @property
    def order(self) -> str:
        """What `done` must hold."""
        return json.dumps([self.module, *self.arguments])


def cell(recipe: CompareRecipe, run: Path, seed: int) -> Path:
    """The run folder of a tower with a seed; `clips-mllm report` reads it."""
    return recipe.output_dir / f"{run.name}-seed{seed}"


def jobs(recipe: CompareRecipe) -> list[Job]:
    """Everything to do: towers first, then all towers with the first seed, and so on."""
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
    second = [
        "--config",
        str(recipe.finetune),
        "--output_dir",
        str(finetune),
        "--model.checkpoint",
        str(align),
        *common,
    ]
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
