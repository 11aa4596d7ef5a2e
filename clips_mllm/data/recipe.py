"""The recipe of instruction data: sources, mixtures, template, packing. No torch."""

from __future__ import annotations

import dataclasses
import math
from typing import Literal

from clips_mllm.prompts.render import TemplateName
from vision_tower.common.errors import UserError


@dataclasses.dataclass(frozen=True, kw_only=True)
class InstructionSource:
    """One source of conversations.

    Args:
        file: LLaVA JSON (.json), JSONL (.jsonl) or Parquet (.parquet, globs allowed), a folder of a `datasets` data
            set, or one on the hub as hf://datasets/OWNER/NAME.
        images: folder that the rows' image paths are relative to; not needed where the images are in the file.
        split: which split of a folder or hub data set.
        weight: passes over this source in one epoch: 0.5 takes a fixed random half of it, 2 takes it twice.
        cap: most samples of it in one epoch, chosen at random; 0 is no limit.
    """

    file: str
    images: str | None = None
    split: str = "train"
    weight: float = 1.0
    cap: int = 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class InstructionRecipe:
    """Which conversations, and how they become tokens.

    Args:
        file: LLaVA JSON (.json), JSONL (.jsonl) or Parquet (.parquet, globs allowed), a folder of a `datasets` data
            set, or one on the hub as hf://datasets/OWNER/NAME.
        images: folder that the rows' image paths are relative to; not needed where the images are in the file.
        mixture: several sources with file, images, split, weight and cap each, instead of the two values above.
        template: how a conversation is written; the checkpoint carries it on. `tokenizer` is the LLM's own.
        max_length: longest sequence in tokens, images included.
        image_aspect_ratio: squash the image to the tower's square, pad it with the mean colour first, or crop it as
            the tower's
            own processor does.
        max_bad_fraction: share of unusable samples above which the run stops.
        group_by_length: batches of like length and modality, for less padding.
        text_first: with group_by_length, what has no image comes first in an epoch: a small LLM learns a kind of
            question from words before it is asked about images.
        packing: lay several short samples of a batch into one row; they do not see each other.
        seed: of the random part of a source that weight or cap takes.
        feature_cache: a folder that keeps what a frozen tower says of each image, shared by stages and runs; none
            runs the tower in every step. An image takes patches x width values (docs/planning.md).
    """

    file: str | None = None
    images: str | None = None
    mixture: tuple[InstructionSource, ...] = ()
    template: TemplateName
    max_length: int = 2048
    image_aspect_ratio: Literal["squash", "pad", "crop"] = "squash"
    max_bad_fraction: float = 0.01
    group_by_length: bool = False
    text_first: bool = False
    packing: bool = False
    seed: int = 0
    feature_cache: str | None = None

    @property
    def sources(self) -> tuple[InstructionSource, ...]:
        """The mixture, or the one source."""
        return self.mixture if self.file is None else (InstructionSource(file=self.file, images=self.images),)

    def check(self) -> None:
        """Raise UserError where it does not say what to read, or a number has no meaning."""
        if (self.file is None) == (not self.mixture):
            raise UserError("say where the conversations are, or give several sources as data.mixture", key="data.file")
        for number, source in enumerate(self.mixture):
            place = f"data.mixture[{number}]"
            if not 0 < source.weight < math.inf:
                raise UserError(
                    f"{place}.weight={source.weight}: must be a number above 0", remedy="or leave the source out"
                )
            if source.cap < 0:
                raise UserError(f"{place}.cap={source.cap}: 0 (no limit) or a number of samples")
        if not 0 <= self.max_bad_fraction <= 1:
            raise UserError("a share from 0 to 1", key="data.max_bad_fraction", value=self.max_bad_fraction)
        if self.text_first and not self.group_by_length:
            raise UserError(
                "batches are of one kind by data.group_by_length", key="data.text_first", remedy="set it too"
            )
        if self.max_length < 2:
            raise UserError("at least 2 tokens", key="data.max_length", value=self.max_length)
