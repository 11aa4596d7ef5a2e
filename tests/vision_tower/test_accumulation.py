"""Gradient cache in `clips-mllm pretrain`: accumulation trains as one batch does."""

from __future__ import annotations

import collections
import json
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.helpers.train_runs import launch_several, torchrun_launcher
from vision_tower.model.config import ClipsConfig
from vision_tower.model.modeling import ClipsModel
from vision_tower.model.step_loss import StepLoss
from vision_tower.pretrain import main
from vision_tower.text.objectives import OBJECTIVES
from vision_tower.text.tokenizer import IGNORED

TOWER = {"width": 32, "layers": 1, "mlp": 64, "heads": 2}


def arguments(world: Path, folder: Path, **values: Any) -> list[str]:
    fixed = {
        "output_dir": folder,
        "data.shards": world / "pretrain" / "*.tar",
        "model.embed_dim": 16,
        "model.image_size": 96,
        "model.patch_size": 32,
        "model.text_length": 16,
        "model.target_length": 24,
        "model.vocabulary_size": 400,
        "training.global_batch_size": 16,
        "training.device_batch_size": 16,
        "training.learning_rate": 1e-3,
        "training.max_steps": 3,
        "training.log_every": 1,
        "training.precision": "fp32",
        "training.workers": 0,
        "training.beta2": 0.95,
    }
    for tower in ("image", "text", "captioner"):
        fixed |= {f"model.{tower}.{name}": value for name, value in TOWER.items()}
    return [f"--{name}={value}" for name, value in (fixed | values).items()]


def losses(folder: Path) -> list[dict[str, float]]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k.startswith("loss") or k in ("temperature", "grad_norm")} for row in rows]


def assert_same_run(found: Path, expected: Path) -> None:
    for row, wanted in zip(losses(found), losses(expected), strict=True):
        assert row == pytest.approx(wanted, abs=1e-4)
    first, second = load_file(found / "model.safetensors"), load_file(expected / "model.safetensors")
    assert set(first) == set(second)
    for name, value in second.items():
        if name.endswith("k_proj.bias"):  # softmax is invariant to it: Adam scales up rounding noise
            continue
        assert (first[name] - value).abs().mean() < 2e-5, name


@pytest.mark.parametrize("objective", ["clips", "clipa-mix"])
def test_accumulation_equals_one_batch(sample_world: Path, tmp_path: Path, objective: str) -> None:
    for size in (16, 4):
        main(arguments(sample_world, tmp_path / str(size), objective=objective, **{"training.device_batch_size": size}))
    assert_same_run(tmp_path / "4", tmp_path / "16")
    assert ("loss_caption" in losses(tmp_path / "4")[0]) is (objective == "clips")


@pytest.mark.slow
def test_accumulation_on_two_ranks_equals_one_batch_per_rank(sample_world: Path, tmp_path: Path) -> None:
    """Each rank reads its own shards, so the reference is two ranks with their batch in one piece.

    The logged terms are those of the global batch, so the logged loss is their sum.
    """
    runs = [
        arguments(sample_world, tmp_path / str(size), **{"training.device_batch_size": size, "training.workers": 1})
        for size in (8, 2)
    ]
    launch_several(torchrun_launcher(), tmp_path / "runs.json", *runs, command="pretrain")
    assert_same_run(tmp_path / "2", tmp_path / "8")
    for row in losses(tmp_path / "8"):
        assert row["loss"] == pytest.approx((row["loss_web"] + row["loss_sub"]) / 2 + 2 * row["loss_caption"], abs=1e-3)
    assert (tmp_path / "8" / "tower" / "model.safetensors").is_file()


# --- one step


def model() -> ClipsModel:
    torch.manual_seed(0)
    tower = {"hidden_size": 16, "num_hidden_layers": 1, "intermediate_size": 32, "num_attention_heads": 2}
    return ClipsModel.from_scratch(
        ClipsConfig(
            vision_config=tower | {"image_size": 24, "patch_size": 8, "vision_use_head": False},
            text_config=tower | {"max_position_embeddings": 7, "vocab_size": 50, "projection_size": 12},
            captioner_width=16,
            captioner_layers=2,
            captioner_heads=2,
            captioner_mlp=32,
            captioner_queries=6,
            projection_dim=12,
        )
    )


def batch(pairs: int) -> dict[str, Any]:
    torch.manual_seed(1)
    labels = torch.randint(0, 50, (pairs, 6))
    for row in range(pairs):
        labels[row, 1 + row % 6 :] = IGNORED
    return {
        "keys": [str(row) for row in range(pairs)],
        "pixel_values": torch.randn(pairs, 3, 24, 24),
        "web_ids": torch.randint(0, 50, (pairs, 7)),
        "sub_ids": torch.randint(0, 50, (pairs, 7)),
        "labels": labels,
    }


def step(
    some: ClipsModel, whole: dict[str, Any], size: int, weights: Mapping[str, float] = OBJECTIVES["clips"].weights
) -> tuple[float, dict[str, torch.Tensor]]:
    """Return loss and gradients of one step in micro-batches of `size`."""
    count = len(whole["keys"]) // size
    parts = [{name: value[n * size :][:size] for name, value in whole.items()} for n in range(count)]
    for part in parts:  # copies, so that none keeps the memory of the others
        part.update({name: value.clone() for name, value in part.items() if isinstance(value, torch.Tensor)})
    loss = StepLoss(weights)
    loss.start(parts)
    total = 0.0
    for part in parts:
        losses = loss(some, part, lambda moved: moved)
        (losses.total / count).backward()
        total += losses.total.item() / count
    return total, {name: value.grad for name, value in some.named_parameters() if value.grad is not None}


@pytest.mark.parametrize("weights", [OBJECTIVES["clips"].weights, {"sub": 1.0, "caption": 2.0}, {"caption": 2.0}])
@pytest.mark.parametrize("size", [6, 4, 1])
def test_gradients_equal_those_of_the_full_batch(size: int, weights: dict[str, float]) -> None:
    whole = batch(12)
    expected, wanted = step(model(), whole, 12, weights)
    found, gradients = step(model(), whole, size, weights)
    assert found == pytest.approx(expected, abs=1e-5) and set(gradients) == set(wanted)
    for name, value in wanted.items():
        torch.testing.assert_close(gradients[name], value, atol=1e-5, rtol=0, msg=name)


def max_kept(pairs: int, size: int) -> int:
    """Return the peak bytes of tensors saved for backward passes, without parameters."""
    some, whole = model(), batch(pairs)
    fixed = {value.untyped_storage().data_ptr() for value in (*some.parameters(), *some.buffers())}
    held: collections.Counter[int] = collections.Counter()  # references by storage
    sizes: dict[int, int] = {}
    most = 0

    class Kept:
        def __init__(self, value: torch.Tensor) -> None:
            nonlocal most
            self.value = value
            place = value.untyped_storage().data_ptr()
            held[place] += 1
            sizes[place] = 0 if place in fixed else value.untyped_storage().nbytes()
            most = max(most, sum(sizes[at] for at, times in held.items() if times))
            weakref.finalize(self, lambda: held.subtract([place]))

    with torch.autograd.graph.saved_tensors_hooks(Kept, lambda kept: kept.value):
        step(some, whole, size)
    return most


def test_activation_memory_does_not_grow_with_micro_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vision_tower.model.losses.LOGITS_CHUNK", 512)
    few, many = max_kept(8, 4), max_kept(64, 4)
    assert many < 1.1 * few  # only the embeddings grow: (pairs, 12) numbers
    assert max_kept(64, 64) > 10 * few
