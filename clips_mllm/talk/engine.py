"""One worker that answers requests, several at once, token by token.

    submit(prompt) --queue--> prefill (what no kept prefix holds) --> batch, one token a step --> emit(event)

All computing happens in the worker's thread; whoever asks gets events by a callback.
"""

from __future__ import annotations

import collections
import dataclasses
import itertools
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, Literal, TypeVar

import torch
from transformers import LlavaNextProcessor
from transformers.modeling_outputs import BaseModelOutputWithPooling

from clips_mllm.model.checkpoint import Mllm
from clips_mllm.prompts.conversation import Message
from clips_mllm.talk.batch import Batch, Cursor
from clips_mllm.talk.prefixes import Features, Prefix, Prefixes, layers_of
from clips_mllm.talk.prompt import InputImage, Prompt, Shown, build_prompt
from clips_mllm.talk.sampling import Chooser, Sampling, TextStream
from vision_tower.common.errors import UserError

Result = TypeVar("Result")
Reason = Literal["stop", "length", "cancelled"]


class TooLong(UserError):
    """A prompt and its answer need more positions than the model has."""


class QueueFull(RuntimeError):
    """More requests wait than may."""


class Closed(RuntimeError):
    """The engine was closed before the answer was complete."""


@dataclasses.dataclass(frozen=True)
class Piece:
    """Some text of the answer."""

    text: str


@dataclasses.dataclass(frozen=True)
class Done:
    """The end of an answer."""

    reason: Reason
    prompt_tokens: int
    answer_tokens: int


@dataclasses.dataclass(frozen=True)
class Failed:
    """No more will come."""

    error: BaseException


Event = Piece | Done | Failed


class Request:
    """An answer in the making. `cancel` may be called from any thread."""

    def __init__(self, prompt: Prompt, sampling: Sampling, emit: Callable[[Event], None], stream: TextStream) -> None:
        self.prompt = prompt
        self.emit = emit
        self.sampling = sampling
        self.stream = stream
        self.chooser = Chooser(sampling)
        self.cancelled = threading.Event()
        self.cursor = Cursor(token=-1, length=0)

    def cancel(self) -> None:
        """End the answer after the token that is being computed."""
        self.cancelled.set()

    @property
    def keys(self) -> list[int | str]:
        """Positions read so far; the last token of an answer is not."""
        return [*self.prompt.keys, *self.stream.ids][: self.cursor.length]


class Engine:
    """A loaded model at work. Use as a context manager, or call `close`.

    Args:
        context: most positions of a prompt with its answer; the model's own if not given.
        max_batch_size: answers decoded together; others wait.
        max_waiting: requests that may wait while all rows are taken.
        remembered: positions of earlier conversations that are kept.
    """

    def __init__(
        self,
        mllm: Mllm,
        *,
        context: int | None = None,
        max_batch_size: int = 8,
        max_waiting: int = 64,
        remembered: int = 16_384,
    ) -> None:
        own = mllm.model.config.text_config.max_position_embeddings
        self.mllm = mllm
        self.context = own if context is None else min(context, own)
        self.max_batch_size = max_batch_size
        self.max_waiting = max_waiting
        self.features = Features(self._encode)
        self.prefixes = Prefixes(remembered)
        eos = mllm.model.generation_config.eos_token_id
        self.ends = set(eos) if isinstance(eos, list) else {eos}
        self._waiting: collections.deque[Request | Callable[[], None]] = collections.deque()
        self._changed = threading.Condition()
        self._closing = False
        self._ended = False  # closed, and out of patience
        self._rows: list[Request] = []
        self._batch = Batch(mllm.model)
        self._worker = threading.Thread(target=self._work, name="engine", daemon=True)
        self._worker.start()

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def prompt(self, messages: list[Message], images: list[InputImage]) -> Prompt:
        """The positions of a conversation whose next turn is the model's."""
        return build_prompt(self.mllm.processor, messages, images)

    def submit(self, prompt: Prompt, sampling: Sampling, emit: Callable[[Event], None]) -> Request:
        """Queue a request; `emit` is called from the worker's thread with pieces, then once with Done or Failed.

        Raises:
            TooLong, QueueFull, Closed.
        """
        needed = len(prompt.ids) + sampling.max_new_tokens
        if needed > self.context:
            raise TooLong(
                f"{len(prompt.ids)} tokens of prompt and {sampling.max_new_tokens} of answer are more than the context "
                f"of {self.context}; shorten the conversation or the answer (max_new_tokens)"
            )
        request = Request(prompt, sampling, emit, TextStream(self.mllm.tokenizer, sampling.stop))
        self._queue(request)
        return request

    def run(self, job: Callable[[], Result]) -> Result:
        """Call `job` in the worker's thread between two tokens, and wait for what it returns."""
        future: Future[Result] = Future()

        def work() -> None:
            try:
                future.set_result(job())
            except BaseException as error:
                future.set_exception(error)

        self._queue(work)
        return future.result()

    def close(self, patience: float = 0.0) -> None:
        """Take no more; give running answers `patience` seconds, then end them."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._worker.join(patience)
        self._ended = True
        self._worker.join()

    @property
    def load(self) -> tuple[int, int]:
        """Answers in the making, and requests that wait."""
        return len(self._rows), len(self._waiting)

    @property
    def full(self) -> bool:
        """Whether one more request would be refused. Newcomers find a row one after the other; till then they wait."""
        return len(self._rows) + len(self._waiting) >= self.max_batch_size + self.max_waiting

    def _queue(self, item: Request | Callable[[], None]) -> None:
        with self._changed:
            if self._closing:
                raise Closed("shutting down")
            if self.full:
                raise QueueFull(f"{len(self._waiting)} requests are waiting")
            self._waiting.append(item)
            self._changed.notify()

    @torch.inference_mode()
    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._rows or self._closing)
                if self._closing and not self._waiting and not self._rows:
                    return
                # One newcomer between two tokens: those who are being answered do not stand still for a whole queue.
                item = self._waiting.popleft() if self._waiting and len(self._rows) < self.max_batch_size else None
            if isinstance(item, Request):
                self._admit(item)
            elif item is not None:
                item()
            if self._rows:
                self._step()

    def _admit(self, request: Request) -> None:
        """Read a prompt, choose the first token, and let the row join."""
        try:
            if self._ended or request.cancelled.is_set():
                request.emit(Done("cancelled", len(request.prompt.ids), 0))
                return
            cache, known = self.prefixes.longest(request.prompt)
            logits = self.read(request.prompt, cache, known)
            request.cursor.length = len(request.prompt.ids)
            layers = layers_of(cache)
            if self._advance(request, logits):
                self.prefixes.keep(Prefix(request.keys, layers))
            else:
                self._batch.add(layers)
                self._rows.append(request)
        except Exception as error:
            request.emit(Failed(error))
            self._make_room(error)

    def read(self, prompt: Prompt, cache: Any, known: int) -> torch.Tensor:
        """Read a prompt from position `known` on into `cache`; logits (vocabulary) of the next token."""
        new = [image for image, start in zip(prompt.images, prompt.starts, strict=True) if start >= known]
        shown = {"image": BaseModelOutputWithPooling(pooler_output=self.features.of(new))} if new else None
        out = self.mllm.model(
            input_ids=torch.tensor([prompt.ids[known:]], device=self.mllm.device),
            past_key_values=cache,
            mm_encoder_outputs=shown,
            logits_to_keep=1,
        )
        return out.logits[0, -1]

    def _step(self) -> None:
        try:
            logits = self._batch.step([request.cursor for request in self._rows])
            for request in self._rows:
                request.cursor.length += 1
            ended = [self._advance_alone(request, row) for request, row in zip(self._rows, logits, strict=True)]
            if any(ended):
                for place in itertools.compress(range(len(ended)), ended):
                    self._remember(place)
                staying = [place for place, end in enumerate(ended) if not end]
                self._rows = [self._rows[place] for place in staying]
                self._batch.keep(staying)
        except Exception as error:  # such as memory: those who were being answered are told, and the next ones served
            failed, self._rows, self._batch = self._rows, [], Batch(self.mllm.model)
            for request in failed:
                request.emit(Failed(error))
            self._make_room(error)

    def _remember(self, place: int) -> None:
        """Keep a row that has ended, where memory allows a copy."""
        try:
            self.prefixes.keep(Prefix(self._rows[place].keys, self._batch.row(place)))
        except torch.OutOfMemoryError as error:
            self._make_room(error)

    def _make_room(self, error: Exception) -> None:
        """After a GPU ran out of memory: what is kept for later turns goes, or the next prompt would fail as well."""
        if isinstance(error, torch.OutOfMemoryError):
            self.prefixes.kept.clear()
            self.features.kept.clear()
            torch.cuda.empty_cache()

    def _advance_alone(self, request: Request, logits: torch.Tensor) -> bool:
        """`_advance`; what fails in one answer, such as numbers that cannot be drawn from, is not the others' end."""
        try:
            return self._advance(request, logits)
        except Exception as error:
            request.emit(Failed(error))
            return True

    def _advance(self, request: Request, logits: torch.Tensor) -> bool:
        """Choose a token and tell of it; whether the answer has ended."""
        stream = request.stream
        if self._ended or request.cancelled.is_set():
            return self._end(request, "cancelled")
        token = request.chooser.choose(request.prompt.ids + stream.ids, logits)
        if token in self.ends:
            return self._end(request, "stop")
        request.cursor.token = token
        text = stream.push(token)
        if text:
            request.emit(Piece(text))
        if stream.stopped:
            return self._end(request, "stop")
        if len(stream.ids) >= request.sampling.max_new_tokens:
            return self._end(request, "length")
        return False

    def _end(self, request: Request, reason: Reason) -> bool:
        text = request.stream.end()
        if text:
            request.emit(Piece(text))
        request.emit(Done(reason, len(request.prompt.ids), len(request.stream.ids)))
        return True

    def _encode(self, images: list[Shown]) -> list[torch.Tensor]:
        """Projected patches of each image, (patches, width)."""
        every = [image.pixels for image in images]
        if isinstance(self.mllm.processor, LlavaNextProcessor):  # images differ in how many tiles they have
            pixels, sizes = torch.cat(every), {"image_sizes": torch.tensor([image.size for image in images])}
        else:
            pixels, sizes = torch.stack(every), {}
        pixels = pixels.to(self.mllm.device, self.mllm.model.dtype)
        return list(self.mllm.model.get_image_features(pixel_values=pixels, return_dict=True, **sizes).pooler_output)
