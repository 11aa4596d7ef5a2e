"""Environment and arguments set by the launcher of distributed runs. Imports no torch: commands use it early."""

from __future__ import annotations

import os


def is_main_process() -> bool:
    """Return True on rank 0 of the launch; works before a process group exists."""
    return os.environ.get("RANK", "0") == "0"


def drop_launcher_arguments(argv: list[str]) -> list[str]:
    """Remove `--local_rank=N`, which DeepSpeed's launcher adds; the rank is read from the environment."""
    return [word for word in argv if not word.startswith("--local_rank")]
