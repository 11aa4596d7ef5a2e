"""What a chat of the page shows of turns, and which turn a shown message belongs to."""

from __future__ import annotations

import re
from typing import Any

import gradio as gr

from clips_mllm.talk.web.turns import Turn

# Gradio reads messages as HTML, even without Markdown. With a joiner, which nobody sees, they are text.
JOINER = "\u2060"
MARKS = re.compile(r"<(?=[a-zA-Z/!?])|&(?=#?\w+;)")


def as_text(text: str) -> str:
    """Text that a chat shows as it is, tags and all."""
    return MARKS.sub(lambda mark: mark[0] + JOINER, text)


def rendered(turns: list[Turn], model: int) -> list[dict[str, Any]]:
    """What a chat shows: images, question, answer, each a message of its own."""
    messages: list[dict[str, Any]] = []
    for turn in turns:
        messages += [{"role": "user", "content": {"path": file}} for file in turn.files]
        messages += [{"role": "user", "content": as_text(turn.text)}] if turn.text else []
        messages.append({"role": "assistant", "content": as_text(turn.answers[model])})
    return messages


def turn_of(turns: list[Turn], index: int | tuple[int, ...] | list[int]) -> int:
    """Which turn a message of a chat belongs to."""
    message = index if isinstance(index, int) else index[0]
    for place, turn in enumerate(turns):
        message -= len(turn.files) + bool(turn.text) + 1
        if message < 0:
            return place
    raise gr.Error("This message is gone.", print_exception=False)
