"""Packed rows: same loss and gradients as unpacked ones, no longer row, every image with its tokens."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch

from clips_mllm.data.collator import InstructionCollator, first_fit, pack, packing_for
from clips_mllm.data.recipe import InstructionRecipe
from clips_mllm.model.checkpoint import Mllm
from clips_mllm.prompts.conversation import IGNORED
from clips_mllm.training.trainer import supervised_loss
from tests.helpers.conversations import make_image, open_rows, row
from tests.helpers.train_runs import losses, words


@pytest.mark.parametrize("seed", range(5))
def test_first_fit_places_every_sample_once_without_overflow(seed: int) -> None:
    rng = random.Random(seed)
    lengths = [rng.randint(1, 60) for _ in range(rng.randint(1, 40))]
    rows = first_fit(lengths, max(lengths))
    assert sorted(at for row in rows for at in row) == list(range(len(lengths)))
    sums = [sum(lengths[at] for at in row) for row in rows]
    assert max(sums) == max(lengths), "no row is longer than the longest sample"
    assert len(rows) <= -(-11 * sum(lengths) // (9 * max(lengths))) + 1, "first-fit decreasing's bound"
    assert first_fit(lengths, sum(lengths)) == [sorted(range(len(lengths)), key=lambda at: -lengths[at])]


def test_packed_rows_by_hand() -> None:
    samples: list[dict[str, Any]] = [
        {"ids": [1, 2], "labels": [IGNORED, 2]},
        {"ids": [3, 4, 5, 6], "labels": [IGNORED] * 3 + [6]},
        {"ids": [7], "labels": [IGNORED]},
    ]
    packed = pack(samples, first_fit([2, 4, 1], 4), pad=0)
    assert packed["input_ids"].tolist() == [[3, 4, 5, 6], [1, 2, 7, 0]]
    assert packed["labels"].tolist() == [[IGNORED] * 3 + [6], [IGNORED, 2, IGNORED, IGNORED]]
    assert packed["position_ids"].tolist() == [[0, 1, 2, 3], [0, 1, 0, 0]]


def samples(folder: Path, mllm: Mllm, kind: str) -> list[dict[str, Any]]:
    rows = []
    for number, length in enumerate((40, 3, 11, 2, 25, 1)):
        question, answer = "Say " + "one two " * number, "a cat and a dog " * length
        if kind == "images" and number % 3 != 1:
            make_image(folder / f"{number}.png", (40 * number, 90, 250 - 40 * number))
            rows.append(row("<image>\n" + question, answer, image=f"{number}.png"))
        else:
            rows.append(row(question, answer))
    dataset = open_rows(folder, rows, mllm)
    return [dataset[at] for at in range(len(rows))]


def loss_and_gradients(mllm: Mllm, batch: dict[str, torch.Tensor]) -> tuple[float, int, dict[str, torch.Tensor]]:
    model = mllm.model.requires_grad_(True)
    model.zero_grad()
    summed, count = supervised_loss(model, model, batch)
    (summed / count).backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return float((summed / count).detach()), int(count), found


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", ["images", "text"])
@pytest.mark.parametrize("layout", ["rows", "one_row"])
def test_packed_loss_and_gradients_equal_unpacked(
    layout: Any, kind: str, attention: str, mllm: Mllm, tmp_path: Path
) -> None:
    mllm.model.set_attn_implementation(attention)
    given = samples(tmp_path, mllm, kind)
    plain = InstructionCollator(mllm.processor)(given)
    packed = InstructionCollator(mllm.processor, layout)(given)
    assert packed["input_ids"].numel() < 0.7 * plain["input_ids"].numel(), "less padding"
    assert packed["input_ids"].shape[1] <= plain["input_ids"].shape[1] or layout == "one_row"
    assert "attention_mask" not in packed
    loss, count, gradients = loss_and_gradients(mllm, plain)
    found, packed_count, packed_gradients = loss_and_gradients(mllm, packed)
    assert packed_count == count
    assert found == pytest.approx(loss, abs=1e-5)
    assert set(gradients) == set(packed_gradients)
    for name, wanted in gradients.items():
        torch.testing.assert_close(
            packed_gradients[name], wanted, atol=2e-5, rtol=1e-3, msg=lambda m, n=name: f"{n}: {m}"
        )
    broken = packed | {"position_ids": torch.arange(packed["input_ids"].shape[1]).expand_as(packed["input_ids"])}
    assert abs(loss_and_gradients(mllm, broken)[0] - loss) > 1e-3, "without restarts samples would see each other"


def test_packing_depends_on_recipe_and_attention() -> None:
    recipe = InstructionRecipe(file="a.json", template="chatml", packing=True)
    assert packing_for(recipe, "sdpa") == packing_for(recipe, "eager") == "rows"
    assert packing_for(recipe, "flash_attention_2") == "one_row"
    assert packing_for(InstructionRecipe(file="a.json", template="chatml"), "sdpa") == "none"


def test_packing_does_not_change_the_training_losses(mllm_dir: Path, sample_world: Path, tmp_path: Path) -> None:
    from clips_mllm.train import main

    curves = []
    for packing in ("false", "true"):
        values = {"model.checkpoint": mllm_dir, "stage.llm": "true", "data.packing": packing}
        main(words(tmp_path / packing, sample_world, **values, **{"training.max_steps": 2}))
        curves.append(losses(tmp_path / packing))
    assert len(curves[0]) == 2
    assert curves[1] == pytest.approx(curves[0], abs=1e-5)
