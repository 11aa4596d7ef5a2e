"""The asker's side of a request: its text, piece by piece, in the thread of whoever asks."""

from __future__ import annotations

import queue
from collections.abc import Iterator

from clips_mllm.talk.engine import Done, Engine, Event, Failed, Piece
from clips_mllm.talk.prompt import Prompt
from clips_mllm.talk.sampling import Sampling


class Answer:
    """Iterates over a request's text in the caller's thread; `done` holds its end afterwards.

    Raises, while iterating, what the worker raised.
    """

    def __init__(self, engine: Engine, prompt: Prompt, sampling: Sampling) -> None:
        self._events: list[Event] = []
        self._taken = 0
        self._news: queue.SimpleQueue[None] = queue.SimpleQueue()
        self.done: Done | None = None
        self._request = engine.submit(prompt, sampling, self._put)

    def _put(self, event: Event) -> None:
        self._events.append(event)
        self._news.put(None)

    def __iter__(self) -> Iterator[str]:
        """Ctrl-C may strike anywhere in here: an event counts as taken only once it has been dealt with.

        Nor is there a lock that it could leave behind; news too many, of events that were taken already, do no harm.
        """
        while self.done is None:
            if self._taken == len(self._events):
                self._news.get()
                continue
            match self._events[self._taken]:
                case Piece(text):
                    self._taken += 1
                    yield text
                case Failed(error):
                    raise error
                case Done() as done:
                    self.done = done

    def stop(self) -> None:
        """End it early; what was computed still comes."""
        self._request.cancel()
