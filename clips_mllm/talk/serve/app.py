"""HTTP application of the endpoint.

POST /v1/chat/completions   OpenAI's chat completions, complete or streamed as server-sent events
GET  /v1/models, /v1/models/NAME, /health
"""

from __future__ import annotations

import asyncio
import hmac
import json
import logging
import socket
import time
import uuid
from collections.abc import AsyncIterator
from typing import Any

import uvicorn
from fastapi import Depends, FastAPI, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse

from clips_mllm.talk.engine import Engine
from clips_mllm.talk.recipe import Limits
from clips_mllm.talk.requests import Closed, Done, Event, Failed, QueueFull, TextDelta, TooLong
from clips_mllm.talk.requests import Request as EngineRequest
from clips_mllm.talk.serve import protocol
from clips_mllm.talk.serve.errors import BadRequest, add_error_handlers, internal_error
from vision_tower.common.errors import UserError

logger = logging.getLogger(__name__)

DISCONNECT_CHECK_SECONDS = 1.0


class Server(uvicorn.Server):
    """uvicorn server with graceful shutdown: running requests finish, or time out with an error message.

    Args:
        shutdown_seconds: time limit of running requests; a second signal ends them at once.
    """

    def __init__(self, config: uvicorn.Config, engine: Engine, shutdown_seconds: float) -> None:
        super().__init__(config)
        self.engine = engine
        self.shutdown_seconds = shutdown_seconds

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Accept no more requests, and return after the last answer was sent."""
        closing = asyncio.create_task(asyncio.to_thread(self.engine.close, self.shutdown_seconds))
        await super().shutdown(sockets)
        self.engine.close()
        await closing


def make_app(engine: Engine, name: str, limits: Limits, token: str | None = None) -> FastAPI:
    """Create the application.

    Args:
        name: model name for clients; never a path.
        token: required from clients as `Authorization: Bearer TOKEN`.
    """
    description = {"id": name, "object": "model", "created": int(time.time()), "owned_by": "clips-mllm"}

    # A dependency, because Starlette's HTTP middleware hides the disconnection of clients.
    async def authorize(request: Request) -> None:
        if token is not None and request.scope["path"] != "/health":  # not `request.url`: it contains the Host header
            header = request.headers.get("authorization", "")
            if not hmac.compare_digest(header.encode(), f"Bearer {token}".encode()):
                raise BadRequest("wrong or missing token", status=401, code="invalid_api_key")

    def check_name(requested: str) -> None:
        if requested != name:
            raise BadRequest(f"this server only has '{name}'", param="model", status=404, code="model_not_found")

    app = FastAPI(
        title="clips-mllm", docs_url=None, redoc_url=None, openapi_url=None, dependencies=[Depends(authorize)]
    )
    add_error_handlers(app)

    @app.get("/health")
    def health() -> dict[str, Any]:
        running, waiting = engine.load
        return {"status": "ok", "answering": running, "waiting": waiting}

    @app.get("/v1/models")
    def models() -> dict[str, Any]:
        return {"object": "list", "data": [description]}

    @app.get("/v1/models/{requested:path}")
    def model(requested: str) -> dict[str, Any]:
        check_name(requested)
        return description

    @app.post("/v1/chat/completions")
    async def chat(http_request: Request) -> Response:
        request = protocol.parse_request(await read_body(http_request, limits))
        check_name(request.model)
        answer = AsyncAnswer(engine)
        await answer.start(request, limits)
        if request.stream:
            include_usage = request.stream_options.include_usage
            return StreamingResponse(stream(answer, name, include_usage), media_type="text/event-stream")
        text = "".join([part async for part in answer.text(http_request)])
        assert answer.done is not None
        return JSONResponse(protocol.completion(answer.id, name, text, answer.done))

    return app


async def read_body(request: Request, limits: Limits) -> bytes:
    """Read the body, buffering no more than the limit. Raises BadRequest.

    The content type must be JSON, which web pages of other origins cannot send without a CORS preflight.
    """
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise BadRequest("expected application/json", param="content-type", status=415)
    body = bytearray()

    async def read() -> None:
        async for block in request.stream():
            body.extend(block)
            if len(body) > limits.body_bytes:
                message = f"the request is larger than {limits.body_bytes:,} bytes"
                raise BadRequest(message, status=413, code="request_too_large")

    try:
        await asyncio.wait_for(read(), limits.body_seconds)
    except asyncio.TimeoutError:
        raise BadRequest("the request did not arrive in time", status=408) from None
    return bytes(body)


class AsyncAnswer:
    """Iterator over an answer's text for the event loop. Leaving the iterator early cancels the request."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.id = f"chatcmpl-{uuid.uuid4().hex}"
        self.done: Done | None = None
        self._events: asyncio.Queue[Event] = asyncio.Queue()
        self._request: EngineRequest | None = None

    async def start(self, request: protocol.ChatRequest, limits: Limits) -> None:
        """Decode the images in a thread and queue the request. Raises BadRequest."""
        loop = asyncio.get_running_loop()

        def emit(event: Event) -> None:
            if not loop.is_closed():
                loop.call_soon_threadsafe(self._events.put_nowait, event)

        def submit() -> EngineRequest:
            messages, images = protocol.read_messages(request.messages, limits)
            prompt = self.engine.prompt(messages, images)
            room = self.engine.context - len(prompt.ids)
            return self.engine.submit(prompt, request.sampling(limits, room), emit)

        busy = BadRequest("too many requests are waiting; try again shortly", status=429, code="rate_limit_exceeded")
        if self.engine.full:  # before images are decoded
            raise busy
        try:
            self._request = await asyncio.to_thread(submit)
        except QueueFull as error:
            raise busy from error
        except Closed as error:
            raise BadRequest("shutting down", status=503, code="unavailable") from error
        except TooLong as error:
            raise BadRequest(str(error), code="context_length_exceeded") from error
        except UserError as error:
            raise BadRequest(str(error)) from error

    async def text(self, http_request: Request | None = None) -> AsyncIterator[str]:
        """Yield text as it is generated. If given `http_request`, check regularly if its client is still connected."""
        assert self._request is not None
        checked = time.monotonic()
        try:
            while self.done is None:
                if http_request is not None and time.monotonic() - checked > DISCONNECT_CHECK_SECONDS:
                    checked = time.monotonic()
                    if await http_request.is_disconnected():
                        raise BadRequest("the client disconnected", status=499, code="gone")
                timeout = None if http_request is None else DISCONNECT_CHECK_SECONDS
                try:
                    event = await asyncio.wait_for(self._events.get(), timeout)
                except asyncio.TimeoutError:
                    continue
                match event:
                    case TextDelta(text):
                        yield text
                    case Failed(error):
                        raise error
                    case Done(reason="cancelled"):  # not by its client, so by the shutdown of the server
                        raise BadRequest("shutting down", status=503, code="unavailable")
                    case Done() as done:
                        self.done = done
        finally:
            self._request.cancel()


async def stream(answer: AsyncAnswer, name: str, include_usage: bool) -> AsyncIterator[str]:
    """Yield server-sent events."""
    yield _event(protocol.chunk(answer.id, name, {"role": "assistant", "content": ""}))
    try:
        async for text in answer.text():
            yield _event(protocol.chunk(answer.id, name, {"content": text}))
    except BadRequest as error:  # the HTTP status was sent already
        yield _event(error.body)
        return
    except Exception:
        logger.exception("internal error during a streamed answer")
        yield _event(internal_error().body)
        return
    assert answer.done is not None
    yield _event(protocol.chunk(answer.id, name, {}, answer.done.reason))
    if include_usage:
        yield _event(protocol.usage_chunk(answer.id, name, answer.done))
    yield "data: [DONE]\n\n"


def _event(body: dict[str, Any]) -> str:
    return f"data: {json.dumps(body, ensure_ascii=False)}\n\n"
