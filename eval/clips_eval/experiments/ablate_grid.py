"""The grid of `clips-mllm ablate`: its recipe, and which runs it asks for. Torch-free.

    (a) length       four reductions of synthetic captions at every budget, web captions at every budget, both whole
    (b) objectives   each by its name

A run that two comparisons share (web captions, whole) is trained once.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Literal

from vision_tower.common.errors import UserError
from vision_tower.text.objectives import ObjectiveName, Reduction

CutTo = Literal["truncation", "random", "block", "sub-caption"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class AblateRecipe:
    """Rerun the comparisons of the CLIPS paper on any shards: many small runs with equal samples seen.

    Args:
        output_dir: gets a folder for each run, and ablation.md, ablation.json and two plots.
        pretrain: recipe of one run, as for 'pretrain'; objective, captions and seed are set for each run.
        data: Karpathy-style JSON with the test captions, as for 'retrieve'.
        shards: pattern of the pretraining shards; those of the recipe if not given.
        reductions: ways to cut synthetic captions; with none the comparison of lengths is left out.
        budgets: word pieces left of a synthetic caption; the whole caption is always compared too.
        web_budgets: word pieces left of a web caption; they are shorter to begin with.
        objectives: what the second comparison compares; it may be empty.
        seeds: of initialisation and data order; each run is repeated with every one.
        metric: recall that is compared, the mean of both directions.
        processes: runs at a time; 0 takes as many as there are cores for.
        threads: CPU threads of one run.
    """

    output_dir: str
    pretrain: Path
    data: Path
    shards: str | None = None
    reductions: tuple[CutTo, ...] = ("truncation", "random", "block", "sub-caption")
    budgets: tuple[int, ...] = (8, 16, 32)
    web_budgets: tuple[int, ...] = (2, 4)
    objectives: tuple[ObjectiveName, ...] = ("clip-web", "clipa-mix", "coca", "clips")
    seeds: tuple[int, ...] = (0, 1, 2)
    metric: Literal["r1", "r5", "r10"] = "r1"
    processes: int = 0
    threads: int = 1

    def check(self, room: int) -> None:
        """Raise UserError where the grid makes no sense with `room` word pieces in the text tower."""
        if not self.reductions and not self.objectives:
            raise UserError("reductions, objectives: nothing to compare", remedy="name some of either")
        if len(set(self.seeds)) < max(2, len(self.seeds)):
            raise UserError(
                "seeds: two different ones at least, none twice", remedy="give three for a comparison to trust"
            )
        if self.reductions and not (self.budgets and self.web_budgets):
            raise UserError("budgets, web_budgets: none to compare lengths at", remedy="give some, such as [8, 16, 32]")
        for name in ("budgets", "web_budgets") if self.reductions else ():
            for budget in getattr(self, name):
                if not 1 <= budget < room:
                    raise UserError(
                        f"{budget} is not from 1 to below {room}, the room of model.text_length in {self.pretrain}",
                        file=name,
                    )
        if self.processes < 0 or self.threads < 1:
            raise UserError("processes: at least 0, and threads at least 1")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Setting:
    """What one run trains with, apart from its seed. Without a budget captions are whole."""

    objective: ObjectiveName
    reduction: Reduction | None = None
    budget: int | None = None

    @property
    def name(self) -> str:
        """Of its folder and its row."""
        return "-".join(str(part) for part in (self.objective, self.reduction, self.budget) if part is not None)

    @property
    def options(self) -> list[str]:
        """For `pretrain`."""
        words = [f"--objective={self.objective}"]
        if self.reduction is not None:
            words.append(f"--captions.reduction={self.reduction}")
        if self.budget is not None:
            name = "web_budget" if self.objective == "clip-web" else "budget"
            words.append(f"--captions.{name}={self.budget}")
        return words


WEB, SYNTHETIC = Setting(objective="clip-web"), Setting(objective="clip-synthetic")


def length_curves(recipe: AblateRecipe) -> dict[str, list[Setting]]:
    """The settings of each curve over length, from the shortest budget to the whole caption."""
    if not recipe.reductions:
        return {}
    budgets = sorted(set(recipe.budgets))
    curves = {
        reduction: [Setting(objective="clip-synthetic", reduction=reduction, budget=budget) for budget in budgets]
        + [SYNTHETIC]
        for reduction in recipe.reductions
    }
    web = [Setting(objective="clip-web", budget=budget) for budget in sorted(set(recipe.web_budgets))]
    return curves | {"web": [*web, WEB]}


def objective_bars(recipe: AblateRecipe) -> dict[str, Setting]:
    """The setting of each objective."""
    return {name: Setting(objective=name) for name in recipe.objectives}


def settings(recipe: AblateRecipe) -> list[Setting]:
    """Every setting of the grid once."""
    found = [setting for curve in length_curves(recipe).values() for setting in curve]
    return list(dict.fromkeys([*found, *objective_bars(recipe).values()]))
