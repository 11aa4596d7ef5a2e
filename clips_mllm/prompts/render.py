"""Render conversations to ids and labels in one pass.

    messages --Jinja template--> text + spans of the assistant's answers --one tokenizer call--> ids, labels

The Jinja template is the only definition of a prompt: training renders with it and the checkpoint contains it, so chat,
lmms-eval and servers render the same bytes. `{% generation %}` marks the answers, including their end token. Other
templates lack these marks; `spans.py` finds their answers. The text is tokenized once, as at inference, and a token is
supervised if it ends in an answer. Nothing is tokenized again to find an offset, so prompt and labels always agree.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from importlib import resources
from typing import TYPE_CHECKING, Any, Literal

from clips_mllm.prompts.conversation import IGNORED, IMAGE, Message, Unsupervised
from clips_mllm.prompts.spans import find_spans, marks_answers

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

TemplateName = Literal["plain", "vicuna_v1", "llama_2", "llama_3", "chatml", "tokenizer"]
TemplateFile = Literal[TemplateName, "flatten"]


@dataclasses.dataclass(frozen=True)
class Rendered:
    """Token ids with `<image>` expanded, and labels that are `IGNORED` for unsupervised tokens.

    Attributes:
        full_length: number of tokens before truncation to `max_length`.
    """

    ids: list[int]
    labels: list[int]
    full_length: int = dataclasses.field(default=0, compare=False)


@functools.cache
def load_template(name: TemplateFile) -> str:
    """Load a built-in Jinja template; `chat_template.template_for` adapts it to a tokenizer."""
    return (resources.files("clips_mllm.prompts") / "templates" / f"{name}.jinja").read_text().rstrip("\n")


def render_text(
    messages: list[Message], template: str, tokenizer: PreTrainedTokenizerFast | None = None
) -> tuple[str, list[tuple[int, int]]]:
    """Return the text of a conversation, and the character spans of the answers.

    Args:
        tokenizer: source of the special tokens that templates use (`bos_token`).
    Raises:
        Unsupervised: the template refuses the conversation, or its answers cannot be found.
    """
    from jinja2 import TemplateError

    special = tokenizer.special_tokens_map if tokenizer is not None else {}
    try:
        if marks_answers(template):
            return _render_marked(messages, template, special)
        return find_spans(messages, template, tokenizer)
    except TemplateError as error:
        raise Unsupervised(f"the template refuses the conversation ({error})") from error


def _render_marked(
    messages: list[Message], template: str, special: dict[str, Any]
) -> tuple[str, list[tuple[int, int]]]:
    from transformers.utils.chat_template_utils import render_jinja_template

    texts, spans = render_jinja_template(
        [messages], chat_template=template, return_assistant_tokens_mask=True, **special
    )
    return texts[0], [(start, end) for start, end in spans[0]]


def tokenizer_options(text: str, tokenizer: PreTrainedTokenizerFast) -> dict[str, bool]:
    """Return the options with which transformers' processors tokenize a rendered prompt: no second BOS."""
    bos = tokenizer.bos_token
    return {"add_special_tokens": bos is None or not text.startswith(bos)}


def render(
    messages: list[Message],
    *,
    template: str,
    tokenizer: PreTrainedTokenizerFast,
    image_tokens: int | Sequence[int],
    max_length: int,
) -> Rendered:
    """Return ids and labels of a conversation, truncated to `max_length`.

    Args:
        messages: `{"role", "content"}`; content is a string or parts `{"type": "text" | "image", ...}`.
        template: Jinja template.
        image_tokens: number of positions of each image, or one number for all.
    Raises:
        Unsupervised: no supervised token remains, the cut is in or before an image, or the template refuses.
    """
    text, spans = render_text(messages, template, tokenizer)
    options = tokenizer_options(text, tokenizer)
    encoded = tokenizer(text, return_offsets_mapping=True, return_attention_mask=False, **options)
    image_id = tokenizer.convert_tokens_to_ids(IMAGE)
    sizes = iter([image_tokens] * len(text) if isinstance(image_tokens, int) else image_tokens)
    ids: list[int] = []
    labels: list[int] = []
    for token, (start, end) in zip(encoded["input_ids"], encoded["offset_mapping"], strict=True):
        repeat = next(sizes) if token == image_id else 1
        supervised = token != image_id and end > start and any(first < end <= last for first, last in spans)
        ids += [token] * repeat
        labels += [token if supervised else IGNORED] * repeat
    if image_id in ids[max_length:]:
        raise Unsupervised(f"its images need more than max_length={max_length} tokens")
    full_length = len(ids)
    ids, labels = ids[:max_length], labels[:max_length]
    labels[:1] = [IGNORED]  # the first token is not predicted, so it must not count as supervised
    if all(label == IGNORED for label in labels):
        raise Unsupervised("no supervised token (empty answers, or all of them beyond max_length)")
    return Rendered(ids, labels, full_length)
