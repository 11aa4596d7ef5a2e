"""What commands that run others share: they show what those do, and leave none behind.

What stops the command lets each of its runs save, and ends it.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from vision_tower.common.errors import Stopped

GRACE = 60.0  # seconds that a run has to finish its step and save
EVERY = 1.0  # seconds between looks at the logs of the runs under way


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


def show_progress(logs: Sequence[Path]) -> None:
    """Each log's last line, mostly a bar with its time left, on one line of a terminal that the next call overwrites.

    No logs clear it. Where stderr is no terminal nothing is written: the logs are there to be read.
    """
    if not sys.stderr.isatty():
        return
    columns = os.get_terminal_size(sys.stderr.fileno()).columns or 80  # a terminal may not know its width
    width = columns // max(len(logs), 1) - 3
    print("\r\x1b[K" + " | ".join(_last_line(log)[:width] for log in logs), end="", file=sys.stderr, flush=True)


def _last_line(log: Path) -> str:
    if not log.is_file():
        return ""
    with log.open("rb") as stream:
        stream.seek(max(log.stat().st_size - 4096, 0))
        lines = re.split(r"[\r\n]+", stream.read().decode(errors="replace"))  # a bar is drawn anew after a return
    return next((line.strip() for line in reversed(lines) if line.strip()), "")
