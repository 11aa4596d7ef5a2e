"""A step of the road is recorded where it is done, and not where SIGTERM stopped it, though both end with code 0."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def step(record: Path, code: str) -> int:
    words = [sys.executable, str(ROOT / "scripts" / "step.py"), str(record), sys.executable, "-c", code]
    return subprocess.run(words, check=False, cwd=record.parent).returncode


def test_a_stopped_step_is_not_done(tmp_path: Path) -> None:
    record = tmp_path / "steps" / "1.json"
    record.parent.mkdir()
    stopped = "import os, pathlib; pathlib.Path(os.environ['STOPPED_FILE']).touch()"
    assert step(record, stopped) == 143 and not list(record.parent.iterdir())
    assert step(record, "raise SystemExit(2)") == 2 and not record.exists()
    assert step(record, "print('done')") == 0
    assert "done" in json.loads(record.read_text())["command"]


def test_a_command_tells_of_a_stop(tmp_path: Path) -> None:
    code = (
        "import sys; from vision_tower.errors import Stopped, run_command\n"
        "def main(argv): raise Stopped('SIGTERM: stopped')\n"
        "sys.exit(run_command(main, []))"
    )
    assert step(tmp_path / "1.json", f"import sys; sys.path.insert(0, {str(ROOT)!r})\n{code}") == 143
