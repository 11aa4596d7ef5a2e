"""Where the assistant speaks, for chat templates that do not mark it, as most LLMs' own do not.

The conversation is rendered once more with a unique mark in place of every answer. Around the marks stands what the
template itself writes; where the real text is not exactly that with the answers in it, the conversation is refused. An
answer's span begins where the prompt for it ends (what `add_generation_prompt` renders from the turns before) and ends
with the first special token after the answer.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from clips_mllm.prompts.conversation import IMAGE, Message, Unsupervised

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


def marks_answers(template: str) -> bool:
    """Whether a template marks what the assistant says."""
    return re.search(r"\{%-?\s*generation\s*-?%\}", template) is not None


def find_spans(
    messages: list[Message], template: str, tokenizer: PreTrainedTokenizerFast | None
) -> tuple[str, list[tuple[int, int]]]:
    """The prompt as text, and the character spans that the assistant says.

    Raises:
        Unsupervised: the template does not let them be told exactly.
    """
    if tokenizer is None:
        raise ValueError("a template without generation marks needs the tokenizer, which knows the end tokens")
    text = _write(messages, template, tokenizer)
    turns = [at for at, message in enumerate(messages) if message["role"] == "assistant"]
    marked = [
        {"role": "assistant", "content": _mark(at)} if at in turns else message for at, message in enumerate(messages)
    ]
    rest = _write(marked, template, tokenizer)
    end_tokens = re.compile("|".join(map(re.escape, special_pieces(tokenizer))) or r"(?!)")
    spans: list[tuple[int, int]] = []
    done = 0
    for at in turns:
        before, found, rest = rest.partition(_mark(at))
        answer = _text(messages[at])
        if not found or not text.startswith(before + answer, done):
            raise Unsupervised(f"the template changes turn {at}, so its labels cannot be told")
        begin = done + len(before)
        prompt = _write(messages[:at], template, tokenizer, add_generation_prompt=True)
        if not text.startswith(prompt) or not done <= len(prompt) <= begin:
            raise Unsupervised(f"the template's prompt for turn {at} is not how the conversation goes on")
        done = begin + len(answer)
        end = end_tokens.search(text, done)
        if end is None or end.end() > done + _up_to_mark(rest):
            raise Unsupervised(f"the template writes no end token after turn {at}")
        spans.append((len(prompt), end.end()))
    if text[done:] != rest:
        raise Unsupervised("the template's text depends on the answers")
    return text, spans


def _write(messages: list[Message], template: str, tokenizer: PreTrainedTokenizerFast, **options: Any) -> str:
    from transformers.utils.chat_template_utils import render_jinja_template

    texts, _ = render_jinja_template([messages], chat_template=template, **tokenizer.special_tokens_map, **options)
    return texts[0]


def _mark(turn: int) -> str:
    """Private-use characters: in no conversation, and no template's business."""
    return f"\ue000{turn}\ue001"


def _up_to_mark(text: str) -> int:
    return len(text.partition("\ue000")[0])


def _text(message: Message) -> str:
    content = message["content"]
    return content if isinstance(content, str) else "".join(part["text"] for part in content)


def special_pieces(tokenizer: PreTrainedTokenizerFast) -> list[str]:
    """The tokenizer's special pieces but `<image>`, longest first."""
    added = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    return sorted((added | set(tokenizer.all_special_tokens)) - {IMAGE}, key=lambda piece: (-len(piece), piece))
