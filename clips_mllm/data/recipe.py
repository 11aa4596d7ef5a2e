"""Recipe of instruction data: sources, mixture, template, packing. Imports no torch, so that `--help` is fast."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Literal

from clips_mllm.prompts.render import TemplateName
from vision_tower.common.errors import UserError
from vision_tower.common.recipe import check_ranges, refuse_unused

HUB = "hf://datasets/"
JSON_SUFFIXES = (".json", ".jsonl")
FILE_SUFFIXES = (*JSON_SUFFIXES, ".parquet")


@dataclasses.dataclass(frozen=True, kw_only=True)
class InstructionSource:
    """One source of conversations.

    Args:
        file: LLaVA JSON (.json), JSONL (.jsonl), Parquet (.parquet, globs allowed), the folder of a `datasets` data
            set, or a data set on the hub as hf://datasets/OWNER/NAME.
        images: folder that image paths are relative to (default: the folder of the file); not needed if the images
            are stored in the rows.
        split: split of a folder or hub data set.
        weight: passes over this source in one epoch; 0.5 takes a fixed random half, 2 takes every sample twice.
        cap: maximum number of samples in one epoch, chosen at random; 0 is no limit.
    """

    file: str
    images: str | None = None
    split: str = "train"
    weight: float = 1.0
    cap: int = 0

    @property
    def on_hub(self) -> bool:
        """True for a data set on the hub."""
        return self.file.startswith(HUB)

    def check(self, key: str) -> None:
        """Raise UserError for ineffective or out-of-range values. `key` is the source's place in the recipe."""
        check_ranges(self, f"{key}.", weight="(0, inf)", cap="[0, inf)")
        if not self.on_hub and Path(self.file).suffix in FILE_SUFFIXES:
            refuse_unused(self, ["split"], "a file has no splits", f"{key}.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class InstructionRecipe:
    """Instruction data and how it is tokenized.

    Args:
        file: LLaVA JSON (.json), JSONL (.jsonl), Parquet (.parquet, globs allowed), the folder of a `datasets` data
            set, or a data set on the hub as hf://datasets/OWNER/NAME.
        images: folder that image paths are relative to (default: the folder of the file); not needed if the images
            are stored in the rows.
        mixture: several sources, each with file, images, split, weight and cap; replaces `file` and `images`.
        template: chat template, saved with the checkpoint; `tokenizer` uses the LLM's own template.
        max_length: maximum sequence length in tokens, including image tokens.
        image_aspect_ratio: `squash` resizes the image to a square, `pad` first pads it to a square with the mean
            color (LLaVA-1.5), `crop` keeps the tower's own image processor.
        max_bad_fraction: fraction of unusable samples above which the run stops.
        group_by_length: build batches from samples of similar length and equal modality, for less padding.
        text_first: with group_by_length, put text-only samples first in each epoch, so that a small LLM learns each
            kind of question from text before it sees images.
        packing: pack several short samples of a batch into one row; attention does not cross samples.
        seed: random seed for the samples chosen by `weight` and `cap`.
        feature_cache: folder for the image features of a frozen tower, shared by stages and runs. Each image takes
            patches x width values (docs/planning.md). By default the tower runs in every step.
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
        """All sources: the mixture, or the one file."""
        return self.mixture if self.file is None else (InstructionSource(file=self.file, images=self.images),)

    def check(self) -> None:
        """Raise UserError for contradicting, ineffective or out-of-range values."""
        if (self.file is None) == (not self.mixture):
            raise UserError("set exactly one of data.file and data.mixture", key="data.file", value=self.file)
        if self.file is None:
            refuse_unused(self, ["images"], "has no effect with data.mixture", "data.", "set it in each source")
        for number, source in enumerate(self.mixture):
            source.check(f"data.mixture[{number}]")
        check_ranges(self, "data.", max_bad_fraction="[0, 1]", max_length="[2, inf)")
        if self.text_first and not self.group_by_length:
            raise UserError("needs data.group_by_length", key="data.text_first", remedy="set it too")
