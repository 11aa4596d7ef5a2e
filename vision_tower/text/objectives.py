"""Training objectives: the texts an image is compared with, how they are shortened, and the captioner's target.

    stream   text                                           loss term
    web      web caption                                    InfoNCE(image, web)
    sub      part of the synthetic caption                  InfoNCE(image, sub)
    mix      web or sub, drawn for each pair                InfoNCE(image, mix)
    -        captioner's target                             cross entropy, "caption"

All objectives share the towers, so that a comparison differs only in the losses. Imports no torch, for the recipes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Literal

from vision_tower.common.errors import UserError
from vision_tower.common.recipe import check_ranges

ObjectiveName = Literal["clip-web", "clip-synthetic", "clipa-mix", "coca", "clips"]
Reduction = Literal["sentences", "truncation", "random", "block", "sub-caption"]
CAPTION = "caption"
STREAMS = ("web", "sub", "mix")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Objective:
    """Definition of an objective.

    Args:
        weights: weight by loss term; other terms are not computed.
        reduction: default reduction of the synthetic caption for the text tower.
        teacher_forced: the captioner reads the target's earlier pieces (CoCa, arXiv 2205.01917) instead of the web
            caption (CLIPS).
    """

    weights: Mapping[str, float]
    reduction: Reduction
    teacher_forced: bool = False

    @property
    def captioned(self) -> bool:
        """True if the model has a captioner."""
        return CAPTION in self.weights

    @property
    def streams(self) -> tuple[str, ...]:
        """The texts a pair needs. The captioner of CLIPS reads the web caption even if no InfoNCE does."""
        prompted = self.captioned and not self.teacher_forced
        needed = {"web"} if prompted else {"mix"} if self.captioned else set()
        return tuple(stream for stream in STREAMS if stream in self.weights or stream in needed)


OBJECTIVES: dict[ObjectiveName, Objective] = {
    "clip-web": Objective(weights={"web": 1.0}, reduction="truncation"),
    "clip-synthetic": Objective(weights={"sub": 1.0}, reduction="truncation"),
    "clipa-mix": Objective(weights={"mix": 1.0}, reduction="truncation"),
    "coca": Objective(weights={"mix": 1.0, CAPTION: 2.0}, reduction="truncation", teacher_forced=True),
    "clips": Objective(weights={"web": 0.5, "sub": 0.5, CAPTION: 2.0}, reduction="sentences"),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class LossWeights:
    """Weights of the loss terms; null keeps the objective's own, 0 disables a term and its computation.

    Args:
        web: weight of InfoNCE(image, web caption).
        sub: weight of InfoNCE(image, part of the synthetic caption).
        mix: weight of InfoNCE(image, mixed caption).
        caption: weight of the captioner's cross entropy; with 0 the model has no captioner.
    """

    web: float | None = None
    sub: float | None = None
    mix: float | None = None
    caption: float | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class CaptionRecipe:
    """The part of a caption that the text tower reads.

    Args:
        reduction: how to shorten synthetic captions: sentences (complete random ones); or to the budget by truncation
            (the first pieces), random (random pieces, in order), block (consecutive pieces) or sub-caption (random
            sentences until the budget is full); null uses the objective's default.
        sentences: number of random sentences, for the reduction sentences.
        budget: maximum word pieces of a reduced synthetic caption; null allows as many as fit model.text_length.
        web_budget: maximum word pieces of a web caption, from its start; null allows as many as fit model.text_length.
        web_share: fraction of web captions in the mix (clipa-mix, coca).
    """

    reduction: Reduction | None = None
    sentences: int = 1
    budget: int | None = None
    web_budget: int | None = None
    web_share: float = 0.8

    def check(self, room: int) -> None:
        """Raise UserError for a value out of range, if the text tower has room for `room` word pieces."""
        for name in ("budget", "web_budget"):
            value = getattr(self, name)
            if value is not None and not 1 <= value <= room:
                raise UserError(f"must be from 1 to {room}, by model.text_length", key=f"captions.{name}", value=value)
        check_ranges(self, "captions.", sentences="[1, inf)", web_share="[0, 1]")


def choose_objective(name: ObjectiveName, weights: LossWeights) -> Objective:
    """Return the objective with the recipe's weights, without the terms of weight 0.

    Raises:
        UserError: a weight for a term the objective does not have, a negative weight, or no term left.
    """
    objective = OBJECTIVES[name]
    given = {term: weight for term, weight in dataclasses.asdict(weights).items() if weight is not None}
    for term, weight in given.items():
        if weight < 0:
            raise UserError("must be at least 0", key=f"loss.{term}", value=weight)
        if weight and term not in objective.weights:
            raise UserError(
                f"objective '{name}' has only the terms {', '.join(objective.weights)}",
                key=f"loss.{term}",
                value=weight,
                remedy="remove it, or choose another objective",
            )
    kept = {term: weight for term, weight in {**objective.weights, **given}.items() if weight}
    if not kept:
        raise UserError("every term has weight 0", key="loss", remedy="give one of them a weight")
    return dataclasses.replace(objective, weights=kept)
