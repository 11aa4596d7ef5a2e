"""Objectives by name: which texts an image is compared with, how they are cut, and what the captioner does.

    stream   text                                           loss term
    web      the web caption                                InfoNCE(image, web)
    sub      part of the synthetic caption                  InfoNCE(image, sub)
    mix      one of the two, drawn for each pair            InfoNCE(image, mix)
    -        the captioner's target                         cross entropy, "caption"

All objectives share the towers, so that a comparison differs in the losses alone. Torch-free: recipes read this module.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Literal

from vision_tower.common.errors import UserError

ObjectiveName = Literal["clip-web", "clip-synthetic", "clipa-mix", "coca", "clips"]
Reduction = Literal["sentences", "truncation", "random", "block", "sub-caption"]
CAPTION = "caption"
STREAMS = ("web", "sub", "mix")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Objective:
    """What a name stands for.

    Args:
        weights: of the loss terms; a term that is not here does not exist.
        reduction: how the synthetic caption is cut for the text tower, unless the recipe says otherwise.
        teacher_forced: whether the captioner reads the target's earlier pieces (CoCa, arXiv 2205.01917) and not the web
            caption (CLIPS).
    """

    weights: Mapping[str, float]
    reduction: Reduction
    teacher_forced: bool = False

    @property
    def captioned(self) -> bool:
        """Whether the model has a captioner."""
        return CAPTION in self.weights

    @property
    def streams(self) -> tuple[str, ...]:
        """The texts a pair needs. The captioner of CLIPS reads the web caption even where no InfoNCE does."""
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
    """Weights of the loss terms; none leaves the objective's own, 0 switches a term off with all it costs.

    Args:
        web: of InfoNCE(image, web caption).
        sub: of InfoNCE(image, part of the synthetic caption).
        mix: of InfoNCE(image, mixed caption).
        caption: of the captioner's cross entropy; 0 leaves the model without a captioner.
    """

    web: float | None = None
    sub: float | None = None
    mix: float | None = None
    caption: float | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class CaptionRecipe:
    """Which part of a caption the text tower reads.

    Args:
        reduction: of synthetic captions: sentences (random whole ones), or down to the budget by truncation (the first
            pieces), random (any pieces, in order), block (neighbouring pieces) or sub-caption (random sentences until
            the budget is full); none takes the objective's own.
        sentences: how many random sentences, where the reduction is sentences.
        budget: word pieces that a reduced synthetic caption may have; none allows what model.text_length holds.
        web_budget: word pieces that are kept of a web caption, from its beginning; none as above.
        web_share: share of web captions among the mixed ones (clipa-mix, coca).
    """

    reduction: Reduction | None = None
    sentences: int = 1
    budget: int | None = None
    web_budget: int | None = None
    web_share: float = 0.8

    def check(self, room: int) -> None:
        """Raise UserError where the numbers make no sense with `room` word pieces in the text tower."""
        for name in ("budget", "web_budget"):
            value = getattr(self, name)
            if value is not None and not 1 <= value <= room:
                raise UserError(f"captions.{name}={value}: from 1 to {room}, what model.text_length has room for")
        if self.sentences < 1:
            raise UserError("at least 1 is needed", key="captions.sentences", value=self.sentences)
        if not 0 <= self.web_share <= 1:
            raise UserError("a share is from 0 to 1", key="captions.web_share", value=self.web_share)


def choose_objective(name: ObjectiveName, weights: LossWeights) -> Objective:
    """The objective with the recipe's own weights, without the terms of weight 0.

    Raises:
        UserError: a weight for a term that the objective lacks, a negative one, or no term left.
    """
    objective = OBJECTIVES[name]
    given = {term: weight for term, weight in dataclasses.asdict(weights).items() if weight is not None}
    for term, weight in given.items():
        if weight < 0:
            raise UserError(f"loss.{term}={weight}: a weight is at least 0")
        if weight and term not in objective.weights:
            raise UserError(
                f"loss.{term}: objective '{name}' has only {', '.join(objective.weights)}", remedy="take another"
            )
    kept = {term: weight for term, weight in {**objective.weights, **given}.items() if weight}
    if not kept:
        raise UserError("loss: every term is switched off", remedy="give one of them a weight")
    return dataclasses.replace(objective, weights=kept)
