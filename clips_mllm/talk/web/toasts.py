"""Show errors of event handlers as toasts. Internal errors go to the log; no paths reach the browser."""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Callable, Iterator
from html import escape
from typing import Any

import gradio as gr

from clips_mllm.talk.requests import QueueFull
from vision_tower.common.errors import UserError

logger = logging.getLogger(__name__)


def toast(message: str) -> gr.Error:
    """Return an exception that Gradio shows as a toast and does not log."""
    return gr.Error(message, print_exception=False)


@contextlib.contextmanager
def errors_as_toasts() -> Iterator[None]:
    """Convert every exception to a toast."""
    try:
        yield
    except gr.Error:
        raise
    except UserError as error:
        raise toast(escape(str(error))) from error
    except QueueFull:
        raise toast("Too many questions are waiting; try again shortly.") from None
    except Exception:
        logger.exception("internal error")
        raise toast("Something went wrong; see the server's log.") from None


def errors_as_warnings(handler: Callable[..., Iterator[list[Any]]]) -> Callable[..., Iterator[list[Any]]]:
    """Wrap a handler: its toasts become warnings, because for errors Gradio covers the chat with the word "Error"."""

    @functools.wraps(handler)  # Gradio reads the signature
    def run(*arguments: Any) -> Iterator[list[Any]]:
        try:
            yield from handler(*arguments)
        except gr.Error as error:
            gr.Warning(error.message, title="Not done")
            yield gr.skip()  # type: ignore[misc]  # leaves all outputs unchanged

    return run
