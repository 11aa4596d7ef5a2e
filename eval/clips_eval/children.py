"""Commands that run others do not leave them behind: what stops the command lets each of its runs save, and ends it."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterable, Iterator
from typing import Any

from vision_tower.errors import Stopped

GRACE = 60.0  # seconds that a run has to finish its step and save


@contextlib.contextmanager
def sigterm_stops(command: str) -> Iterator[None]:
    """Within it SIGTERM raises Stopped, as Ctrl-C raises KeyboardInterrupt; a second one ends the process at once."""

    def stop(*_: Any) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        raise Stopped(f"SIGTERM: {command} stopped, what is done is kept; run the same command again to go on")

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def end(pids: Iterable[int]) -> None:
    """SIGTERM to these processes and all that they have started, and SIGKILL to what is there after GRACE seconds.

    DeepSpeed's launcher dies of SIGTERM, and leaves its ranks running.
    """
    import psutil

    asked: list[psutil.Process] = []
    for pid in pids:
        with contextlib.suppress(psutil.NoSuchProcess):
            process = psutil.Process(pid)
            asked += [process, *process.children(recursive=True)]
    for process in asked:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.terminate()
    for process in psutil.wait_procs(asked, timeout=GRACE)[1]:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
