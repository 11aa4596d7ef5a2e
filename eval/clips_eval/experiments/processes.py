"""Child processes of the commands that run other commands: stop on SIGTERM, clean up, show progress."""

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

GRACE = 60.0  # seconds from SIGTERM to SIGKILL: a run finishes its step and saves
EVERY = 1.0  # seconds between two updates of the progress line


@contextlib.contextmanager
def sigterm_stops(command: str) -> Iterator[None]:
    """Raise Stopped on SIGTERM inside the context. A second SIGTERM ends the process at once."""

    def stop(*_: Any) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        raise Stopped(f"SIGTERM: {command} stopped, finished work is kept; run the same command again to resume")

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def end(pids: Iterable[int]) -> None:
    """Send SIGTERM to the processes and all their descendants, and SIGKILL to those alive after GRACE seconds."""
    import psutil

    processes: list[psutil.Process] = []
    for pid in pids:
        with contextlib.suppress(psutil.NoSuchProcess):
            process = psutil.Process(pid)
            # Descendants too: DeepSpeed's launcher exits on SIGTERM and leaves its ranks running.
            processes += [process, *process.children(recursive=True)]
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.terminate()
    for process in psutil.wait_procs(processes, timeout=GRACE)[1]:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()


def show_progress(logs: Sequence[Path]) -> None:
    """Overwrite the terminal's line with the last line of each log; an empty list clears it.

    Does nothing if stderr is not a terminal.
    """
    if not sys.stderr.isatty():
        return
    columns = os.get_terminal_size(sys.stderr.fileno()).columns or 80  # 0 if the terminal does not know its width
    width = columns // max(len(logs), 1) - 3
    print("\r\x1b[K" + " | ".join(_last_line(log)[:width] for log in logs), end="", file=sys.stderr, flush=True)


def _last_line(log: Path) -> str:
    if not log.is_file():
        return ""
    with log.open("rb") as stream:
        stream.seek(max(log.stat().st_size - 4096, 0))
        lines = re.split(r"[\r\n]+", stream.read().decode(errors="replace"))  # progress bars end lines with \r
    return next((line.strip() for line in reversed(lines) if line.strip()), "")
