"""Turns of a browser session, with the answers of one model or of two side by side."""

from __future__ import annotations

import dataclasses
import json
import queue
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from clips_mllm.prompts.conversation import Message
from clips_mllm.talk.conversation import TruncatedConversation, text_message, to_llava_turn, truncate, user_message
from clips_mllm.talk.engine import Engine
from clips_mllm.talk.images import InputImage
from clips_mllm.talk.requests import Done, Event, Failed, TextDelta
from clips_mllm.talk.sampling import Sampling
from clips_mllm.talk.web.toasts import toast
from vision_tower.common.hashes import value_hash

# Gradio renders messages as HTML even without Markdown; an invisible word joiner (U+2060) after these characters
# makes them text.
JOINER = "\u2060"
HTML_SYNTAX = re.compile(r"<(?=[a-zA-Z/!?])|&(?=#?\w+;)")


@dataclasses.dataclass(frozen=True)
class Turn:
    """A question with its images, and the answer of each model so far.

    Attributes:
        files: image files that the browser displays.
        dropped: for each model, the number of earlier turns left out because of its context.
        system: system prompt of this turn.
    """

    text: str
    images: tuple[InputImage, ...]
    files: tuple[str, ...]
    answers: tuple[str, ...] = ()
    dropped: tuple[int, ...] = ()
    system: str = ""


def chat_messages(turns: list[Turn], model: int) -> list[dict[str, Any]]:
    """Return the turns as messages of a Gradio chat: one per image, question and answer."""
    messages: list[dict[str, Any]] = []
    for turn in turns:
        messages += [{"role": "user", "content": {"path": file}} for file in turn.files]
        messages += [{"role": "user", "content": as_plain_text(turn.text)}] if turn.text else []
        messages.append({"role": "assistant", "content": as_plain_text(turn.answers[model])})
    return messages


def as_plain_text(text: str) -> str:
    """Return text that a Gradio chat displays literally, including tags."""
    return HTML_SYNTAX.sub(lambda match: match[0] + JOINER, text)


def turn_index(turns: list[Turn], message_index: int | tuple[int, ...] | list[int]) -> int:
    """Return the index of the turn that a message of the chat belongs to."""
    message = message_index if isinstance(message_index, int) else message_index[0]
    for index, turn in enumerate(turns):
        message -= len(turn.files) + bool(turn.text) + 1
        if message < 0:
            return index
    raise toast("This message does not exist any more.")


def model_messages(turns: list[Turn], model: int, system: str) -> tuple[list[Message], list[InputImage]]:
    """Return the conversation of one model."""
    messages = [text_message("system", system)] if system else []
    for turn in turns:
        messages += [user_message(turn.text, len(turn.images)), text_message("assistant", turn.answers[model])]
    return messages, [image for turn in turns for image in turn.images]


def model_input(
    engine: Engine, turns: list[Turn], model: int, system: str, sampling: Sampling
) -> TruncatedConversation:
    """Return one model's conversation up to the last question, truncated to its context."""
    messages, images = model_messages(turns, model, system)
    return truncate(engine, messages[:-1], images, sampling)


def generate(engines: list[Engine], turns: list[Turn], system: str, sampling: Sampling) -> Iterator[Turn]:
    """Yield the last turn with growing answers of all models. Closing the iterator cancels them.

    Raises:
        The errors of the engines.
    """
    events: queue.SimpleQueue[tuple[int, Event]] = queue.SimpleQueue()
    turn = dataclasses.replace(turns[-1], answers=("",) * len(engines), system=system)
    inputs = [model_input(engine, [*turns[:-1], turn], model, system, sampling) for model, engine in enumerate(engines)]
    turn = dataclasses.replace(turn, dropped=tuple(truncated.dropped for truncated in inputs))
    requests = []
    try:
        for model, (engine, truncated) in enumerate(zip(engines, inputs, strict=True)):
            prompt = engine.prompt(truncated.messages, truncated.images)

            def emit(event: Event, model: int = model) -> None:
                events.put((model, event))

            requests.append(engine.submit(prompt, sampling, emit))
        unfinished = len(requests)
        while unfinished:
            model, event = events.get()
            match event:
                case TextDelta(text):
                    answers = list(turn.answers)
                    answers[model] += text
                    turn = dataclasses.replace(turn, answers=tuple(answers))
                    yield turn
                case Failed(error):
                    raise error
                case Done():
                    unfinished -= 1
        yield turn
    finally:
        for request in requests:
            request.cancel()


def append_feedback(file: Path, turns: list[Turn], model: int, name: str, liked: bool) -> None:
    """Append a rated conversation as a row of LLaVA JSONL; its images are saved in a folder next to the file.

    A conversation that is rated again gets the same id; its last row is valid.
    """
    messages, images = model_messages(turns, model, turns[-1].system)
    folder = file.with_suffix("")
    names = []
    for image in images:
        folder.mkdir(parents=True, exist_ok=True)
        names.append(f"{folder.name}/{image.key[:16]}.png")
        if not (file.parent / names[-1]).exists():
            image.image.save(file.parent / names[-1])
    conversation = [to_llava_turn(message) for message in messages]
    row: dict[str, Any] = {"id": f"{file.stem}-{value_hash([names, conversation, name])[:16]}"}
    if names:
        row["image"] = names[0] if len(names) == 1 else names
    row |= {"conversations": conversation, "model": name, "liked": liked}
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("a", encoding="utf-8") as out:
        out.write(json.dumps(row, ensure_ascii=False) + "\n")
