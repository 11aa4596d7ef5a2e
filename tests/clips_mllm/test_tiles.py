"""LLaVA-NeXT's tiles: the stock classes, counts that agree, both stages by the command, chat and evaluation."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import (
    AutoProcessor,
    CLIPImageProcessor,
    CLIPVisionConfig,
    CLIPVisionModel,
    LlavaNextForConditionalGeneration,
    LlavaNextProcessor,
)

from clips_mllm.data.collator import InstructionCollator
from clips_mllm.data.dataset import InstructionDataset
from clips_mllm.data.recipe import InstructionRecipe
from clips_mllm.merge import main as merge
from clips_mllm.model.build import build_mllm
from clips_mllm.model.checkpoint import load_mllm, save_mllm
from clips_mllm.model.tiles import grid, tiled_tokens, views, with_tiles
from clips_mllm.plan import main as plan
from clips_mllm.provenance.folder_kinds import find_kind
from clips_mllm.talk.engine import Engine
from clips_mllm.talk.images import InputImage
from clips_mllm.talk.sampling import Sampling
from clips_mllm.talk.web.attention import attention_maps
from clips_mllm.train import main
from clips_mllm.training.recipe import StageRecipe
from clips_mllm.training.stages import apply_stage, optimizer_groups
from clips_mllm.training.trainer import supervised_loss
from tests.helpers.conversations import row
from tests.helpers.errors import raises_user_error
from tests.helpers.tiny_llava import make_requests, plain_answer
from tests.helpers.train_runs import losses, weights

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
def test_token_count_equals_the_models(size: tuple[int, int], tiled: Any) -> None:
    model, processor = tiled
    image = Image.effect_noise(size, 60).convert("RGB")
    (count,) = tiled_tokens(processor, [image])
    inputs = processor(text="<image>", images=[image], return_tensors="pt")
    assert inputs["input_ids"].shape[1] == count > 9, "tiles in addition to the complete image"
    assert inputs["pixel_values"].shape[1] == views(processor, image)
    with torch.no_grad():
        features = model.get_image_features(inputs["pixel_values"], inputs["image_sizes"]).pooler_output
    assert [len(one) for one in features] == [count]


def test_tower_with_class_token(sample_world: Path, tmp_path: Path) -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    CLIPVisionModel(CLIPVisionConfig(**sizes, image_size=96, patch_size=32)).save_pretrained(tmp_path)
    CLIPImageProcessor(size={"shortest_edge": 96}, crop_size={"height": 96, "width": 96}).save_pretrained(tmp_path)
    made: dict[str, Any] = {"feature_layer": [-2, -1], "dtype": torch.float32, "tiles": 4}
    model, processor = build_mllm(str(tmp_path), str(sample_world / "llm"), feature_select="auto", **made)
    image = Image.effect_noise((97, 333), 60).convert("RGB")
    for side in (processor.image_processor.size, {"shortest_edge": 96}):  # the second as published
        processor.image_processor.size = side
        inputs = processor(text="<image>", images=[image], return_tensors="pt")
        (count,) = tiled_tokens(processor, [image])
        with torch.no_grad():
            features = model.get_image_features(inputs["pixel_values"], inputs["image_sizes"]).pooler_output
        assert inputs["input_ids"].shape[1] == len(features[0]) == count
    with raises_user_error(key="model.feature_select", value="full"):
        build_mllm(str(tmp_path), str(sample_world / "llm"), feature_select="full", **made)


@pytest.mark.parametrize("packing", ["none", "rows"])
def test_training_step_and_checkpoint(packing: Any, tiled: Any, tmp_path: Path) -> None:
    """Images of several shapes and a text in one batch. The stock class gives the same loss after reloading."""
    model, processor = tiled
    rows = [row("2?", "2.")]
    for number, size in enumerate(SIZES):
        Image.effect_noise(size, 60).convert("RGB").save(tmp_path / f"{number}.png")
        rows.append(row("<image>\nWhat?", f"{number}.", image=f"{number}.png"))
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
    assert "image_sizes" in text_only, "a blank image, so that every rank runs the tower"
    assert torch.isfinite(supervised_loss(model, model, text_only)[0])
    model.save_pretrained(tmp_path / "saved")
    processor.save_pretrained(tmp_path / "saved")
    stock, info = LlavaNextForConditionalGeneration.from_pretrained(tmp_path / "saved", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    with torch.no_grad():
        torch.testing.assert_close(supervised_loss(stock, stock, batch)[0], summed.detach())
    used = AutoProcessor.from_pretrained(tmp_path / "saved")
    assert isinstance(used, LlavaNextProcessor)
    image = Image.open(tmp_path / "1.png")
    ids = used(text=used.apply_chat_template(dataset.examples[2].messages), images=[image])["input_ids"][0]
    assert ids == dataset[2]["ids"]


def words(values: dict[str, Any]) -> list[str]:
    return [word for name, value in values.items() for word in (f"--{name}", str(value))]


@pytest.fixture(scope="module")
def recipe(sample_world: Path) -> dict[str, Any]:
    return {
        "data.images": sample_world / "llava" / "images",
        "data.template": "chatml",
        "data.max_length": 512,
        "training.precision": "fp32",
        "training.global_batch_size": 4,
        "training.device_batch_size": 4,
        "training.max_steps": 2,
        "training.log_every": 1,
        "training.workers": 0,
    }


@pytest.fixture(scope="module")
def parts(sample_world: Path, encoder_dir: Path) -> dict[str, Any]:
    file = sample_world / "llava" / "stage1.json"
    return {"model.tower": encoder_dir / "tower", "model.llm": sample_world / "llm", "data.file": file}


@pytest.fixture(scope="module")
def stages(
    sample_world: Path, recipe: dict[str, Any], parts: dict[str, Any], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """Stage 1, and from it stage 2 in full and with LoRA."""
    folder = tmp_path_factory.mktemp("stages")
    main(words(recipe | parts | {"output_dir": folder / "align", "model.tiles": 2}))
    second = {"model.checkpoint": folder / "align", "stage.llm": "true"}
    second["data.file"] = sample_world / "llava" / "stage2.json"
    main(words(recipe | second | {"output_dir": folder / "finetune"}))
    main(words(recipe | second | {"output_dir": folder / "lora", "stage.adapter.kind": "lora"}))
    return folder


def test_both_stages_write_stock_checkpoints(stages: Path) -> None:
    ends = []
    for name in ("align", "finetune"):
        stock, info = LlavaNextForConditionalGeneration.from_pretrained(stages / name, output_loading_info=True)
        assert not info["missing_keys"] and not info["unexpected_keys"]
        processor = LlavaNextProcessor.from_pretrained(stages / name)
        assert processor.image_processor.image_grid_pinpoints == stock.config.image_grid_pinpoints == grid(96, 2)
        image = Image.effect_noise((200, 90), 60).convert("RGB")
        content = [{"type": "image"}, {"type": "text", "text": "What?"}]
        text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
        inputs = processor(text=text, images=[image], return_tensors="pt")
        assert stock.generate(**inputs, max_new_tokens=3, min_new_tokens=3).shape[1] == inputs["input_ids"].shape[1] + 3
        assert isinstance(load_mllm(stages / name, device="cpu").model, LlavaNextForConditionalGeneration)
        assert "LLaVA-NeXT" in find_kind(stages / name).line
        ends.append(stock.model.image_newline)
    assert not torch.equal(*ends), "the end of a row trains with the projector"


def test_adapter_trains_and_saves_image_newline(stages: Path, tmp_path: Path) -> None:
    """In PEFT's file; loaded on its base, merged by the command, and on 4-bit weights."""
    from safetensors.torch import load_file

    base = load_mllm(stages / "align", device="cpu").model
    merge([str(stages / "lora"), str(tmp_path / "merged")])
    stock, info = LlavaNextForConditionalGeneration.from_pretrained(tmp_path / "merged", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    (saved,) = (
        value
        for name, value in load_file(stages / "lora" / "adapter_model.safetensors").items()
        if name.endswith("multi_modal_projector.image_newline")
    )
    assert not torch.equal(saved, base.model.image_newline)
    for options in ({}, {"quantize": "4bit"}):
        joined = load_mllm(stages / "lora", device="cpu", **options)
        assert isinstance(joined.processor, LlavaNextProcessor)
        torch.testing.assert_close(joined.model.model.image_newline.float(), saved)
    torch.testing.assert_close(stock.model.image_newline, saved)
    assert not any("multi_modal_projector.image_newline" in name for name in stock.state_dict())


def test_adapter_without_image_newline_uses_that_of_the_base(stages: Path, tmp_path: Path) -> None:
    """As written by other training code."""
    from safetensors.torch import load_file, save_file

    shutil.copytree(stages / "lora", tmp_path / "lora")
    file = tmp_path / "lora" / "adapter_model.safetensors"
    save_file({name: value for name, value in load_file(file).items() if "image_newline" not in name}, file)
    base, joined = (load_mllm(folder, device="cpu").model for folder in (stages / "align", tmp_path / "lora"))
    assert torch.equal(base.model.image_newline, joined.model.image_newline)


def test_resume_with_tiles_is_bit_identical(stages: Path, recipe: dict[str, Any], sample_world: Path) -> None:
    """With LoRA, whose checkpoint contains `image_newline`: losses and weights of the uninterrupted run."""
    values = {"model.checkpoint": stages / "align", "stage.llm": "true", "stage.adapter.kind": "lora"}
    values |= {"data.file": sample_world / "llava" / "stage2.json", "training.save_every": 1}
    folder = stages / "goes-on"
    given = words(recipe | values | {"output_dir": folder, "training.keep_checkpoints": 2})
    main(given)
    shutil.rmtree(folder / "checkpoint-2")
    main(given)
    assert losses(folder) == losses(stages / "lora")
    before, after = weights(stages / "lora"), weights(folder)
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_image_newline_is_in_the_projectors_group(tiled: Any) -> None:
    model, _ = tiled
    stage = StageRecipe(projector_learning_rate=0.5)
    apply_stage(model, stage)
    (group,) = (
        group
        for group in optimizer_groups(model, stage, 0.1)
        if any(weights is model.model.image_newline for weights in group["params"])
    )
    assert group["lr"] == 0.5 and group["weight_decay"] == 0
    model.requires_grad_(True)


BAD = [
    ({"model.tiles": 1}, "model.tiles"),
    ({"model.tiles": 2, "data.image_aspect_ratio": "pad"}, "data.image_aspect_ratio"),
    ({"model.tiles": 2, "data.feature_cache": "cache"}, "data.feature_cache"),
]


@pytest.mark.parametrize(("values", "key"), BAD)
def test_options_that_exclude_tiles(
    values: dict[str, Any], key: str, recipe: dict[str, Any], parts: dict[str, Any], tmp_path: Path
) -> None:
    with raises_user_error(key=key):
        main(words(recipe | parts | values | {"output_dir": tmp_path / "run"}))
    assert not (tmp_path / "run").exists()


def test_tiles_are_chosen_in_stage_1(recipe: dict[str, Any], parts: dict[str, Any], mllm_dir: Path) -> None:
    values = {"model.checkpoint": mllm_dir, "data.file": parts["data.file"], "model.tiles": 2, "output_dir": "run"}
    with raises_user_error(key="model.tiles", value=2):
        main(words(recipe | values))


def test_plan_refuses_tiles(stages: Path, recipe: dict[str, Any], parts: dict[str, Any]) -> None:
    for model, fields in (
        ({"model.tiles": 2, "model.tower": parts["model.tower"], "model.llm": parts["model.llm"]}, {"value": 2}),
        ({"model.checkpoint": stages / "align"}, {"file": stages / "align"}),
    ):
        with raises_user_error(**fields):
            plan(words(recipe | model | {"data.file": parts["data.file"]}))


@pytest.fixture(scope="module")
def tiled_mllm(chat_mllm: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """With tiles, and weights so large that every prompt and image has a different answer."""
    loaded = load_mllm(chat_mllm, device="cpu")
    torch.manual_seed(1)
    folder = tmp_path_factory.mktemp("tiled_mllm")
    save_mllm(*with_tiles(loaded.model, loaded.processor, 4), folder)
    return load_mllm(folder, device="cpu")


ASKED: list[tuple[list[tuple[int, int]], str]] = [
    ([(300, 90)], "Which?"),
    ([(96, 96), (80, 250)], "And these?"),
    ([], "None?"),
    ([(300, 90)], "Which one?"),
]


def test_chat_with_tiles(tiled_mllm: Any) -> None:
    with Engine(tiled_mllm) as engine:
        for sizes, text in ASKED:
            shown = [Image.radial_gradient("L").resize(size).convert("RGB") for size in sizes]
            content: list[Any] = [*({"type": "image"} for _ in shown), {"type": "text", "text": text}]
            prompt = engine.prompt([{"role": "user", "content": content}], [InputImage(image) for image in shown])
            answer = "".join(engine.answer(prompt, Sampling(max_new_tokens=6)))
            assert answer.strip() == plain_answer(tiled_mllm, shown, text).strip()
            maps = attention_maps(engine, prompt, "this")
            assert [tuple(one.shape) for one in maps] == [(3, 3)] * len(shown), "of the whole image"


def test_evaluation_with_tiles(tiled_mllm: Any) -> None:
    from clips_eval.lmms.model import ClipsMllm

    documents = [
        ([Image.radial_gradient("L").resize(size).convert("RGB") for size in sizes], text) for sizes, text in ASKED
    ]
    model = ClipsMllm(mllm=tiled_mllm, batch_size=4)
    answers = model.generate_until(make_requests(documents, model))
    assert answers == [plain_answer(tiled_mllm, *document) for document in documents]
