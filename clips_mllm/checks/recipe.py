"""Recipes of `clips-mllm data doctor` and `clips-mllm data preview`. No torch."""

from __future__ import annotations

import dataclasses

from clips_mllm.data.recipe import InstructionSource
from clips_mllm.prompts.render import TemplateName
from vision_tower.common.errors import UserError
from vision_tower.common.recipe import check_ranges


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataRecipe:
    """Options that both commands share.

    Args:
        file: LLaVA JSON, JSONL, Parquet, folder or hub data set, as in data.file of a training recipe.
        images: folder that the image paths of rows are relative to.
        split: split of a folder or hub data set.
        model: folder or hub id of an LLM or LLaVA checkpoint, for its tokenizer.
        template: chat template; by default the checkpoint's or the LLM's own.
        image_tokens: tokens of one image; 0 takes the checkpoint's, or 576 for an LLM.
        max_length: longest sequence in tokens, with image tokens.
    """

    file: str
    images: str | None = None
    split: str = "train"
    model: str | None = None
    template: TemplateName | None = None
    image_tokens: int = 0
    max_length: int = 2048

    @property
    def source(self) -> InstructionSource:
        """The conversations, as a training recipe names them."""
        return InstructionSource(file=self.file, images=self.images, split=self.split)

    def check(self) -> None:
        """Raise UserError if a value is out of range."""
        check_ranges(self, "--", max_length="[2, inf)", image_tokens="[0, inf)")
        if self.template is not None and self.model is None:
            raise UserError("has no effect without a tokenizer", key="--template", remedy="give --model too")


@dataclasses.dataclass(frozen=True, kw_only=True)
class DoctorRecipe(DataRecipe):
    """Check every row and image of a LLaVA JSON, JSONL or Parquet, or of pretraining shards.

    Args:
        file: LLaVA JSON, JSONL, Parquet, folder or hub data set, as in data.file of a training recipe; or pretraining
            shards, as in data.shards of a pretraining recipe.
        web_caption: column or key of the web caption in pretraining shards.
        synthetic_caption: column or key of the synthetic caption in pretraining shards.
        fix: write a copy without unusable rows to this file, of the same kind; for shards, to this folder.
        output: file for the report, as JSON.
        workers: number of processes; 0 takes one per core.
    """

    web_caption: str = "web_caption"
    synthetic_caption: str = "synthetic_caption"
    fix: str | None = None
    output: str = "doctor.json"
    workers: int = 0

    def check(self) -> None:
        """Raise UserError if a value is out of range."""
        super().check()
        check_ranges(self, "--", workers="[0, inf)")


@dataclasses.dataclass(frozen=True, kw_only=True)
class PreviewRecipe(DataRecipe):
    """Show samples as the model reads them, with supervised tokens marked.

    Args:
        count: number of samples, evenly spaced over the file.
        output: write a self-contained HTML page with the images to this file, instead of text to the terminal.
    """

    model: str
    count: int = 8
    output: str | None = None

    def check(self) -> None:
        """Raise UserError if a value is out of range."""
        super().check()
        check_ranges(self, "--", count="[1, inf)")
