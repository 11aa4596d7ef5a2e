"""A request to the engine, the events it produces, and a blocking iterator over its text."""

from __future__ import annotations

import dataclasses
import queue
import threading
from collections.abc import Callable, Iterator
from typing import Literal

from transformers import PreTrainedTokenizerFast

from clips_mllm.talk.prompt import Prompt
from clips_mllm.talk.sampling import IncrementalDetokenizer, Sampling, TokenSampler
from vision_tower.common.errors import UserError

FinishReason = Literal["stop", "length", "cancelled"]


class TooLong(UserError):
    """Prompt and answer exceed the model's context."""


class QueueFull(RuntimeError):
    """The maximum number of requests is waiting."""


class Closed(RuntimeError):
    """The engine accepts no more requests."""


@dataclasses.dataclass(frozen=True)
class TextDelta:
    """The next part of the answer's text."""

    text: str


@dataclasses.dataclass(frozen=True)
class Done:
    """End of an answer."""

    reason: FinishReason
    prompt_tokens: int
    answer_tokens: int


@dataclasses.dataclass(frozen=True)
class Failed:
    """End of an answer by an error."""

    error: BaseException


Event = TextDelta | Done | Failed


class Request:
    """State of one answer. Only the engine's worker changes it; `cancel` may be called from any thread."""

    def __init__(
        self, prompt: Prompt, sampling: Sampling, emit: Callable[[Event], None], tokenizer: PreTrainedTokenizerFast
    ) -> None:
        self.prompt = prompt
        self.sampling = sampling
        self.emit = emit
        self.sampler = TokenSampler(sampling)
        self.output = IncrementalDetokenizer(tokenizer, sampling.stop)
        self.next_token = -1
        self.length = 0  # positions in the key-value cache; the last token of an answer is not among them
        self._cancelled = threading.Event()

    def cancel(self) -> None:
        """End the answer after the token that is being computed."""
        self._cancelled.set()

    @property
    def cancelled(self) -> bool:
        """True after `cancel`."""
        return self._cancelled.is_set()

    @property
    def cached_keys(self) -> list[int | str]:
        """Keys of the positions in the key-value cache."""
        return [*self.prompt.keys, *self.output.ids][: self.length]

    def finish(self, reason: FinishReason) -> None:
        """Emit the rest of the text, then Done."""
        if text := self.output.flush():
            self.emit(TextDelta(text))
        self.emit(Done(reason, len(self.prompt.ids), len(self.output.ids)))


class Answer:
    """Blocking iterator over the text of a request; `done` is set at its end. Raises the worker's errors.

    Args:
        submit: queues the request with the callback it is given.
    """

    def __init__(self, submit: Callable[[Callable[[Event], None]], Request]) -> None:
        self._events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        self.done: Done | None = None
        self.request = submit(self._events.put)

    def __iter__(self) -> Iterator[str]:
        while self.done is None:
            match self._events.get():
                case TextDelta(text):
                    yield text
                case Failed(error):
                    raise error
                case Done() as done:
                    self.done = done

    def stop(self) -> None:
        """End the answer early; text that was already computed is still yielded."""
        self.request.cancel()
