"""A conversation: turns, the images shown in them, and its form as a row of LLaVA JSON."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Generator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clips_mllm.data.llava_json import BadRow, to_example
from clips_mllm.prompts.conversation import IMAGE, Message
from clips_mllm.talk.prompt import InputImage
from vision_tower.common.errors import UserError

if TYPE_CHECKING:
    from clips_mllm.talk.answer import Answer
    from clips_mllm.talk.engine import Engine
    from clips_mllm.talk.sampling import Sampling

SPEAKERS = {"user": "human", "assistant": "gpt", "system": "system"}


def count_images(messages: list[Message]) -> int:
    """Placeholders in messages whose contents are lists of parts."""
    return sum(part["type"] == "image" for message in messages for part in message["content"])


def question(text: str, images: int) -> Message:
    """A question with its images before it."""
    return {"role": "user", "content": [{"type": "image"}] * images + [{"type": "text", "text": text}]}


def statement(role: str, text: str) -> Message:
    """What the model or the system says."""
    return {"role": role, "content": [{"type": "text", "text": text}]}


@dataclasses.dataclass(frozen=True)
class Fitted:
    """The end of a conversation that fits the context, and how many turns before it were left out."""

    messages: list[Message]
    images: list[InputImage]
    dropped: int


def fit(engine: Engine, messages: list[Message], images: list[InputImage], sampling: Sampling) -> Fitted:
    """Leave out the oldest whole turns, with their images, until prompt and answer fit; the system's words stay.

    Raises:
        TooLong: by the engine later, where the last question alone does not fit.
    """
    system = messages[:1] if messages and messages[0]["role"] == "system" else []
    turns, dropped = messages[len(system) :], 0
    while True:
        length = len(engine.prompt([*system, *turns], images).ids) + sampling.max_new_tokens
        later = [place for place, message in enumerate(turns) if message["role"] == "user" and place > 0]
        if length <= engine.context or not later:
            return Fitted([*system, *turns], images, dropped)
        gone, turns = turns[: later[0]], turns[later[0] :]
        images = images[count_images(gone) :]
        dropped += 1


def cut_notice(dropped: int) -> str:
    """Tells a person how many of the oldest turns the model no longer reads."""
    first = "first turn is" if dropped == 1 else f"first {dropped} turns are"
    return f"the conversation is longer than the model's context; its {first} left out, with the images shown there"


class Conversation:
    """Turns with an engine. Images added before a question belong to that question."""

    def __init__(self, engine: Engine, notice: Callable[[str], None] = lambda line: None) -> None:
        self.engine = engine
        self.notice = notice
        self.reset()

    def reset(self) -> None:
        """Forget everything said and shown."""
        self.system: str | None = None
        self.turns: list[Message] = []
        self.images: list[InputImage] = []
        self.waiting: list[InputImage] = []
        self.forgotten = 0
        self._answer: Answer | None = None
        self._stop_asked = False

    @property
    def messages(self) -> list[Message]:
        """All turns, after the system's words."""
        return [*([statement("system", self.system)] if self.system else []), *self.turns]

    def ask(self, text: str, sampling: Sampling) -> Generator[str, None, None]:
        """The answer in pieces, as they are generated; the turn is remembered once it is complete.

        `stop()`, Ctrl-C while waiting for a piece, or `close()` of the iterator ends the answer; what was said is
        remembered.
        """
        from clips_mllm.talk.answer import Answer

        self._answer, self._stop_asked = None, False
        shown = self.waiting
        asked = [*self.turns, question(text, len(shown))]
        fitted = fit(self.engine, self._prefixed(asked), [*self.images, *shown], sampling)
        self._tell_of_cut(fitted.dropped)
        prompt = self.engine.prompt(fitted.messages, fitted.images)
        answer = self._answer = Answer(self.engine, prompt, sampling)
        if self._stop_asked:  # before there was an answer to stop
            answer.stop()
        pieces: list[str] = []
        try:
            for piece in answer:
                pieces.append(piece)
                yield piece
        except (KeyboardInterrupt, GeneratorExit):
            answer.stop()
            pieces += answer  # the token that was being computed
            self._remember(asked, shown, pieces)
            raise
        self._remember(asked, shown, pieces)

    def stop(self) -> None:
        """End the answer that is being given. May be called by a signal's handler or another thread."""
        self._stop_asked = True
        if self._answer is not None:
            self._answer.stop()

    @property
    def stopped(self) -> bool:
        """Whether the last answer was ended early."""
        done = None if self._answer is None else self._answer.done
        return done is not None and done.reason == "cancelled"

    def _remember(self, asked: list[Message], shown: list[InputImage], pieces: list[str]) -> None:
        self.turns = [*asked, statement("assistant", "".join(pieces))]
        self.images, self.waiting = [*self.images, *shown], []

    def _prefixed(self, turns: list[Message]) -> list[Message]:
        return [*([statement("system", self.system)] if self.system else []), *turns]

    def _tell_of_cut(self, dropped: int) -> None:
        if dropped > self.forgotten:
            self.notice(cut_notice(dropped))
        self.forgotten = dropped

    def undo(self) -> str:
        """Take back the last question and its answer; the question's images wait again. Returns the question."""
        if not self.turns:
            raise UserError("nothing was said yet")
        asked = self.turns[-2]
        shown = count_images([asked])
        self.turns = self.turns[:-2]
        at = len(self.images) - shown
        self.images, self.waiting = self.images[:at], [*self.images[at:], *self.waiting]
        return text_of(asked)

    def to_row(self, name: str) -> dict[str, Any]:
        """A row of LLaVA JSON, without turns whose answer is empty: nothing can be learnt from those.

        Raises:
            UserError: nothing was answered, or an image is in no file.
        """
        kept: list[Message] = []
        files: list[str | None] = []
        images = iter(self.images)
        for asked, said in zip(self.turns[::2], self.turns[1::2], strict=True):
            shown = list(itertools.islice(images, count_images([asked])))
            if text_of(said).strip():
                kept += [asked, said]
                files += [image.file for image in shown]
        if not kept:
            raise UserError("nothing was answered yet, so there is nothing to save")
        row: dict[str, Any] = {"id": name}
        if files:
            row["image"] = files[0] if len(files) == 1 else files
        return row | {"conversations": [to_turn(message) for message in self._prefixed(kept)]}

    @property
    def unanswered(self) -> int:
        """Turns whose answer is empty."""
        return sum(not text_of(said).strip() for said in self.turns[1::2])

    def load_row(self, row: Any, folder: Path) -> None:
        """Take up a conversation; its images' paths are relative to `folder`.

        Raises:
            UserError: no row of LLaVA JSON, or an image that cannot be read.
        """
        from clips_mllm.talk.images import read_image

        try:
            example = to_example(row)
        except BadRow as error:
            raise UserError(f"no conversation in LLaVA's format ({error})", remedy="mend the file") from error
        messages = example.messages
        images = [read_image(folder / str(name)) for name in example.images]
        self.reset()
        if messages[0]["role"] == "system":
            self.system, messages = messages[0]["content"][0]["text"], messages[1:]
        if len(messages) % 2:
            messages = messages[:-1]  # a question that nobody answered
        self.turns, self.images = messages, images[: count_images(messages)]


def text_of(message: Message) -> str:
    """Its words, without its images."""
    return "".join(part["text"] for part in message["content"] if part["type"] == "text")


def to_turn(message: Message) -> dict[str, str]:
    """A message as LLaVA writes it."""
    parts = [IMAGE if part["type"] == "image" else part["text"] for part in message["content"]]
    return {"from": SPEAKERS[message["role"]], "value": "\n".join(parts)}
