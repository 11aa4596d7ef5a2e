"""Inference engine: one worker thread that decodes several requests together, token by token.

    submit(prompt) --queue--> prefill (positions after the longest cached prefix) --> batch, one token per step --> emit

All computation happens in the worker's thread; callers receive events by callback.
"""

from __future__ import annotations

import collections
import itertools
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, TypeVar

import torch
from transformers import LlavaNextProcessor

from clips_mllm.model.checkpoint import Mllm
from clips_mllm.model.image_features import FeatureCache, encoder_output
from clips_mllm.prompts.conversation import Message
from clips_mllm.talk.images import InputImage, PreparedImage
from clips_mllm.talk.kv_cache import DecodingBatch, Prefix, PrefixCache, layers_of
from clips_mllm.talk.prompt import Prompt, build_prompt
from clips_mllm.talk.requests import Answer, Closed, Event, Failed, QueueFull, Request, TextDelta, TooLong
from clips_mllm.talk.sampling import Sampling

Result = TypeVar("Result")

FEATURE_CACHE_BYTES = 2**28  # about 50 images of LLaVA-1.5 7B in bfloat16 (576 x 4,096)


class Engine:
    """A loaded model with its worker. Use it as a context manager, or call `close`.

    Args:
        context: maximum positions of a prompt with its answer; default: the model's own limit.
        max_batch_size: maximum number of answers decoded together.
        max_waiting: maximum number of requests waiting for a row of the batch.
        max_cached_positions: capacity of the prefix cache.
    """

    def __init__(
        self,
        mllm: Mllm,
        *,
        context: int | None = None,
        max_batch_size: int = 8,
        max_waiting: int = 64,
        max_cached_positions: int = 16_384,
    ) -> None:
        model_limit = mllm.model.config.text_config.max_position_embeddings
        self.mllm = mllm
        self.context = model_limit if context is None else min(context, model_limit)
        self.max_batch_size = max_batch_size
        self.max_waiting = max_waiting
        self.features = FeatureCache(FEATURE_CACHE_BYTES)
        self.prefixes = PrefixCache(max_cached_positions)
        eos = mllm.model.generation_config.eos_token_id
        self.eos_tokens = set(eos) if isinstance(eos, list) else {eos}
        self._waiting: collections.deque[Request | Callable[[], None]] = collections.deque()
        self._changed = threading.Condition()
        self._closing = False
        self._aborting = False  # closed, and the time limit of running answers has passed
        self._running: list[Request] = []  # in the order of the batch's rows
        self._batch = DecodingBatch(mllm.model)
        self._worker = threading.Thread(target=self._work, name="engine", daemon=True)
        self._worker.start()

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def prompt(self, messages: list[Message], images: list[InputImage]) -> Prompt:
        """Render a conversation whose next turn is the model's."""
        return build_prompt(self.mllm.processor, messages, images)

    def submit(self, prompt: Prompt, sampling: Sampling, emit: Callable[[Event], None]) -> Request:
        """Queue a request. `emit` is called from the worker's thread with TextDelta, then once with Done or Failed.

        Raises:
            TooLong, QueueFull, Closed.
        """
        if len(prompt.ids) + sampling.max_new_tokens > self.context:
            raise TooLong(
                f"{len(prompt.ids)} prompt tokens and {sampling.max_new_tokens} answer tokens exceed the context of "
                f"{self.context} tokens",
                remedy="shorten the conversation or reduce max_new_tokens",
            )
        request = Request(prompt, sampling, emit, self.mllm.tokenizer)
        self._enqueue(request)
        return request

    def answer(self, prompt: Prompt, sampling: Sampling) -> Answer:
        """Queue a request and return an iterator over its text. Raises like `submit`."""
        return Answer(lambda emit: self.submit(prompt, sampling, emit))

    def run(self, job: Callable[[], Result]) -> Result:
        """Call `job` in the worker's thread between two tokens, and return its result."""
        future: Future[Result] = Future()

        def work() -> None:
            try:
                future.set_result(job())
            except BaseException as error:
                future.set_exception(error)

        self._enqueue(work)
        return future.result()

    def close(self, timeout: float = 0.0) -> None:
        """Accept no more requests; cancel those that have not finished after `timeout` seconds."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._worker.join(timeout)
        self._aborting = True
        self._worker.join()

    @property
    def load(self) -> tuple[int, int]:
        """Numbers of running and of waiting requests."""
        return len(self._running), len(self._waiting)

    @property
    def full(self) -> bool:
        """True if one more request would be rejected.

        The worker admits one request per step, so free rows of the batch count as places in the queue.
        """
        return sum(self.load) >= self.max_batch_size + self.max_waiting

    def _enqueue(self, item: Request | Callable[[], None]) -> None:
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
                self._changed.wait_for(lambda: self._waiting or self._running or self._closing)
                if self._closing and not self._waiting and not self._running:
                    return
                # One prefill per step, so that running answers do not stall while a queue is admitted.
                item = self._waiting.popleft() if self._waiting and len(self._running) < self.max_batch_size else None
            if isinstance(item, Request):
                self._admit(item)
            elif item is not None:
                item()
            if self._running:
                self._step()

    def _admit(self, request: Request) -> None:
        """Prefill a request, sample its first token, and add it to the batch."""
        try:
            if self._aborting or request.cancelled:
                request.finish("cancelled")
                return
            cache, known = self.prefixes.longest(request.prompt)
            logits = self.read(request.prompt, cache, known)
            request.length = len(request.prompt.ids)
            layers = layers_of(cache)
            if self._advance(request, logits):
                self.prefixes.add(Prefix(request.cached_keys, layers))
            else:
                self._batch.add(layers)
                self._running.append(request)
        except Exception as error:
            request.emit(Failed(error))
            self._free_memory(error)

    def read(self, prompt: Prompt, cache: Any, known: int) -> torch.Tensor:
        """Read a prompt from position `known` into `cache`; return the logits (vocabulary) of the next token."""
        new = [image for image, start in zip(prompt.images, prompt.starts, strict=True) if start >= known]
        out = self.mllm.model(
            input_ids=torch.tensor([prompt.ids[known:]], device=self.mllm.device),
            past_key_values=cache,
            mm_encoder_outputs={"image": encoder_output(self._image_features(new))} if new else None,
            logits_to_keep=1,
        )
        return out.logits[0, -1]

    def _step(self) -> None:
        """Decode one token of each running answer, and remove those that ended."""
        try:
            logits = self._batch.step(
                [request.next_token for request in self._running], [request.length for request in self._running]
            )
            for request in self._running:
                request.length += 1
            ended = [self._advance_safely(request, row) for request, row in zip(self._running, logits, strict=True)]
            if any(ended):
                for index in itertools.compress(range(len(ended)), ended):
                    self._cache_prefix(index)
                staying = [index for index, end in enumerate(ended) if not end]
                self._running = [self._running[index] for index in staying]
                self._batch.keep(staying)
        except Exception as error:  # such as out of memory: all running answers fail, waiting ones are still served
            failed, self._running, self._batch = self._running, [], DecodingBatch(self.mllm.model)
            for request in failed:
                request.emit(Failed(error))
            self._free_memory(error)

    def _cache_prefix(self, index: int) -> None:
        """Add a finished row to the prefix cache, if there is memory for a copy."""
        try:
            self.prefixes.add(Prefix(self._running[index].cached_keys, self._batch.row(index)))
        except torch.OutOfMemoryError as error:
            self._free_memory(error)

    def _free_memory(self, error: Exception) -> None:
        """After a GPU out-of-memory error, clear the prefix cache; otherwise the next prompt would fail as well."""
        if isinstance(error, torch.OutOfMemoryError):
            self.prefixes.entries.clear()
            torch.cuda.empty_cache()

    def _advance_safely(self, request: Request, logits: torch.Tensor) -> bool:
        """Call `_advance`; an error (such as NaN probabilities) ends this answer only."""
        try:
            return self._advance(request, logits)
        except Exception as error:
            request.emit(Failed(error))
            return True

    def _advance(self, request: Request, logits: torch.Tensor) -> bool:
        """Sample a token and emit its text. Return True if the answer has ended."""
        output = request.output
        if self._aborting or request.cancelled:
            request.finish("cancelled")
            return True
        token = request.sampler.sample(request.prompt.ids + output.ids, logits)
        if token in self.eos_tokens:
            request.finish("stop")
            return True
        request.next_token = token
        if text := output.push(token):
            request.emit(TextDelta(text))
        if output.stopped:
            request.finish("stop")
            return True
        if len(output.ids) >= request.sampling.max_new_tokens:
            request.finish("length")
            return True
        return False

    def _image_features(self, images: list[PreparedImage]) -> list[torch.Tensor]:
        """Return the projected patches of each image, (patches, width)."""
        by_key = {image.key: image for image in images}
        features = self.features.get_or_encode(
            list(by_key), lambda keys: self._encode([by_key[key] for key in keys]), self.mllm.device
        )
        return [features[image.key] for image in images]

    def _encode(self, images: list[PreparedImage]) -> list[torch.Tensor]:
        """Run tower and projector on a batch of images."""
        inputs = [image.pixels for image in images]
        if isinstance(self.mllm.processor, LlavaNextProcessor):  # the number of tiles differs
            pixels, sizes = torch.cat(inputs), {"image_sizes": torch.tensor([image.size for image in images])}
        else:
            pixels, sizes = torch.stack(inputs), {}
        pixels = pixels.to(self.mllm.device, self.mllm.model.dtype)
        return list(self.mllm.model.get_image_features(pixel_values=pixels, return_dict=True, **sizes).pooler_output)
