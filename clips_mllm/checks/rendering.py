"""Renders conversations to tokens with the tokenizer of a checkpoint or an LLM, without loading the model."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING

from clips_mllm.checks.recipe import DataRecipe
from clips_mllm.data.llava_json import Example
from clips_mllm.model.build import add_image_token
from clips_mllm.prompts.chat_template import template_for
from clips_mllm.prompts.render import Rendered, render
from vision_tower.checkpoints.loading import read_pretrained
from vision_tower.common.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

LLAVA_IMAGE_TOKENS = 576  # CLIP-L/14 at 336 pixels


@dataclasses.dataclass(frozen=True)
class Renderer:
    """Render conversations as training does, with a fixed number of tokens per image."""

    tokenizer: PreTrainedTokenizerFast
    template: str
    image_tokens: int
    max_length: int

    def __call__(self, example: Example) -> Rendered:
        """Return ids and labels. Raises Unsupervised."""
        return render(
            example.messages,
            template=self.template,
            tokenizer=self.tokenizer,
            image_tokens=self.image_tokens,
            max_length=self.max_length,
        )


def open_renderer(recipe: DataRecipe) -> Renderer:
    """Load the tokenizer and choose the template. Raises UserError if one of them cannot be used."""
    from transformers import AutoTokenizer

    assert recipe.model is not None, "the caller has checked"
    tokenizer = read_pretrained(AutoTokenizer, recipe.model)
    add_image_token(tokenizer)
    if recipe.template is not None or not tokenizer.chat_template:
        template = template_for(tokenizer, recipe.template or "tokenizer")
    elif _is_llava(recipe.model):  # the template of a checkpoint is complete already
        template = str(tokenizer.chat_template)
    else:
        template = template_for(tokenizer, "tokenizer")
    return Renderer(tokenizer, template, recipe.image_tokens or _image_tokens(recipe.model), recipe.max_length)


def _is_llava(model: str) -> bool:
    return (Path(model) / "processor_config.json").is_file()


def _image_tokens(model: str) -> int:
    """Return the tokens per image of a checkpoint, or LLaVA-1.5's for a bare LLM. Raises UserError for tiles."""
    from transformers import AutoProcessor, LlavaProcessor

    from clips_mllm.model.processors import image_tokens

    if not _is_llava(model):
        return LLAVA_IMAGE_TOKENS
    processor = read_pretrained(AutoProcessor, model)
    if not isinstance(processor, LlavaProcessor):
        raise UserError("tokens per image vary, since images have tiles", file=model, remedy="give --image_tokens")
    return image_tokens(processor)
