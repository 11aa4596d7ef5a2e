"""Errors of the endpoint in OpenAI's format."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException


class BadRequest(Exception):
    """A rejected request.

    Args:
        problem: explanation without paths of this machine.
        param: name of the invalid field.
        status: HTTP status.
        code: error code for programs, in OpenAI's style.
    """

    def __init__(
        self, problem: str, *, param: str | None = None, status: int = 400, code: str = "invalid_request"
    ) -> None:
        super().__init__(problem if param is None else f"{param}: {problem}")
        self.param = param
        self.status = status
        self.code = code

    @property
    def body(self) -> dict[str, Any]:
        """Body of the response, as OpenAI's clients expect it."""
        return {"error": {"message": str(self), "type": self.code, "param": self.param, "code": self.code}}


def internal_error() -> BadRequest:
    """Return the response to our own bugs, without details."""
    return BadRequest("internal error; see the server's log", status=500, code="server_error")


def add_error_handlers(app: FastAPI) -> None:
    """Convert every exception to an error response. uvicorn logs internal errors; clients get no details of them."""

    @app.exception_handler(BadRequest)
    def rejected(_: Request, error: BadRequest) -> JSONResponse:
        return _response(error)

    @app.exception_handler(HTTPException)
    def http_error(_: Request, error: HTTPException) -> JSONResponse:
        return _response(BadRequest(str(error.detail), status=error.status_code))

    @app.exception_handler(RequestValidationError)
    def invalid(_: Request, error: RequestValidationError) -> JSONResponse:
        return _response(BadRequest("malformed request"))

    @app.exception_handler(Exception)
    def failed(_: Request, error: Exception) -> JSONResponse:
        return _response(internal_error())


def _response(error: BadRequest) -> JSONResponse:
    headers = {"Retry-After": "1"} if error.status == 429 else None
    return JSONResponse(error.body, status_code=error.status, headers=headers)
