"""Recorded fixed-seed losses of the three stages: a refactoring does not change them.

Bit-identical on the CPU model of the recording. Elsewhere kernels sum in a different order, so a tolerance applies.
After an intended change, copy the values of the failing assertion into `recorded_losses.json`.
"""

from __future__ import annotations

import json
import platform
from pathlib import Path
from typing import Any

import pytest
import torch

from clips_mllm.train import main as train
from tests.helpers import train_runs
from tests.helpers.pretrain_runs import arguments
from vision_tower.pretrain import main as pretrain

RECORD = Path(__file__).with_name("recorded_losses.json")
pytestmark = pytest.mark.usefixtures("one_thread")
TOLERANCE = 1e-4  # relative; rounding changes these few steps a hundred times less
LLM = {"stage.llm": "true", "data.group_by_length": "true"}
STAGES: dict[str, dict[str, Any]] = {
    "align": {"data.template": "plain"},
    "finetune": LLM | {"training.device_batch_size": 4},
    "lora": LLM | {"stage.adapter.kind": "lora", "stage.adapter.rank": 4},
}


def machine() -> str:
    """Return the properties that the last bits depend on."""
    cpus = Path("/proc/cpuinfo")
    lines = cpus.read_text().splitlines() if cpus.exists() else []
    model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown")
    return f"{platform.machine()}, {model}, {torch.backends.cpu.get_cpu_capability()}, torch {torch.__version__}"


def check(name: str, folder: Path) -> None:
    record = json.loads(RECORD.read_text())
    found = {field: train_runs.losses(folder, field) for field in ("loss", "grad_norm")}
    wanted = {field: record["stages"].get(name, {}).get(field) for field in found}
    if machine() == record["machine"]:
        assert found == wanted, json.dumps({name: found})
    else:
        for field, values in found.items():
            assert values == pytest.approx(wanted[field], rel=TOLERANCE), json.dumps({name: found})


def test_pretraining_losses(sample_world: Path, tmp_path: Path) -> None:
    """All loss terms, with two micro-batches."""
    values = {"training.device_batch_size": 8, "training.schedule": "cosine", "training.warmup_steps": 2}
    pretrain(arguments(sample_world, tmp_path, **values, **{"data.shuffle_buffer": 20}))
    check("pretrain", tmp_path)


@pytest.mark.parametrize("stage", STAGES)
def test_stage_losses(stage: str, mllm_dir: Path, sample_world: Path, tmp_path: Path) -> None:
    values = {"model.checkpoint": mllm_dir, "training.max_steps": 4, "training.warmup_ratio": 0.5} | STAGES[stage]
    train(train_runs.words(tmp_path, sample_world, **values))
    check(stage, tmp_path)
