"""From a conversation to ids and labels, in one pass.

    messages --Jinja template--> text + spans of the assistant's own words --one tokenizer call--> ids, labels

The Jinja template is the only definition of a prompt: training renders with it, and the checkpoint carries it, so chat,
lmms-eval and servers render the same bytes. `{% generation %}` marks what the assistant says, with its end token. The
whole text is tokenized once, as it will be when the model is used, and a token is supervised where it ends in a marked
span; nothing is re-tokenized to find an offset, so no tokenizer can make prompt and labels disagree.
"""

from __future__ import annotations

import dataclasses
import functools
from importlib import resources
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

IGNORED = -100
IMAGE = "<image>"
TemplateName = Literal["plain", "chatml", "llama_3", "vicuna_v1"]
Message = dict[str, Any]


class Unsupervised(ValueError):
    """A sample without a single supervised token, or whose pictures do not fit the context."""


@dataclasses.dataclass(frozen=True)
class Rendered:
    """Token ids with `<image>` expanded, and labels that are `IGNORED` wherever nothing is learnt."""

    ids: list[int]
    labels: list[int]


@functools.cache
def load_template(name: TemplateName) -> str:
    """The Jinja text of a template."""
    return (resources.files("clips_mllm") / "templates" / f"{name}.jinja").read_text().rstrip("\n")


def render_text(messages: list[Message], template: str) -> tuple[str, list[tuple[int, int]]]:
    """The prompt as text, and the character spans that the assistant says."""
    from transformers.utils.chat_template_utils import render_jinja_template

    texts, spans = render_jinja_template([messages], chat_template=template, return_assistant_tokens_mask=True)
    return texts[0], [(start, end) for start, end in spans[0]]


def render(
    messages: list[Message],
    *,
    template: str,
    tokenizer: PreTrainedTokenizerFast,
    image_tokens: int,
    max_length: int,
) -> Rendered:
    """Ids and labels of one conversation, cut to `max_length`.

    Args:
        messages: `{"role", "content"}`; content is a string or parts `{"type": "text" | "image", ...}`.
        template: Jinja text.
        image_tokens: positions that one picture takes.
    Raises:
        Unsupervised: nothing is left to learn, or the cut goes through a picture.
    """
    text, spans = render_text(messages, template)
    encoded = tokenizer(text, return_offsets_mapping=True, return_attention_mask=False)
    image_id = tokenizer.convert_tokens_to_ids(IMAGE)
    ids: list[int] = []
    labels: list[int] = []
    for token, (start, end) in zip(encoded["input_ids"], encoded["offset_mapping"], strict=True):
        repeat = image_tokens if token == image_id else 1
        spoken = token != image_id and end > start and any(first < end <= last for first, last in spans)
        ids += [token] * repeat
        labels += [token if spoken else IGNORED] * repeat
    if image_id in ids[max_length:]:
        raise Unsupervised(f"its pictures need more than max_length={max_length} tokens")
    ids, labels = ids[:max_length], labels[:max_length]
    labels[:1] = [IGNORED]  # nothing predicts the first token, so it must not be counted as learnt
    if all(label == IGNORED for label in labels):
        raise Unsupervised("no supervised token (empty answers, or all of them beyond max_length)")
    return Rendered(ids, labels)
