"""GPUs and ranks that the scripts launch."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def launch(tmp_path: Path, **given: str) -> tuple[int, str]:
    """Return exit code and output of environment.sh with a fake `nvidia-smi` that finds GPUs."""
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\necho 'GPU 0: one'\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    kept = {name: value for name, value in os.environ.items() if name not in ("RANKS", "CUDA_VISIBLE_DEVICES")}
    environment = kept | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "PORT": "29501"} | given
    script = 'source scripts/environment.sh; echo "${LAUNCH[@]} on ${CUDA_VISIBLE_DEVICES:-all}"'
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", script], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    return done.returncode, (done.stdout + done.stderr).strip()


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({}, "deepspeed --quiet --master_port 29501 on all"),
        ({"RANKS": "2"}, "deepspeed --quiet --master_port 29501 --num_gpus 2 on all"),
        ({"CUDA_VISIBLE_DEVICES": "4,5,6,7"}, "deepspeed --quiet --master_port 29501 on 4,5,6,7"),
        # DeepSpeed's --num_gpus 2 would use GPUs 0 and 1.
        ({"RANKS": "2", "CUDA_VISIBLE_DEVICES": "4,5,6,7"}, "deepspeed --quiet --master_port 29501 on 4,5"),
    ],
)
def test_ranks_and_visible_gpus(tmp_path: Path, given: dict[str, str], words: str) -> None:
    assert launch(tmp_path, **given) == (0, words)


def test_more_ranks_than_gpus_are_refused(tmp_path: Path) -> None:
    code, output = launch(tmp_path, RANKS="3", CUDA_VISIBLE_DEVICES="4,5")
    assert code == 2 and output.startswith("error: ")


@pytest.mark.parametrize(("given", "policy"), [({}, "PASSIVE"), ({"OMP_WAIT_POLICY": "ACTIVE"}, "ACTIVE")])
def test_commands_set_passive_wait_policy(given: dict[str, str], policy: str) -> None:
    """Before torch is imported, which reads it once. Spinning threads slow down other processes."""
    code = """
import os, sys
from clips_mllm.cli import run
sys.argv[1:] = ["inspect", "--help"]
try:
    run()
except SystemExit:
    print(os.environ["OMP_WAIT_POLICY"], "torch" in sys.modules)
"""
    kept = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=kept | given, cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines()[-1] == f"{policy} False"


def test_cpu_has_one_rank_by_default(tmp_path: Path) -> None:
    (tmp_path / "nvidia-smi").write_text("#!/bin/sh\nexit 9\n")  # installed, without a driver
    (tmp_path / "nvidia-smi").chmod(0o755)
    script = 'source scripts/environment.sh; echo "$RANKS $DS_ACCELERATOR ${LAUNCH[*]:0:4}"'
    kept = {name: value for name, value in os.environ.items() if name not in ("RANKS", "DS_ACCELERATOR")}
    environment = kept | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    done = subprocess.run(["bash", "-c", script], cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "1 cpu python -u -m deepspeed.launcher.launch"
