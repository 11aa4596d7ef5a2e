"""Pretraining's options: ZeRO, the average of the weights, locked towers, checkpointing, compilation, NaN, the log."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from test_pretrain import arguments, losses, metrics, pair, png, write_tar

from vision_tower.pretrain import main

ROOT = Path(__file__).parents[1]
NAMES = ["dog", "cat", "sun", "tree", "boat", "moon", "fish", "star"]
FULL_BATCH = {
    "data.augmentation.jitter": 0,
    "data.augmentation.gray_probability": 0,
    "data.augmentation.smallest_crop": 1,
}


@pytest.fixture(scope="module")
def tiny_world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two shards of eight pairs with one sentence each: a batch of sixteen is an epoch, in whatever order."""
    world = tmp_path_factory.mktemp("tiny")
    (world / "pretrain").mkdir()
    for shard in range(2):
        rows = [
            pair(
                f"{shard}{n}",
                web=f"a {name} {shard}",
                full=f"There is one {name} in {shard}.",
                picture=png(shard * 120 + 15 * n, 96),
            )
            for n, name in enumerate(NAMES)
        ]
        write_tar(world / "pretrain" / f"{shard}.tar", [member for row in rows for member in row])
    return world


def launch(words: list[str]) -> None:
    """Two ranks by DeepSpeed's launcher; a hang is killed and fails."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launcher = [sys.executable, "-m", "deepspeed.launcher.runner", "--num_gpus", "2", "--master_port", str(port)]
    process = subprocess.Popen(
        [*launcher, "--module", "vision_tower.pretrain", *words],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        said, _ = process.communicate(timeout=240)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        pytest.fail(f"two ranks hang:\n{process.communicate()[0][-3000:]}")
    assert process.returncode == 0, said[-3000:]


def distance(first: Path, second: Path) -> float:
    """Mean absolute difference of all weights of two files with the same names."""
    one, other = load_file(first), load_file(second)
    assert one.keys() == other.keys()
    return float(torch.cat([(one[name].float() - other[name].float()).abs().flatten() for name in one]).mean())


@pytest.mark.parametrize("stage", [2, 3])
def test_two_ranks_under_zero_equal_one(tiny_world: Path, tmp_path: Path, stage: int) -> None:
    """Loss, gradient norm, weights and their average after three steps, and again from a checkpoint on."""
    values = FULL_BATCH | {"training.max_steps": 3, "training.weight_decay": 0.2, "training.ema_decay": 0.9}
    main(arguments(tiny_world, tmp_path / "one", **values))
    zero = {
        "training.device_batch_size": 8,
        "training.deepspeed": ROOT / "configs" / "deepspeed" / f"zero{stage}.json",
        "training.save_every": 2,
    }
    two = tmp_path / "two"
    launch(arguments(tiny_world, two, **values | zero))
    one = tmp_path / "one"
    assert losses(two) == pytest.approx(losses(one), abs=1e-5)
    norms = [[row["grad_norm"] for row in metrics(folder)] for folder in (one, two)]
    assert norms[1] == pytest.approx(norms[0], rel=1e-4)
    for file in ("model.safetensors", "ema/model.safetensors", "tower/model.safetensors"):
        assert distance(one / file, two / file) < 1e-5, file
    moved = distance(one / "model.safetensors", one / "ema" / "model.safetensors")
    assert moved > 1e-4, "the average would pass for the weights"
