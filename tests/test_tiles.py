"""LLaVA-NeXT's tiles: the stock classes, counts that agree, a step of training, a checkpoint that reloads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import AutoProcessor, LlavaNextForConditionalGeneration, LlavaNextProcessor

from clips_mllm.checkpoint import load_mllm
from clips_mllm.data import InstructionCollator, InstructionDataset
from clips_mllm.tiles import grid, tiled_tokens, with_tiles
from clips_mllm.train_recipe import InstructionRecipe
from clips_mllm.trainer import supervised_loss

SIZES = [(96, 96), (300, 90), (80, 250), (20, 10), (97, 333)]


def test_layouts() -> None:
    assert grid(10, 4) == [[10, 20], [10, 30], [10, 40], [20, 10], [20, 20], [30, 10], [40, 10]]
    assert grid(10, 1) == []


@pytest.fixture(scope="module")
def tiled(mllm_dir: Path) -> Any:
    torch.manual_seed(0)
    loaded = load_mllm(mllm_dir, device="cpu", dtype="float32")
    loaded.processor.tokenizer.padding_side = "right"
    return with_tiles(loaded.model, loaded.processor, 4)


@pytest.mark.parametrize("size", SIZES)
def test_our_count_is_what_the_model_makes(size: tuple[int, int], tiled: Any) -> None:
    model, processor = tiled
    picture = Image.effect_noise(size, 60).convert("RGB")
    (count,) = tiled_tokens(processor, [picture])
    inputs = processor(text="<image>", images=[picture], return_tensors="pt")
    assert inputs["input_ids"].shape[1] == count > 9, "tiles beside the whole picture"
    with torch.no_grad():
        features = model.get_image_features(inputs["pixel_values"], inputs["image_sizes"]).pooler_output
    assert [len(one) for one in features] == [count]


@pytest.mark.parametrize("packing", ["none", "rows"])
def test_a_step_of_training_and_the_checkpoint(packing: Any, tiled: Any, tmp_path: Path) -> None:
    """Pictures of several shapes and a text in one batch; reloaded by the stock class, the loss is the same."""
    model, processor = tiled
    rows: list[Any] = [{"conversations": [{"from": "human", "value": "2?"}, {"from": "gpt", "value": "2."}]}]
    for number, size in enumerate(SIZES):
        Image.effect_noise(size, 60).convert("RGB").save(tmp_path / f"{number}.png")
        talk = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": f"{number}."}]
        rows.append({"image": f"{number}.png", "conversations": talk})
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    dataset = InstructionDataset(InstructionRecipe(file=str(tmp_path / "rows.json"), template="chatml"), processor)
    collator = InstructionCollator(processor, packing)
    batch = collator([dataset[at] for at in range(len(rows))])
    summed, count = supervised_loss(model, model, batch)
    assert count > 0
    summed.backward()
    assert model.model.image_newline.grad.abs().sum() > 0
    model.zero_grad()
    text_only = collator([dataset[0]])
    assert "image_sizes" in text_only, "a blank picture, so that every rank runs the tower"
    assert torch.isfinite(supervised_loss(model, model, text_only)[0])
    model.save_pretrained(tmp_path / "saved")
    processor.save_pretrained(tmp_path / "saved")
    stock, info = LlavaNextForConditionalGeneration.from_pretrained(tmp_path / "saved", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    with torch.no_grad():
        torch.testing.assert_close(supervised_loss(stock, stock, batch)[0], summed.detach())
    used = AutoProcessor.from_pretrained(tmp_path / "saved")
    assert isinstance(used, LlavaNextProcessor)
    picture = Image.open(tmp_path / "1.png")
    ids = used(text=used.apply_chat_template(dataset.examples[2].messages), images=[picture])["input_ids"][0]
    assert ids == dataset[2]["ids"]
