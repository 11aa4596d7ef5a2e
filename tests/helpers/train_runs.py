"""Runs of `clips-mllm train` for the tests: command lines, processes, launchers, results."""

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
    """Load the weights of a checkpoint, or of an adapter merged into its base."""
    from clips_mllm.model.checkpoint import load_mllm

    state = load_mllm(folder, device="cpu", dtype="float32").model.state_dict()
    return {name: value.clone() for name, value in state.items()}


def words(folder: Path, world: Path, **values: Any) -> list[str]:
    """Return a command line for `train`: fp32, no loader processes, batches of 8, metrics of every step."""
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
    """Same number of threads as here: sums in another order differ in the last bit."""
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
    """Launcher of the first or second of two machines with a rank each."""
    runner = [sys.executable, "-m", "torch.distributed.run", "--nnodes", "2", "--node_rank", str(number)]
    return [*runner, "--master_addr", "127.0.0.1", "--master_port", str(port), "--nproc_per_node", "1", "-m"]


def accelerate_launcher(ranks: int = 2) -> list[str]:
    """As for GPUs: on CPUs accelerate starts one process and expects MPI to start the others."""
    runner = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_machines", "1"]
    return [*runner, "--num_processes", str(ranks), "--main_process_port", "0", "--mixed_precision", "no", "--module"]


def start(launcher: list[str], module: str, arguments: list[str]) -> subprocess.Popen[str]:
    """Start a process in its own session, so that all its children can be ended."""
    return subprocess.Popen(
        [*launcher, module, *arguments],
        env=subprocess_environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        preexec_fn=enable_ctrl_c,
    )


def enable_ctrl_c() -> None:
    """Undo the ignored SIGINT that children inherit if the tests run in the background."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def end_of(process: subprocess.Popen[str], seconds: float = 600) -> str:
    """Wait for the end and return the output; kill a process that hangs, and fail."""
    try:
        output, _ = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        pytest.fail(f"ranks hang:\n{process.communicate()[0][-3000:]}")
    return str(output)


def launch(launcher: list[str], module: str, arguments: list[str]) -> str:
    process = start(launcher, module, arguments)
    output = end_of(process)
    assert process.returncode == 0, output[-4000:]
    return output


def launch_several(launcher: list[str], file: Path, *runs: list[str], command: str = "train") -> str:
    """Start several runs by one launch; their command lines are written to `file`."""
    file.write_text(json.dumps([{"command": command, "arguments": run} for run in runs]))
    return launch(launcher, "tests.helpers.several_runs", [str(file)])


def until(reached: Callable[[], bool], process: subprocess.Popen[str], seconds: float = 600) -> None:
    """Wait for a condition; fail if the process ends first or the time is up."""
    end = time.monotonic() + seconds
    while not reached():
        if process.poll() is not None or time.monotonic() > end:
            process.kill()
            output = "".join(filter(None, process.communicate()))
            pytest.fail(f"process ended or timeout of {seconds:.0f} s:\n{output[-3000:]}")
        time.sleep(0.005)


def stop_after(
    folder: Path, checkpoint: int, arguments: list[str], stop: Callable[[subprocess.Popen[str]], None]
) -> tuple[int, str]:
    """Start the command, stop it once the checkpoint is complete; return exit code and stderr."""
    process = subprocess.Popen(
        [sys.executable, "-m", "clips_mllm.cli", "train", *arguments],
        env=subprocess_environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=enable_ctrl_c,
    )
    until((folder / f"checkpoint-{checkpoint}" / "trainer_state.json").exists, process)
    stop(process)
    _, output = process.communicate(timeout=300)
    return process.returncode, str(output)
