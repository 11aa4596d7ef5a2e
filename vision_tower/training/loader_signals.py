"""Signals in loader processes. No torch: a loader process that is not forked imports this module when it starts."""

from __future__ import annotations

import signal
import sys
from types import TracebackType
from typing import Any


def ignore_signals_in_worker(_: int) -> None:
    """Make a loader process ignore signals that a terminal or scheduler sends to the whole process group.

    Ctrl-C is reported by the trainer. After SIGTERM the trainer still needs its workers to reach a checkpoint. A second
    SIGTERM, which the loader sends to a worker that does not end by itself, ends it.
    """

    def ignore_once(*_: Any) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)

    signal.signal(signal.SIGTERM, ignore_once)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    sys.excepthook = _hide_broken_connection


def _hide_broken_connection(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Exception hook without the errors of the queue thread when Ctrl-C ends the trainer first."""
    if not issubclass(kind, (EOFError, ConnectionError)):
        sys.__excepthook__(kind, error, trace)
