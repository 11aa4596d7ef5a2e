"""Child processes of a test."""

from __future__ import annotations

import time
from pathlib import Path


def children(process: int) -> list[int]:
    return [int(word) for word in Path(f"/proc/{process}/task/{process}/children").read_text().split()]


def has_ended(process: int) -> bool:
    """Return True if the process ends within 20 seconds, which a loader process without parent needs at most."""
    file = Path(f"/proc/{process}/stat")
    until = time.monotonic() + 20
    while time.monotonic() < until:
        if not file.exists() or file.read_text().rpartition(")")[2].split()[0] == "Z":
            return True
        time.sleep(0.1)
    return False
