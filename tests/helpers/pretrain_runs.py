"""Arguments and metrics of a tiny pretraining run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

TOWER = {"width": 32, "layers": 1, "mlp": 64, "heads": 2}


def arguments(world: Path, folder: Path, **values: Any) -> list[str]:
    fixed = {
        "output_dir": folder,
        "data.shards": world / "pretrain" / "*.tar",
        "data.augmentation.jitter": 0.2,
        "model.embed_dim": 16,
        "model.image_size": 96,
        "model.patch_size": 32,
        "model.text_length": 16,
        "model.target_length": 24,
        "model.vocabulary_size": 400,
        "training.global_batch_size": 16,
        "training.device_batch_size": 16,
        "training.learning_rate": 2e-3,
        "training.max_steps": 6,
        "training.log_every": 1,
        "training.precision": "fp32",
        "training.workers": 0,
        "training.schedule": "constant_with_warmup",
    }
    for tower in ("image", "text", "captioner"):
        fixed |= {f"model.{tower}.{name}": value for name, value in TOWER.items()}
    return [f"--{name}={value}" for name, value in (fixed | values).items()]


def metrics(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def losses(folder: Path) -> list[float]:
    return [row["loss"] for row in metrics(folder)]
