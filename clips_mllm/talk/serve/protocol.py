"""OpenAI's chat completions: requests checked and read, answers and errors written."""

from __future__ import annotations

import time
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from clips_mllm.prompts.conversation import Message
from clips_mllm.talk.engine import Done
from clips_mllm.talk.images import Refused, decode_limited
from clips_mllm.talk.limits import BadRequest, Limits
from clips_mllm.talk.prompt import InputImage
from clips_mllm.talk.sampling import Sampling
from clips_mllm.talk.serve.remote import image_bytes
from vision_tower.common.errors import UserError


class Strict(BaseModel):
    """Refuses what it does not know, instead of quietly answering something else."""

    model_config = ConfigDict(extra="forbid")

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, given: Any) -> Any:
        """A null asks for nothing, whatever its name; clients that write all fields of a message back send many."""
        return {name: value for name, value in given.items() if value is not None} if isinstance(given, dict) else given


class ImageUrl(Strict):
    url: str
    detail: str | None = None  # accepted and ignored: the model has one resolution


class ImagePart(Strict):
    type: Literal["image_url"]
    image_url: ImageUrl


class TextPart(Strict):
    type: Literal["text"]
    text: str


Part = Annotated[ImagePart | TextPart, Field(discriminator="type")]


class ChatMessage(Strict):
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[Part]
    name: str | None = None
    annotations: list[Any] | None = Field(None, max_length=0)  # as clients send an earlier answer back
    tool_calls: list[Any] | None = Field(None, max_length=0)

    @model_validator(mode="before")
    @classmethod
    def _silent(cls, given: Any) -> Any:
        """An answer may have been empty."""
        if isinstance(given, dict) and given.get("role") == "assistant" and given.get("content") is None:
            return given | {"content": ""}
        return given


class StreamOptions(Strict):
    include_usage: bool = False


class PlainText(Strict):
    type: Literal["text"]


class ChatRequest(Strict):
    """The fields of OpenAI's that are honoured, or have no effect on the answer."""

    model: str
    messages: list[ChatMessage] = Field(min_length=1)
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    seed: int | None = Field(None, ge=0, lt=2**63)
    stop: str | list[str] | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    n: Literal[1] = 1
    frequency_penalty: Literal[0] = 0
    presence_penalty: Literal[0] = 0
    logprobs: Literal[False] | None = None
    response_format: PlainText | None = None
    tools: list[Any] | None = Field(None, max_length=0)
    tool_choice: Literal["none", "auto"] | None = None
    parallel_tool_calls: bool | None = None
    user: str | None = None
    metadata: dict[str, str] | None = None
    store: bool | None = None

    def sampling(self, limits: Limits, room: int) -> Sampling:
        """How to draw the answer, `room` tokens before the context ends. Raises BadRequest where it may not be so."""
        tokens = self.max_completion_tokens or self.max_tokens or max(1, min(256, limits.new_tokens, room))
        if tokens > limits.new_tokens:
            raise BadRequest(f"max_tokens: at most {limits.new_tokens} here, {tokens} were asked for")
        stops = [self.stop] if isinstance(self.stop, str) else self.stop or []
        if len(stops) > 4 or not all(0 < len(stop) <= 100 for stop in stops):
            raise BadRequest("stop: at most 4 texts of 1 to 100 characters")
        return Sampling(
            max_new_tokens=tokens,
            temperature=self.temperature or 0.0,
            top_p=self.top_p or 1.0,
            seed=self.seed,
            stop=tuple(stops),
        )


def read_messages(messages: list[ChatMessage], limits: Limits) -> tuple[list[Message], list[InputImage]]:
    """Messages for the chat template, and their images in order.

    Raises:
        BadRequest: too many images, one that cannot be had or read, or one that the user did not send.
    """
    parts = [part for message in messages if not isinstance(message.content, str) for part in message.content]
    count = sum(isinstance(part, ImagePart) for part in parts)
    if count > limits.images:
        raise BadRequest(f"messages: at most {limits.images} images in a request, these are {count}")
    read: list[Message] = []
    images: list[InputImage] = []
    for message in messages:
        content = [TextPart(type="text", text=message.content)] if isinstance(message.content, str) else message.content
        made: list[dict[str, Any]] = []
        for part in content:
            if isinstance(part, TextPart):
                made.append({"type": "text", "text": part.text})
                continue
            if message.role != "user":
                raise BadRequest("messages: only the user may show images")
            images.append(read_image(part.image_url.url, limits))
            made.append({"type": "image"})
        read.append({"role": "system" if message.role == "developer" else message.role, "content": made})
    return read, images


def read_image(url: str, limits: Limits) -> InputImage:
    """An image of a request."""
    content = image_bytes(url, limits)
    try:
        return decode_limited(content, max_bytes=limits.image_bytes, max_pixels=limits.image_pixels)
    except Refused as error:
        large = "allowed" in str(error)
        raise BadRequest(
            f"image_url: {error}", status=413 if large else 400, code="image_too_large" if large else "invalid_image"
        ) from error


def completion(name: str, model: str, text: str, done: Done) -> dict[str, Any]:
    """A whole answer."""
    choice = {
        "index": 0,
        "message": {"role": "assistant", "content": text},
        "finish_reason": done.reason,
        "logprobs": None,
    }
    return _head(name, model, "chat.completion") | {"choices": [choice], "usage": usage(done)}


def chunk(name: str, model: str, delta: dict[str, str], reason: str | None = None) -> dict[str, Any]:
    """A piece of an answer."""
    choice = {"index": 0, "delta": delta, "finish_reason": reason, "logprobs": None}
    return _head(name, model, "chat.completion.chunk") | {"choices": [choice]}


def usage_chunk(name: str, model: str, done: Done) -> dict[str, Any]:
    """What ends a stream that was asked for its usage."""
    return _head(name, model, "chat.completion.chunk") | {"choices": [], "usage": usage(done)}


def usage(done: Done) -> dict[str, int]:
    """Token counts."""
    total = done.prompt_tokens + done.answer_tokens
    return {"prompt_tokens": done.prompt_tokens, "completion_tokens": done.answer_tokens, "total_tokens": total}


def error_body(message: str, code: str) -> dict[str, Any]:
    """An error as OpenAI's clients read it."""
    return {"error": {"message": message, "type": code, "param": None, "code": code}}


def _head(name: str, model: str, kind: str) -> dict[str, Any]:
    return {"id": name, "object": kind, "created": int(time.time()), "model": model}


def as_bad_request(error: UserError) -> BadRequest:
    """What a template or the engine refused."""
    from clips_mllm.talk.engine import TooLong

    return BadRequest(str(error), code="context_length_exceeded" if isinstance(error, TooLong) else "invalid_request")
