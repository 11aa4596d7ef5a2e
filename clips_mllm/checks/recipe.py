"""The recipes of `clips-mllm data doctor` and `clips-mllm data preview`, without importing torch."""

from __future__ import annotations

import dataclasses

from clips_mllm.data.recipe import InstructionSource
from clips_mllm.prompts.render import TemplateName
from vision_tower.common.errors import UserError


@dataclasses.dataclass(frozen=True, kw_only=True)
class RenderRecipe:
    """What turns a conversation into tokens, where no run has chosen it; see `DoctorRecipe` for the fields."""

    model: str
    template: TemplateName | None
    image_tokens: int
    max_length: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class DoctorRecipe:
    """Look at every row and every image of a LLaVA JSON, JSONL or Parquet, or of pretraining shards.

    Args:
        file: LLaVA JSON, JSONL, Parquet, folder or hub data set as in data.file of a training recipe; or pretraining
            shards, a pattern as in data.shards of a pretraining recipe.
        images: folder that the rows' image paths are relative to.
        split: which split of a folder or hub data set.
        model: folder or hub id of the LLM, or of a LLaVA checkpoint; tokens are counted with its tokenizer.
        template: how a conversation is written; none takes the checkpoint's, or the LLM's own.
        image_tokens: positions of one image; 0 takes the checkpoint's, and 576 where there is none.
        max_length: longest sequence in tokens, images included.
        web_caption: of pretraining shards, the web caption's column or key.
        synthetic_caption: of pretraining shards, the synthetic caption's column or key.
        fix: write a copy without the bad rows here, a file of the same kind (shards: a folder).
        output: the report.
        workers: processes; 0 takes one a core.
    """

    file: str
    images: str | None = None
    split: str = "train"
    model: str | None = None
    template: TemplateName | None = None
    image_tokens: int = 0
    max_length: int = 2048
    web_caption: str = "web_caption"
    synthetic_caption: str = "synthetic_caption"
    fix: str | None = None
    output: str = "doctor.json"
    workers: int = 0

    @property
    def source(self) -> InstructionSource:
        """The conversations, in a training recipe's words."""
        return InstructionSource(file=self.file, images=self.images, split=self.split)

    @property
    def render(self) -> RenderRecipe | None:
        """How conversations become tokens, where a model is given."""
        return _render(self)

    def check(self) -> None:
        """Raise UserError where values have no meaning."""
        _check(self)
        if self.workers < 0:
            raise UserError(f"--workers {self.workers}: 0 (one a core) or a number of processes")


@dataclasses.dataclass(frozen=True, kw_only=True)
class PreviewRecipe:
    """Show samples as the model sees them, with the supervised tokens coloured.

    Args:
        file: LLaVA JSON, JSONL, Parquet, folder or hub data set as in data.file of a training recipe.
        images: folder that the rows' image paths are relative to.
        split: which split of a folder or hub data set.
        model: folder or hub id of the LLM, or of a LLaVA checkpoint, for its tokenizer.
        template: how a conversation is written; none takes the checkpoint's, or the LLM's own.
        image_tokens: positions of one image; 0 takes the checkpoint's, and 576 where there is none.
        max_length: longest sequence in tokens, images included.
        count: samples, evenly spread over the file.
        output: an HTML page with the images, complete in itself, instead of the terminal.
    """

    file: str
    images: str | None = None
    split: str = "train"
    model: str
    template: TemplateName | None = None
    image_tokens: int = 0
    max_length: int = 2048
    count: int = 8
    output: str | None = None

    @property
    def source(self) -> InstructionSource:
        """The conversations, in a training recipe's words."""
        return InstructionSource(file=self.file, images=self.images, split=self.split)

    @property
    def render(self) -> RenderRecipe:
        """How conversations become tokens."""
        found = _render(self)
        assert found is not None, "a preview has a model"
        return found

    def check(self) -> None:
        """Raise UserError where values have no meaning."""
        _check(self)
        if self.count < 1:
            raise UserError(f"--count {self.count}: at least 1 sample")


def _render(recipe: DoctorRecipe | PreviewRecipe) -> RenderRecipe | None:
    if recipe.model is None:
        return None
    return RenderRecipe(
        model=recipe.model,
        template=recipe.template,
        image_tokens=recipe.image_tokens,
        max_length=recipe.max_length,
    )


def _check(recipe: DoctorRecipe | PreviewRecipe) -> None:
    if recipe.max_length < 2:
        raise UserError(f"--max_length {recipe.max_length}: at least 2 tokens")
    if recipe.image_tokens < 0:
        raise UserError(f"--image_tokens {recipe.image_tokens}: 0 (the checkpoint's) or a number of positions")
    if recipe.template is not None and recipe.model is None:
        raise UserError("tokens need a tokenizer", key="--template", remedy="give --model too")
