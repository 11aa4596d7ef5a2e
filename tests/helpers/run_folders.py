"""Run folders with results, written without running anything."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

from PIL import Image


def write_run(root: Path, share: float, *, seed: int = 0, n: int = 400) -> Path:
    """A run whose easy-VQA answers are right with probability `share`, four questions per image, with all controls."""
    folder = root / "finetune"
    folder.mkdir(parents=True)
    for control, less in (("none", 0.0), ("shuffled", 0.2), ("blank", 0.25), ("no_image", 0.3)):
        write_result(folder, "" if control == "none" else f"_{control}", share - less, seed, n, control=control)
    for wording in (1, 2):
        write_result(folder, f"_wording{wording}", share - 0.02 * wording, seed, n, wording=wording)
    for stage in ("encoder", "align", "finetune"):
        (root / stage).mkdir(exist_ok=True)
        (root / stage / "recipe.yaml").write_text("training:\n  seed: 7\n")
        (root / stage / "provenance.json").write_text(json.dumps({"seed": 7}))
        lines = [json.dumps({"step": step, "loss": 4 / step}) for step in (1, 2, 4)]
        (root / stage / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    setting = {"name": "x", "value": 0.2, "error": 0.01}
    rows = [
        setting | {"objective": kind, "reduction": way, "budget": budget}
        for kind, way in (("clip-synthetic", "sub-caption"), ("clip-web", None))
        for budget in (8, 16, None)
    ]
    (root / "ablate").mkdir()
    (root / "ablate" / "ablation.json").write_text(json.dumps({"metric": "r5", "settings": rows}))
    Image.new("RGB", (24, 24), (255, 0, 0)).save(folder / "red.png")
    return root


def write_result(folder: Path, suffix: str, share: float, seed: int, n: int, **about: Any) -> None:
    rng = random.Random(seed)
    rows = []
    for place in range(n):
        right = rng.random() < share  # the same draws for every share: runs differ where they must
        row = {
            "task": "clips_easy_vqa",
            "doc_id": place,
            "prompt": f"what shape is in image {place // 4}?",
            "answer": "circle" if right else "square",
            "target": "circle",
            "correct": right,
            "cluster": str(place // 4),
            "scores": {"accuracy": [float(right), 1.0], "open_accuracy": [float(right), 1.0]},
            "image": "red.png" if place < 8 else None,
        }
        rows.append(row)
    got = sum(row["correct"] for row in rows) / n
    span = {"low": max(got - 0.05, 0), "high": min(got + 0.05, 1), "n": n, "clusters": n // 4}
    metrics = ("accuracy", "open_accuracy", "yes_no_accuracy")
    result = {
        "format": 2,
        "model": "m",
        "sha256": "ab" * 32,
        "command": "clips-mllm evaluate m",
        "seconds": 4005.0,
        "recipe": {"seed": 11},
        "versions": {"python": "3"},
        "hardware": {"cpus": 2, "gpus": []},
        "control": "none",
        "wording": 0,
        "tasks": {"clips_easy_vqa": {**dict.fromkeys(metrics, got), "n": n}},
        "intervals": {"clips_easy_vqa": dict.fromkeys(metrics, span)},
        "skipped": {"mmvet": "needs a judge"} if not suffix else {},
        "failed": {},
        "samples_file": f"lmms{suffix}_samples.jsonl",
    } | about
    (folder / f"lmms{suffix}.json").write_text(json.dumps(result))
    (folder / f"lmms{suffix}_samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
