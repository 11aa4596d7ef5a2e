"""Run one pipeline step once, and record its command, duration and peak memory.

    python scripts/step.py runs/quickstart/steps/1-data.json COMMAND ...

A step whose record has the same command is skipped. Uses the standard library only.
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

INTERVAL = 2.0  # seconds between two measurements of memory


def main(record: Path, command: list[str]) -> int:
    """Run the step and return its exit code; the record is written only if it is 0."""
    line = shlex.join(command)
    if record.is_file() and json.loads(record.read_text())["command"] == line:
        print(f"== {record.stem}: already done, skipped ({line})", flush=True)
        return 0
    print(f"== {record.stem}: {line}", flush=True)
    started = time.monotonic()
    stopped = record.with_suffix(".stopped")  # created by a command that SIGTERM stopped: it exits with 0
    stopped.unlink(missing_ok=True)
    record.parent.mkdir(parents=True, exist_ok=True)
    code, peak = run(command, stopped)
    if stopped.exists():
        stopped.unlink()
        code = 143
    if code:
        print(f"== {record.stem}: stopped with exit code {code}; run the same command to resume here", file=sys.stderr)
        return code if code > 0 else 128 - code
    save(record, line, time.monotonic() - started, peak)
    return 0


def run(command: list[str], stopped: Path) -> tuple[int, int]:
    """Run the command; return its exit code and the peak memory of all its processes together, in bytes.

    Signals are forwarded to the process group of the command, and the group is waited for: on SIGTERM, DeepSpeed's
    launcher exits and leaves its ranks running, which still have to save.
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
    ended, peak = threading.Event(), [0]

    def watch() -> None:
        while not ended.wait(INTERVAL):
            peak.append(max(peak.pop(), session_memory(running.pid)))

    threading.Thread(target=watch, daemon=True).start()
    code = running.wait()
    ended.set()
    while signal_group(0):  # signal 0 only tests whether a process of the group exists
        time.sleep(0.1)
    return code, peak[0]


def session_memory(session: int) -> int:
    """Return the memory of a session's processes in bytes, shared pages counted once; 0 on systems without /proc."""
    total = 0
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):  # the process has ended, or belongs to another user
            if os.getsid(int(folder.name)) == session:
                lines = (folder / "smaps_rollup").read_text().splitlines()
                total += sum(1024 * int(line.split()[1]) for line in lines if line.startswith("Pss:"))
    return total


def save(record: Path, line: str, seconds: float, peak: int) -> None:
    """Write the record atomically."""
    largest = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024  # largest process; KiB on Linux
    values = {
        "name": record.stem,
        "command": line,
        "seconds": round(seconds, 1),
        "peak_memory_bytes": largest,
        "peak_memory_of_all_bytes": peak,
        "finished": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }
    partial = record.with_suffix(".partial")
    partial.write_text(json.dumps(values, indent=1))
    os.replace(partial, record)
    memory = f", peak memory {peak / 2**30:.2f} GiB" if peak else ""
    print(f"== {record.stem}: {seconds:.0f} s{memory}", flush=True)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), sys.argv[2:]))
