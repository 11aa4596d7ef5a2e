"""What a launcher tells this process: its rank, and a word more on the command line. No torch: a command asks early."""

from __future__ import annotations

import os
import socket


def is_main_process() -> bool:
    """Whether this is rank 0 of the launch; known before any process group exists."""
    return os.environ.get("RANK", "0") == "0"


def drop_launcher_arguments(argv: list[str]) -> list[str]:
    """Without `--local_rank=N`, which DeepSpeed's launcher adds; the rank comes from the environment."""
    return [word for word in argv if not word.startswith("--local_rank")]


def become_the_only_rank() -> None:
    """DeepSpeed asks for a group of processes; without a launcher it is a group of one."""
    if "RANK" in os.environ:
        return
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    os.environ.update(alone)
