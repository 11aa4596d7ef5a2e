"""scripts/step.py records a finished step, but not one that SIGTERM stopped, although both exit with 0."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]


def step(record: Path, code: str) -> int:
    words = [sys.executable, str(ROOT / "scripts" / "step.py"), str(record), sys.executable, "-c", code]
    return subprocess.run(words, check=False, cwd=record.parent).returncode


def test_stopped_step_is_not_recorded(tmp_path: Path) -> None:
    record = tmp_path / "steps" / "1.json"
    record.parent.mkdir()
    stopped = "import os, pathlib; pathlib.Path(os.environ['STOPPED_FILE']).touch()"
    assert step(record, stopped) == 143 and not list(record.parent.iterdir())
    assert step(record, "raise SystemExit(2)") == 2 and not record.exists()
    assert step(record, "print('done')") == 0
    assert "done" in json.loads(record.read_text())["command"]


def test_memory_of_all_processes_is_recorded(tmp_path: Path) -> None:
    """A command with 100 MB and its child with 200 MB, for longer than the measuring interval."""
    hold = "import time; kept = bytearray(b'x') * {}; time.sleep(5)"
    code = f"import subprocess, sys; p = subprocess.Popen([sys.executable, '-c', {hold.format(200_000_000)!r}])\n"
    assert step(tmp_path / "1.json", code + hold.format(100_000_000) + "; p.wait()") == 0
    found = json.loads((tmp_path / "1.json").read_text())
    assert 300e6 < found["peak_memory_of_all_bytes"] < 400e6 and found["peak_memory_bytes"] < 300e6


def test_sigterm_reaches_the_command(tmp_path: Path) -> None:
    """No process is left, even if a launcher exits before its ranks."""
    rank = (
        "import os, pathlib, signal, sys, time\n"
        "def save(*_):\n"
        "    time.sleep(1)\n"
        "    pathlib.Path(os.environ['STOPPED_FILE']).touch()\n"
        "    sys.exit(0)\n"
        "signal.signal(signal.SIGTERM, save)\n"
        "pathlib.Path('started').write_text(str(os.getpid()))\n"
        "time.sleep(60)"
    )
    code = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {rank!r}])"
    words = [sys.executable, str(ROOT / "scripts" / "step.py"), "1.json", sys.executable, "-c", code]
    running = subprocess.Popen(words, cwd=tmp_path)
    try:
        while not (tmp_path / "started").exists() or not (tmp_path / "started").read_text():
            assert running.poll() is None
            time.sleep(0.05)
        running.terminate()
        assert running.wait(30) == 143
        assert not Path("/proc", (tmp_path / "started").read_text()).exists()
    finally:
        running.kill()
        running.wait()


def test_stopped_command_is_reported(tmp_path: Path) -> None:
    code = (
        "import sys; from vision_tower.common.errors import Stopped, run_command\n"
        "def main(argv): raise Stopped('SIGTERM: stopped')\n"
        "sys.exit(run_command(main, []))"
    )
    assert step(tmp_path / "1.json", f"import sys; sys.path.insert(0, {str(ROOT)!r})\n{code}") == 143
