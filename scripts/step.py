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
import threading
import time
from pathlib import Path

WATCHED = 2.0  # seconds between two looks at the memory


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
    code, together = run(command, stopped)
    if stopped.exists():
        stopped.unlink()
        code = 143
    if code:
        print(f"== {record.stem}: stopped with exit code {code}; the same `make` goes on from here", file=sys.stderr)
        return code if code > 0 else 128 - code
    save(record, line, time.monotonic() - started, together)
    return 0


def run(command: list[str], stopped: Path) -> tuple[int, int]:
    """The command's exit code, and the most memory that all its processes held together, in bytes.

    A signal ends all that the command has started, which saves what it has, and not us.
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
    ended, most = threading.Event(), [0]

    def watch() -> None:
        while not ended.wait(WATCHED):
            most.append(max(most.pop(), held_by(running.pid)))

    threading.Thread(target=watch, daemon=True).start()
    code = running.wait()
    ended.set()
    while signal_group(0):
        time.sleep(0.1)
    return code, most[0]


def held_by(session: int) -> int:
    """Bytes of memory of a session's processes, what they share counted once; 0 on systems without /proc."""
    total = 0
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it has just ended, or is another user's
            if os.getsid(int(folder.name)) == session:
                lines = (folder / "smaps_rollup").read_text().splitlines()
                total += sum(1024 * int(line.split()[1]) for line in lines if line.startswith("Pss:"))
    return total


def save(record: Path, line: str, seconds: float, together: int) -> None:
    """Write the record whole or not at all."""
    largest = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024  # of the largest process; Linux says KiB
    values = {
        "name": record.stem,
        "command": line,
        "seconds": round(seconds, 1),
        "peak_memory_bytes": largest,
        "peak_memory_of_all_bytes": together,
        "finished": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }
    partial = record.with_suffix(".partial")
    partial.write_text(json.dumps(values, indent=1))
    os.replace(partial, record)
    memory = f", at most {together / 2**30:.2f} GiB of memory" if together else ""
    print(f"== {record.stem}: {seconds:.0f} s{memory}", flush=True)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), sys.argv[2:]))
