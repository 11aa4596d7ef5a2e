"""OpenAI chat completions: validation of requests, and bodies of responses."""

from __future__ import annotations

import time
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from clips_mllm.prompts.conversation import Message
from clips_mllm.talk.images import ImageRejected, ImageTooLarge, InputImage, decode_limited
from clips_mllm.talk.recipe import Limits
from clips_mllm.talk.requests import Done
from clips_mllm.talk.sampling import Sampling
from clips_mllm.talk.serve.errors import BadRequest
from clips_mllm.talk.serve.image_url import image_bytes

NOT_SUPPORTED = "not supported by this server; leave it out"
MESSAGES = {  # by pydantic's error type, if its own message does not help a client
    "extra_forbidden": NOT_SUPPORTED,
    "too_long": NOT_SUPPORTED,
    "missing": "is missing",
    "json_invalid": "not valid JSON",
}


class Strict(BaseModel):
    """Rejects unknown fields: ignoring one could change the answer without notice."""

    model_config = ConfigDict(extra="forbid")

    @model_validator(mode="before")
    @classmethod
    def _drop_nulls(cls, value: Any) -> Any:
        """Drop null fields of any name; clients send them when they return an earlier message with all its fields."""
        return {name: item for name, item in value.items() if item is not None} if isinstance(value, dict) else value


class ImageUrl(Strict):
    url: str
    detail: Literal["auto"] = "auto"  # "low" and "high" would select a resolution; the model has one


class ImagePart(Strict):
    type: Literal["image_url"]
    image_url: ImageUrl


class TextPart(Strict):
    type: Literal["text"]
    text: str


Part = Annotated[ImagePart | TextPart, Field(discriminator="type")]


class ChatMessage(Strict):
    role: Literal["system", "developer", "user", "assistant"]
    content: list[Part] = Field(default_factory=list, validate_default=True)
    # Empty in answers of this server that a client sends back.
    annotations: list[Any] = Field([], max_length=0)
    tool_calls: list[Any] = Field([], max_length=0)

    @field_validator("content", mode="before")
    @classmethod
    def _as_parts(cls, content: Any) -> Any:
        return [{"type": "text", "text": content}] if isinstance(content, str) else content

    @model_validator(mode="after")
    def _only_answers_may_be_empty(self) -> ChatMessage:
        if not self.content and self.role != "assistant":
            raise ValueError("content is missing")
        return self


class StreamOptions(Strict):
    include_usage: bool = False


class PlainText(Strict):
    type: Literal["text"]


class ChatRequest(Strict):
    """Fields of OpenAI that this server honors. Fields with a `Literal` accept the values it can honor.

    `user` identifies a client's user for OpenAI's abuse detection; it has no effect on answers, here or there.
    """

    model: str
    messages: list[ChatMessage] = Field(min_length=1)
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    temperature: float = Field(0.0, ge=0, le=2)
    top_p: float = Field(1.0, gt=0, le=1)
    seed: int | None = Field(None, ge=0, lt=2**63)
    stop: str | list[str] = []
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()
    n: Literal[1] = 1
    frequency_penalty: Literal[0] = 0
    presence_penalty: Literal[0] = 0
    logprobs: Literal[False] = False
    response_format: PlainText | None = None
    tools: list[Any] = Field([], max_length=0)
    tool_choice: Literal["none", "auto"] = "none"
    store: Literal[False] = False
    user: str | None = None

    def sampling(self, limits: Limits, room: int) -> Sampling:
        """Return the sampling parameters.

        Args:
            room: tokens between the prompt and the end of the context.
        Raises:
            BadRequest: beyond the limits.
        """
        tokens = self.max_completion_tokens or self.max_tokens or max(1, min(256, limits.new_tokens, room))
        if tokens > limits.new_tokens:
            raise BadRequest(f"at most {limits.new_tokens} here, not {tokens}", param="max_tokens")
        stops = [self.stop] if isinstance(self.stop, str) else self.stop
        if len(stops) > 4 or not all(0 < len(stop) <= 100 for stop in stops):
            raise BadRequest("at most 4 strings of 1 to 100 characters", param="stop")
        return Sampling(
            max_new_tokens=tokens, temperature=self.temperature, top_p=self.top_p, seed=self.seed, stop=tuple(stops)
        )


def parse_request(body: bytes) -> ChatRequest:
    """Validate a request. Raises BadRequest with the name of the first invalid field."""
    try:
        return ChatRequest.model_validate_json(body)
    except ValidationError as error:
        first = error.errors(include_input=False, include_url=False)[0]
        param = ".".join(str(step) for step in first["loc"]) or "body"
        problem = MESSAGES.get(first["type"], first["msg"].removeprefix("Value error, "))
        raise BadRequest(problem, param=param) from None


def read_messages(messages: list[ChatMessage], limits: Limits) -> tuple[list[Message], list[InputImage]]:
    """Return messages for the chat template, and their decoded images in order.

    Raises:
        BadRequest: too many images, an unavailable or unreadable one, or one in a message that is not the user's.
    """
    count = sum(isinstance(part, ImagePart) for message in messages for part in message.content)
    if count > limits.images:
        raise BadRequest(
            f"at most {limits.images} images per request, not {count}", param="messages", code="too_many_images"
        )
    converted: list[Message] = []
    images: list[InputImage] = []
    for message in messages:
        content: list[dict[str, Any]] = []
        for part in message.content or [TextPart(type="text", text="")]:
            if isinstance(part, TextPart):
                content.append({"type": "text", "text": part.text})
                continue
            if message.role != "user":
                raise BadRequest("only user messages may contain images", param="messages")
            images.append(read_image(part.image_url.url, limits))
            content.append({"type": "image"})
        converted.append({"role": "system" if message.role == "developer" else message.role, "content": content})
    return converted, images


def read_image(url: str, limits: Limits) -> InputImage:
    """Return the decoded image of a URL. Raises BadRequest."""
    content = image_bytes(url, limits)
    try:
        return decode_limited(content, max_bytes=limits.image_bytes, max_pixels=limits.image_pixels)
    except ImageTooLarge as error:
        raise BadRequest(str(error), param="image_url", status=413, code="image_too_large") from error
    except ImageRejected as error:
        raise BadRequest(str(error), param="image_url", code="invalid_image") from error


def completion(request_id: str, model: str, text: str, done: Done) -> dict[str, Any]:
    """Return the body of a complete answer."""
    message = {"role": "assistant", "content": text}
    choice = {"index": 0, "message": message, "finish_reason": done.reason, "logprobs": None}
    return _header(request_id, model, "chat.completion") | {"choices": [choice], "usage": usage(done)}


def chunk(request_id: str, model: str, delta: dict[str, str], reason: str | None = None) -> dict[str, Any]:
    """Return one chunk of a streamed answer."""
    choice = {"index": 0, "delta": delta, "finish_reason": reason, "logprobs": None}
    return _header(request_id, model, "chat.completion.chunk") | {"choices": [choice]}


def usage_chunk(request_id: str, model: str, done: Done) -> dict[str, Any]:
    """Return the last chunk of a stream with `include_usage`."""
    return _header(request_id, model, "chat.completion.chunk") | {"choices": [], "usage": usage(done)}


def usage(done: Done) -> dict[str, int]:
    """Return the token counts."""
    total = done.prompt_tokens + done.answer_tokens
    return {"prompt_tokens": done.prompt_tokens, "completion_tokens": done.answer_tokens, "total_tokens": total}


def _header(request_id: str, model: str, kind: str) -> dict[str, Any]:
    return {"id": request_id, "object": kind, "created": int(time.time()), "model": model}
