"""Run one step of a road once, and keep what it was, how long it took and how much memory it needed.

    python scripts/step.py runs/quickstart/steps/1-data.json COMMAND ...

A step whose record holds the same command is done and is skipped. Only the standard library: it runs before all else.
"""

from __future__ import annotations

import contextlib
import json
import os
import resource
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path


def main(record: Path, command: list[str]) -> int:
    """Return the command's exit code; the record is written only where it is 0."""
    line = shlex.join(command)
    if record.is_file() and json.loads(record.read_text())["command"] == line:
        print(f"== {record.stem}: done before, skipped ({line})", flush=True)
        return 0
    print(f"== {record.stem}: {line}", flush=True)
    started = time.monotonic()
    stopped = record.with_suffix(".stopped")  # written by a command that SIGTERM stopped: it ends with code 0
    stopped.unlink(missing_ok=True)
    record.parent.mkdir(parents=True, exist_ok=True)
    code = run(command, stopped)
    if stopped.exists():
        stopped.unlink()
        code = 143
    if code:
        print(f"== {record.stem}: stopped with exit code {code}; the same `make` goes on from here", file=sys.stderr)
        return code if code > 0 else 128 - code
    save(record, line, time.monotonic() - started)
    return 0


def run(command: list[str], stopped: Path) -> int:
    """The command's exit code. A signal ends all that the command has started, which saves what it has, and not us.

    DeepSpeed's launcher dies of SIGTERM and leaves its ranks running: hence signals go to the whole group, and the
    group is waited for.
    """
    environment = os.environ | {"STOPPED_FILE": str(stopped.resolve())}
    running = subprocess.Popen(command, env=environment, start_new_session=True)

    def signal_group(number: int, _: object = None) -> bool:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(running.pid, number)
            return True
        return False

    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal_group)
    code = running.wait()
    while signal_group(0):
        time.sleep(0.1)
    return code


def save(record: Path, line: str, seconds: float) -> None:
    """Write the record whole or not at all."""
    largest = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024  # of the largest process; Linux says KiB
    values = {
        "name": record.stem,
        "command": line,
        "seconds": round(seconds, 1),
        "peak_memory_bytes": largest,
        "finished": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }
    partial = record.with_suffix(".partial")
    partial.write_text(json.dumps(values, indent=1))
    os.replace(partial, record)
    print(f"== {record.stem}: {seconds:.0f} s", flush=True)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), sys.argv[2:]))
