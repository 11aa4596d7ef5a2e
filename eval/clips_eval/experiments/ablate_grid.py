"""The recipe of `clips-mllm ablate` and the settings of its grid. No torch.

    (a) length       synthetic captions with each reduction and budget, web captions with each budget, both uncut
    (b) objectives   each objective

A run that both comparisons need (uncut web captions) is trained once.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Literal

from vision_tower.common.errors import UserError
from vision_tower.common.recipe import check_ranges
from vision_tower.text.objectives import ObjectiveName, Reduction

CutTo = Literal["truncation", "random", "block", "sub-caption"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class AblateRecipe:
    """Repeat the comparisons of the CLIPS paper on any shards: many small runs with the same number of samples.

    Args:
        output_dir: folder for the runs, ablation.md, ablation.json and two plots.
        pretrain: recipe of `clips-mllm pretrain`; objective, captions and seed are set for each run.
        data: Karpathy-style JSON with the test captions, as for `clips-mllm retrieve`.
        shards: pattern of the pretraining shards (default: the recipe's).
        reductions: ways to cut synthetic captions; an empty list skips the comparison of lengths.
        budgets: word pieces kept of a synthetic caption; the uncut caption is always included.
        web_budgets: word pieces kept of a web caption.
        objectives: objectives to compare; an empty list skips this comparison.
        seeds: seeds of initialization and data order; each setting is run with each seed.
        metric: recall to compare, averaged over both directions.
        processes: runs at a time; 0 uses all cores.
        threads: CPU threads per run.
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
        """Raise UserError if a value is invalid; `room` is the number of word pieces that the text tower can read."""
        if not self.reductions and not self.objectives:
            raise UserError("nothing to compare", key="reductions", remedy="give reductions or objectives")
        if len(set(self.seeds)) < max(2, len(self.seeds)):
            raise UserError("needs two different seeds", key="seeds", value=self.seeds, remedy="give three or more")
        if self.reductions and not (self.budgets and self.web_budgets):
            raise UserError("budgets and web_budgets are needed", key="budgets", remedy="for example [8, 16, 32]")
        for name in ("budgets", "web_budgets") if self.reductions else ():
            for budget in getattr(self, name):
                if not 1 <= budget < room:
                    raise UserError(f"must be from 1 to {room - 1} to fit model.text_length", key=name, value=budget)
        check_ranges(self, processes="[0, inf)", threads="[1, inf)")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Setting:
    """Training settings of a run, apart from its seed. Without a budget captions are uncut."""

    objective: ObjectiveName
    reduction: Reduction | None = None
    budget: int | None = None

    @property
    def name(self) -> str:
        """Name of the run folder and the table row."""
        return "-".join(str(part) for part in (self.objective, self.reduction, self.budget) if part is not None)

    @property
    def options(self) -> list[str]:
        """Options for `clips-mllm pretrain`."""
        words = [f"--objective={self.objective}"]
        if self.reduction is not None:
            words.append(f"--captions.reduction={self.reduction}")
        if self.budget is not None:
            name = "web_budget" if self.objective == "clip-web" else "budget"
            words.append(f"--captions.{name}={self.budget}")
        return words


WEB, SYNTHETIC = Setting(objective="clip-web"), Setting(objective="clip-synthetic")


def length_curves(recipe: AblateRecipe) -> dict[str, list[Setting]]:
    """Return the settings of each length curve, from the smallest budget to the uncut caption."""
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
    """Return the setting of each objective."""
    return {name: Setting(objective=name) for name in recipe.objectives}


def settings(recipe: AblateRecipe) -> list[Setting]:
    """Return each setting of the grid once."""
    found = [setting for curve in length_curves(recipe).values() for setting in curve]
    return list(dict.fromkeys([*found, *objective_bars(recipe).values()]))
