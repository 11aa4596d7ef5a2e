"""Find the answers in the text of chat templates without `{% generation %}` marks, such as those of most LLMs.

The conversation is rendered again with a unique mark in place of each answer. The text around the marks is the
template's own; if it does not reproduce the real text exactly, the conversation is refused. An answer's span begins at
the end of its prompt (the turns before, rendered with `add_generation_prompt`) and ends with the first special token
after the answer.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from clips_mllm.prompts.conversation import IMAGE, Message, Unsupervised

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


def marks_answers(template: str) -> bool:
    """Return True if the template marks answers."""
    return re.search(r"\{%-?\s*generation\s*-?%\}", template) is not None


def find_spans(
    messages: list[Message], template: str, tokenizer: PreTrainedTokenizerFast | None
) -> tuple[str, list[tuple[int, int]]]:
    """Return the text of a conversation, and the character spans of the answers.

    Raises:
        Unsupervised: the answers cannot be located exactly.
    """
    if tokenizer is None:
        raise ValueError("a template without generation marks needs the tokenizer, for its end tokens")
    text = _write(messages, template, tokenizer)
    turns = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
    marked = [
        {"role": "assistant", "content": _mark(index)} if index in turns else message
        for index, message in enumerate(messages)
    ]
    rest = _write(marked, template, tokenizer)
    end_tokens = re.compile("|".join(map(re.escape, special_tokens(tokenizer))) or r"(?!)")
    spans: list[tuple[int, int]] = []
    done = 0
    for turn in turns:
        before, mark, rest = rest.partition(_mark(turn))
        answer = _text(messages[turn])
        if not mark or not text.startswith(before + answer, done):
            raise Unsupervised(f"the template changes the text of turn {turn}, so its labels are unknown")
        begin = done + len(before)
        prompt = _write(messages[:turn], template, tokenizer, add_generation_prompt=True)
        if not text.startswith(prompt) or not done <= len(prompt) <= begin:
            raise Unsupervised(f"the conversation does not continue the template's prompt for turn {turn}")
        done = begin + len(answer)
        end = end_tokens.search(text, done)
        if end is None or end.end() > done + _up_to_mark(rest):
            raise Unsupervised(f"the template writes no end token after turn {turn}")
        spans.append((len(prompt), end.end()))
    if text[done:] != rest:
        raise Unsupervised("the template's text depends on the answers")
    return text, spans


def _write(messages: list[Message], template: str, tokenizer: PreTrainedTokenizerFast, **options: Any) -> str:
    from transformers.utils.chat_template_utils import render_jinja_template

    texts, _ = render_jinja_template([messages], chat_template=template, **tokenizer.special_tokens_map, **options)
    return texts[0]


def _mark(turn: int) -> str:
    """Return a mark of private-use characters, which neither conversations nor templates contain."""
    return f"\ue000{turn}\ue001"


def _up_to_mark(text: str) -> int:
    return len(text.partition("\ue000")[0])


def _text(message: Message) -> str:
    content = message["content"]
    return content if isinstance(content, str) else "".join(part["text"] for part in content)


def special_tokens(tokenizer: PreTrainedTokenizerFast) -> list[str]:
    """Return the tokenizer's special tokens except `<image>`, longest first."""
    added = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    return sorted((added | set(tokenizer.all_special_tokens)) - {IMAGE}, key=lambda piece: (-len(piece), piece))
