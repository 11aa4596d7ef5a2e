"""A conversation: its turns, its images, and its form as a row of LLaVA JSON."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

from clips_mllm.data.llava_json import BadRow, to_example
from clips_mllm.prompts.conversation import IMAGE, Message
from clips_mllm.talk.engine import Engine
from clips_mllm.talk.images import InputImage, read_image
from clips_mllm.talk.requests import Answer
from clips_mllm.talk.sampling import Sampling
from vision_tower.common.errors import UserError

SPEAKERS = {"user": "human", "assistant": "gpt", "system": "system"}  # role -> LLaVA's "from"


def user_message(text: str, images: int) -> Message:
    """Return a question with the placeholders of its images in front."""
    return {"role": "user", "content": [{"type": "image"}] * images + [{"type": "text", "text": text}]}


def text_message(role: str, text: str) -> Message:
    """Return a message of text only."""
    return {"role": role, "content": [{"type": "text", "text": text}]}


def text_of(message: Message) -> str:
    """Return the text of a message without its images."""
    return "".join(part["text"] for part in message["content"] if part["type"] == "text")


def count_images(messages: list[Message]) -> int:
    """Count the image placeholders."""
    return sum(part["type"] == "image" for message in messages for part in message["content"])


def to_llava_turn(message: Message) -> dict[str, str]:
    """Convert a message to an entry of LLaVA's `conversations`."""
    parts = [IMAGE if part["type"] == "image" else part["text"] for part in message["content"]]
    return {"from": SPEAKERS[message["role"]], "value": "\n".join(parts)}


@dataclasses.dataclass(frozen=True)
class TruncatedConversation:
    """The end of a conversation that fits the context; `dropped` counts the turns left out at its beginning."""

    messages: list[Message]
    images: list[InputImage]
    dropped: int


def truncate(
    engine: Engine, messages: list[Message], images: list[InputImage], sampling: Sampling
) -> TruncatedConversation:
    """Drop the oldest turns with their images until prompt and answer fit the context; keep the system prompt.

    If the last question alone does not fit, the engine raises TooLong later.
    """
    system = messages[:1] if messages and messages[0]["role"] == "system" else []
    turns, dropped = messages[len(system) :], 0
    while True:
        length = len(engine.prompt([*system, *turns], images).ids) + sampling.max_new_tokens
        later = [index for index, message in enumerate(turns) if message["role"] == "user" and index > 0]
        if length <= engine.context or not later:
            return TruncatedConversation([*system, *turns], images, dropped)
        images = images[count_images(turns[: later[0]]) :]
        turns = turns[later[0] :]
        dropped += 1


def truncation_notice(dropped: int) -> str:
    """Return a message for the user about turns that the model no longer reads."""
    turns = "first turn is" if dropped == 1 else f"first {dropped} turns are"
    return f"the conversation is longer than the model's context; its {turns} left out, with the images of these turns"


class Conversation:
    """Turns with an engine. Images added to `pending_images` belong to the next question.

    Args:
        notify: called with messages for the user.
        system: system prompt.
    """

    def __init__(
        self, engine: Engine, notify: Callable[[str], None] = lambda line: None, system: str | None = None
    ) -> None:
        self.engine = engine
        self.notify = notify
        self.system = system
        self.reset()

    def reset(self) -> None:
        """Remove all turns and images; the system prompt stays."""
        self.turns: list[Message] = []  # question, answer, question, answer, ...
        self.images: list[InputImage] = []
        self.pending_images: list[InputImage] = []
        self.dropped = 0
        self._answer: Answer | None = None
        self._stop_requested = False

    @property
    def messages(self) -> list[Message]:
        """All messages, including the system prompt."""
        return self._with_system(self.turns)

    def ask(self, text: str, sampling: Sampling) -> Generator[str, None, None]:
        """Yield the answer's text as it is generated; the turn is added at its end.

        `stop()` ends the answer early; the turn then contains the partial answer.
        """
        self._answer, self._stop_requested = None, False
        new_images = self.pending_images
        turns = [*self.turns, user_message(text, len(new_images))]
        truncated = truncate(self.engine, self._with_system(turns), [*self.images, *new_images], sampling)
        if truncated.dropped > self.dropped:
            self.notify(truncation_notice(truncated.dropped))
        self.dropped = truncated.dropped
        answer = self._answer = self.engine.answer(self.engine.prompt(truncated.messages, truncated.images), sampling)
        if self._stop_requested:  # `stop` was called before there was an answer
            answer.stop()
        parts: list[str] = []
        try:
            for part in answer:
                parts.append(part)
                yield part
        finally:
            answer.stop()  # has an effect only if the caller leaves early
        self.turns = [*turns, text_message("assistant", "".join(parts))]
        self.images, self.pending_images = [*self.images, *new_images], []

    def stop(self) -> None:
        """End the running answer. May be called by a signal handler or another thread."""
        self._stop_requested = True
        if self._answer is not None:
            self._answer.stop()

    @property
    def stopped(self) -> bool:
        """True if the last answer was ended early."""
        done = None if self._answer is None else self._answer.done
        return done is not None and done.reason == "cancelled"

    def _with_system(self, turns: list[Message]) -> list[Message]:
        return [*([text_message("system", self.system)] if self.system else []), *turns]

    def undo(self) -> str:
        """Remove the last turn and return its question; its images become pending again.

        Raises:
            UserError: there is no turn.
        """
        if not self.turns:
            raise UserError("there is no turn to undo", remedy="ask a question first")
        question, self.turns = self.turns[-2], self.turns[:-2]
        start = len(self.images) - count_images([question])
        self.images, self.pending_images = self.images[:start], [*self.images[start:], *self.pending_images]
        return text_of(question)

    def to_row(self, name: str) -> dict[str, Any]:
        """Return a row of LLaVA JSON, without turns with an empty answer: these have no label to train on.

        Raises:
            UserError: no turn is left.
        """
        kept: list[Message] = []
        files: list[str | None] = []
        images = iter(self.images)
        for question, answer in zip(self.turns[::2], self.turns[1::2], strict=True):
            turn_images = list(itertools.islice(images, count_images([question])))
            if text_of(answer).strip():
                kept += [question, answer]
                files += [image.file for image in turn_images]
        if not kept:
            raise UserError("there is no answer yet, so there is nothing to save", remedy="ask a question first")
        row: dict[str, Any] = {"id": name}
        if files:
            row["image"] = files[0] if len(files) == 1 else files
        return row | {"conversations": [to_llava_turn(message) for message in self._with_system(kept)]}

    @property
    def unanswered(self) -> int:
        """Number of turns with an empty answer."""
        return sum(not text_of(answer).strip() for answer in self.turns[1::2])

    def load_row(self, row: Any, folder: Path) -> None:
        """Replace the conversation by a row of LLaVA JSON; its image paths are relative to `folder`.

        Raises:
            UserError: malformed row, or an unreadable image.
        """
        try:
            example = to_example(row)
        except BadRow as error:
            raise UserError(f"not a conversation in LLaVA's format ({error})", remedy="correct the row") from error
        messages = example.messages
        images = [read_image(folder / str(name)) for name in example.images]
        self.reset()
        self.system = None
        if messages[0]["role"] == "system":
            self.system, messages = messages[0]["content"][0]["text"], messages[1:]
        if len(messages) % 2:
            messages = messages[:-1]  # a question without an answer
        self.turns, self.images = messages, images[: count_images(messages)]
