"""The HTTP side of the endpoint.

POST /v1/chat/completions   OpenAI's chat completions, whole or as server-sent events
GET  /v1/models, /v1/models/NAME, /health
"""

from __future__ import annotations

import asyncio
import hmac
import json
import sys
import time
import traceback
import uuid
from collections.abc import AsyncIterator
from typing import Any

from fastapi import Depends, FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, StreamingResponse
from pydantic import ValidationError
from starlette.exceptions import HTTPException

from clips_mllm.talk.engine import Closed, Done, Engine, Event, Failed, Piece, QueueFull
from clips_mllm.talk.engine import Request as Running
from clips_mllm.talk.limits import BadRequest, Limits
from clips_mllm.talk.serve import protocol
from vision_tower.common.errors import UserError

WRONG = {  # pydantic's words for these tell a client nothing
    "extra_forbidden": "not supported by this server; leave it out",
    "too_long": "not supported by this server; leave it out",
    "missing": "is missing",
    "json_invalid": "not valid JSON",
}
STILL_THERE = 1.0  # seconds between two looks at whether a waiting client has gone


def make_app(engine: Engine, name: str, limits: Limits, token: str | None = None) -> FastAPI:
    """The application.

    Args:
        name: what the model is called; never a path.
        token: clients must send it as `Authorization: Bearer TOKEN`.
    """
    about = {"id": name, "object": "model", "created": int(time.time()), "owned_by": "clips-mllm"}

    # Not a middleware: behind Starlette's nobody hears that a client has hung up.
    async def authorize(request: Request) -> None:
        if token is not None and request.scope["path"] != "/health":  # a URL would be made of the client's Host
            given = request.headers.get("authorization", "")
            if not hmac.compare_digest(given.encode(), f"Bearer {token}".encode()):
                raise BadRequest("wrong or missing token", status=401, code="invalid_api_key")

    def check_name(asked: str) -> None:
        if asked != name:
            raise BadRequest(f"model: this server has '{name}' only", status=404, code="model_not_found")

    app = FastAPI(
        title="clips-mllm", docs_url=None, redoc_url=None, openapi_url=None, dependencies=[Depends(authorize)]
    )
    _add_errors(app)

    @app.get("/health")
    def health() -> dict[str, Any]:
        rows, waiting = engine.load
        return {"status": "ok", "answering": rows, "waiting": waiting}

    @app.get("/v1/models")
    def models() -> dict[str, Any]:
        return {"object": "list", "data": [about]}

    @app.get("/v1/models/{asked:path}")
    def model(asked: str) -> dict[str, Any]:
        check_name(asked)
        return about

    @app.post("/v1/chat/completions")
    async def chat(request: Request) -> Response:
        asked = read_request(await read_body(request, limits))
        check_name(asked.model)
        answer = AsyncAnswer(engine)
        await answer.start(asked, limits)
        if asked.stream:
            return StreamingResponse(stream(answer, name, asked), media_type="text/event-stream")
        text = "".join([piece async for piece in answer.pieces(request)])
        assert answer.done is not None
        return JSONResponse(protocol.completion(answer.id, name, text, answer.done))

    return app


async def read_body(request: Request, limits: Limits) -> bytes:
    """The body, of which no more than allowed is ever held. Raises BadRequest.

    Only JSON by its content type: web pages of others cannot send that here without this server's consent.
    """
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise BadRequest("content-type: application/json is expected", status=415)
    body = bytearray()

    async def read() -> None:
        async for block in request.stream():
            body.extend(block)
            if len(body) > limits.body_bytes:
                message = f"a request may have {limits.body_bytes:,} bytes"
                raise BadRequest(message, status=413, code="request_too_large")

    try:
        await asyncio.wait_for(read(), limits.body_seconds)
    except asyncio.TimeoutError:
        raise BadRequest("the request did not arrive in time", status=408) from None
    return bytes(body)


def read_request(body: bytes) -> protocol.ChatRequest:
    """A request's fields. Raises BadRequest naming the first that is wrong."""
    try:
        return protocol.ChatRequest.model_validate_json(body)
    except ValidationError as error:
        first = error.errors(include_input=False, include_url=False)[0]
        place = ".".join(str(step) for step in first["loc"]) or "body"
        if "content" in first["loc"]:  # text or parts, of which pydantic tells what is wrong with either
            raise BadRequest(f"{place}: content is text, or a list of parts of type text or image_url") from None
        raise BadRequest(f"{place}: {WRONG.get(first['type'], first['msg'])}") from None


class AsyncAnswer:
    """An answer in the making, for the event loop. Whoever goes away before its end cancels it."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.id = f"chatcmpl-{uuid.uuid4().hex}"
        self.done: Done | None = None
        self._events: asyncio.Queue[Event] = asyncio.Queue()
        self._running: Running | None = None

    async def start(self, asked: protocol.ChatRequest, limits: Limits) -> None:
        """Read the request in a thread, and queue it. Raises BadRequest."""
        loop = asyncio.get_running_loop()

        def submit() -> Running:
            messages, images = protocol.read_messages(asked.messages, limits)
            prompt = self.engine.prompt(messages, images)
            room = self.engine.context - len(prompt.ids)
            return self.engine.submit(prompt, asked.sampling(limits, room), emit)

        def emit(event: Event) -> None:
            if not loop.is_closed():
                loop.call_soon_threadsafe(self._events.put_nowait, event)

        if self.engine.full:  # before any image is decoded
            raise _busy()
        try:
            self._running = await asyncio.to_thread(submit)
        except QueueFull as error:
            raise _busy() from error
        except Closed as error:
            raise BadRequest("shutting down", status=503, code="unavailable") from error
        except UserError as error:
            raise protocol.as_bad_request(error) from error

    async def pieces(self, request: Request | None = None) -> AsyncIterator[str]:
        """Text as it comes; with `request`, a look now and then at whether its client has gone."""
        assert self._running is not None
        looked = time.monotonic()
        try:
            while self.done is None:
                if request is not None and time.monotonic() - looked > STILL_THERE:
                    looked = time.monotonic()
                    if await request.is_disconnected():
                        raise BadRequest("the client has gone", status=499, code="gone")
                try:
                    event = await asyncio.wait_for(self._events.get(), None if request is None else STILL_THERE)
                except asyncio.TimeoutError:
                    continue
                match event:
                    case Piece(text):
                        yield text
                    case Failed(error):
                        raise error
                    case Done(reason="cancelled"):  # its client is here: the server is being stopped
                        raise BadRequest("shutting down", status=503, code="unavailable")
                    case Done() as done:
                        self.done = done
        finally:
            self._running.cancel()


async def stream(answer: AsyncAnswer, name: str, asked: protocol.ChatRequest) -> AsyncIterator[str]:
    """Server-sent events."""
    yield _event(protocol.chunk(answer.id, name, {"role": "assistant", "content": ""}))
    try:
        async for piece in answer.pieces():
            yield _event(protocol.chunk(answer.id, name, {"content": piece}))
    except BadRequest as error:  # the status has been sent already
        yield _event(protocol.error_body(str(error), error.code))
        return
    except Exception as error:
        _log(error)
        yield _event(protocol.error_body("the answer could not be completed", "server_error"))
        return
    assert answer.done is not None
    yield _event(protocol.chunk(answer.id, name, {}, answer.done.reason))
    if asked.stream_options is not None and asked.stream_options.include_usage:
        yield _event(protocol.usage_chunk(answer.id, name, answer.done))
    yield "data: [DONE]\n\n"


def _event(body: dict[str, Any]) -> str:
    return f"data: {json.dumps(body, ensure_ascii=False)}\n\n"


def _busy() -> BadRequest:
    return BadRequest("too many requests are waiting; try again shortly", status=429, code="rate_limit_exceeded")


def _error(error: BadRequest) -> JSONResponse:
    headers = {"Retry-After": "1"} if error.status == 429 else None
    return JSONResponse(protocol.error_body(str(error), error.code), status_code=error.status, headers=headers)


def _add_errors(app: FastAPI) -> None:
    """Every error becomes OpenAI's body; our own faults are logged, and tell the client nothing of the machine."""

    @app.exception_handler(BadRequest)
    def refused(_: Request, error: BadRequest) -> JSONResponse:
        return _error(error)

    @app.exception_handler(HTTPException)
    def unknown(_: Request, error: HTTPException) -> JSONResponse:
        return _error(BadRequest(str(error.detail), status=error.status_code))

    @app.exception_handler(RequestValidationError)
    def invalid(_: Request, error: RequestValidationError) -> JSONResponse:
        return _error(BadRequest("malformed request"))

    @app.exception_handler(Exception)
    def broken(_: Request, error: Exception) -> JSONResponse:
        _log(error)
        return _error(BadRequest("something went wrong here; see the server's log", status=500, code="server_error"))


def _log(error: Exception) -> None:
    traceback.print_exception(error, file=sys.stderr)
