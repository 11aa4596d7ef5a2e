"""provenance.json: how a folder was made.

made_by, command, ranks, git, versions, hardware, started    the process, from its start
inputs     by role: name, absolute path, hash of the file or of the folder's own provenance.json
outputs    hashes of the weight files, added with `ended` when the command is done
"""

from __future__ import annotations

import json
import os
import platform
import shlex
import subprocess
import time
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from vision_tower.common.files import read_object, write_text
from vision_tower.common.hashes import file_hash

FILE = "provenance.json"
WEIGHTS = ("*.safetensors", "*.bin")
PACKAGES = (
    "clips-mllm",
    "torch",
    "transformers",
    "accelerate",
    "deepspeed",
    "peft",
    "bitsandbytes",
    "datasets",
    "tokenizers",
    "lmms-eval",
)


def start_provenance(
    folder: Path, made_by: str, argv: list[str], inputs: Mapping[str, str | None], **facts: Any
) -> None:
    """Write provenance.json of a command that begins.

    Args:
        made_by: the command, such as `train`.
        argv: its arguments.
        inputs: file, folder or hub id by role; None if the command has no such input.
        facts: further fields.
    """
    tree = {
        "made_by": made_by,
        "command": command_line(made_by, argv),
        "ranks": int(os.environ.get("WORLD_SIZE", "1")),
        "git": git_revision(),
        "versions": versions(),
        "hardware": hardware(),
        "started": _now(),
        "inputs": {role: describe_input(name) for role, name in inputs.items() if name is not None},
    }
    _write(folder, tree | facts)


def finish_provenance(folder: Path) -> None:
    """Add the time and the hashes of the weight files."""
    files = sorted(file for pattern in WEIGHTS for file in folder.glob(pattern))
    _write(
        folder, read_provenance(folder) | {"ended": _now(), "outputs": {file.name: file_hash(file) for file in files}}
    )


def read_provenance(folder: Path) -> dict[str, Any]:
    """The provenance.json of a folder; empty if there is none."""
    return read_object(folder / FILE) if (folder / FILE).is_file() else {}


def describe_input(name: str) -> dict[str, Any]:
    """Name and absolute path; the hash changes when the file is edited, or when the folder is made again."""
    path = Path(name)
    hashed = path / FILE if path.is_dir() else path
    found = {"name": name} | ({"path": str(path.resolve())} if path.exists() else {})
    return found | ({"sha256": file_hash(hashed)} if hashed.is_file() else {})


def command_line(command: str, argv: list[str]) -> str:
    """The command with its arguments, as one would type it."""
    return shlex.join(["clips-mllm", command, *argv])


def versions() -> dict[str, str]:
    """Versions of Python, of this project and of the installed packages that affect results."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:  # an extra that is not installed
            continue
    return found


def hardware() -> dict[str, Any]:
    """System, CPUs, memory and GPUs of this machine."""
    import torch

    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "machine": platform.machine(),
        "system": platform.system(),
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_gib": round(memory / 2**30, 1),
        "gpus": [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())],
    }


def git_revision() -> str | None:
    """The revision of this code, also if the command runs in another repository."""
    words = ["git", "rev-parse", "HEAD"]
    try:
        done = subprocess.run(words, cwd=Path(__file__).parent, capture_output=True, text=True, check=False)
    except FileNotFoundError:  # git is not installed
        return None
    return done.stdout.strip() or None


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S%z")


def _write(folder: Path, tree: dict[str, Any]) -> None:
    write_text(folder / FILE, json.dumps(tree, indent=1, default=str) + "\n")
