"""What a launcher tells this process: its rank, and a word more on the command line. No torch: a command asks early."""

from __future__ import annotations

import os


def is_main_process() -> bool:
    """Whether this is rank 0 of the launch; known before any process group exists."""
    return os.environ.get("RANK", "0") == "0"


def drop_launcher_arguments(argv: list[str]) -> list[str]:
    """Without `--local_rank=N`, which DeepSpeed's launcher adds; the rank comes from the environment."""
    return [word for word in argv if not word.startswith("--local_rank")]
