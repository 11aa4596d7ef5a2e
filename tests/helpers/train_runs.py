"""Runs of `clips-mllm train` for the tests: command lines, processes, launchers, what they leave."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parents[2]


def losses(folder: Path, field: str = "loss") -> list[float]:
    return [json.loads(line)[field] for line in (folder / "metrics.jsonl").read_text().splitlines()]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """Of a checkpoint, or of an adapter merged into its base."""
    from clips_mllm.model.checkpoint import load_mllm

    state = load_mllm(folder, device="cpu", dtype="float32").model.state_dict()
    return {name: value.clone() for name, value in state.items()}


def words(folder: Path, world: Path, **values: Any) -> list[str]:
    """A command line for `train`: fp32, one sample after the other, small batches, a line of metrics every step."""
    defaults = {
        "output_dir": folder,
        "data.file": world / "llava" / "stage2.json",
        "data.images": world / "llava" / "images",
        "data.template": "chatml",
        "training.precision": "fp32",
        "training.global_batch_size": 8,
        "training.device_batch_size": 8,
        "training.max_steps": 3,
        "training.log_every": 1,
        "training.workers": 0,
        "training.learning_rate": 3e-3,
    }
    return [word for name, value in (defaults | values).items() for word in (f"--{name}", str(value))]


def subprocess_environment() -> dict[str, str]:
    """Also: as many threads as here, for sums in another order differ in the last bit."""
    paths = os.pathsep.join([str(ROOT), str(ROOT / "eval")])
    threads = str(torch.get_num_threads())
    return os.environ | {
        "PYTHONPATH": paths,
        "OMP_NUM_THREADS": threads,
        "HF_HUB_OFFLINE": "1",
        "DS_ACCELERATOR": "cpu",
    }


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def deepspeed_launcher(ranks: int = 2) -> list[str]:
    runner = [sys.executable, "-m", "deepspeed.launcher.runner", "--num_gpus", str(ranks)]
    return [*runner, "--master_port", str(free_port()), "--module"]


def torchrun_launcher(ranks: int = 2) -> list[str]:
    return [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks), "-m"]


def machine_launcher(number: int, port: int) -> list[str]:
    """That of the first or the second of two machines, with a rank each."""
    runner = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--node_rank", str(number)]
    return [*runner, "--master_addr", "127.0.0.1", "--master_port", str(port), "--nproc_per_node", "1", "-m"]


def accelerate_launcher(ranks: int = 2) -> list[str]:
    """As for GPUs: told that there are CPUs, accelerate starts one process, and leaves the others to MPI."""
    runner = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_machines", "1"]
    return [*runner, "--num_processes", str(ranks), "--main_process_port", "0", "--mixed_precision", "no", "--module"]


def start(launcher: list[str], module: str, arguments: list[str]) -> subprocess.Popen[str]:
    """In a session of its own, so that all of it can be ended."""
    return subprocess.Popen(
        [*launcher, module, *arguments],
        env=subprocess_environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        preexec_fn=heed_ctrl_c,
    )


def heed_ctrl_c() -> None:
    """Whoever starts the tests in the background leaves Ctrl-C ignored, and children inherit that."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def end_of(process: subprocess.Popen[str], seconds: float = 600) -> str:
    """What it said, once it has ended; a hang is killed and fails."""
    try:
        said, _ = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        pytest.fail(f"the ranks hang:\n{process.communicate()[0][-3000:]}")
    return str(said)


def launch(launcher: list[str], module: str, arguments: list[str]) -> str:
    process = start(launcher, module, arguments)
    said = end_of(process)
    assert process.returncode == 0, said[-4000:]
    return said


def launch_several(launcher: list[str], file: Path, *runs: list[str], command: str = "train") -> str:
    """One launch for several runs, whose command lines go into `file`."""
    file.write_text(json.dumps([{"command": command, "arguments": run} for run in runs]))
    return launch(launcher, "tests.helpers.several_runs", [str(file)])


def until(there: Callable[[], bool], process: subprocess.Popen[str], seconds: float = 600) -> None:
    """Wait while the process runs; where it ends before, or the time is up, the test fails."""
    end = time.monotonic() + seconds
    while not there():
        if process.poll() is not None or time.monotonic() > end:
            process.kill()
            said = "".join(filter(None, process.communicate()))
            pytest.fail(f"ended, or not there in {seconds:.0f} s:\n{said[-3000:]}")
        time.sleep(0.005)


def stop_after(
    folder: Path, checkpoint: int, arguments: list[str], stop: Callable[[subprocess.Popen[str]], None]
) -> tuple[int, str]:
    """Start the command, stop it once the checkpoint is complete; its exit code and what it said."""
    process = subprocess.Popen(
        [sys.executable, "-m", "clips_mllm.cli", "train", *arguments],
        env=subprocess_environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=heed_ctrl_c,
    )
    until((folder / f"checkpoint-{checkpoint}" / "trainer_state.json").exists, process)
    stop(process)
    _, said = process.communicate(timeout=300)
    return process.returncode, str(said)
