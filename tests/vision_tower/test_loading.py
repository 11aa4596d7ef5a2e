"""Strict loading, other resolutions, and runs that start from an encoder."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from open_clip.model import resize_pos_embed
from PIL import Image
from safetensors.torch import load_file, save_file

from tests.helpers.errors import raises_user_error
from vision_tower.checkpoints.encoder import load_encoder, save_encoder
from vision_tower.checkpoints.loading import at_resolution, continued, load_model
from vision_tower.model.modeling import ClipsModel
from vision_tower.model.positions import interpolate_positions
from vision_tower.model.recipe import ModelRecipe, TowerRecipe
from vision_tower.model.towers import tower_parts
from vision_tower.pretrain import main as pretrain
from vision_tower.pretraining.recipe import PairsRecipe, PretrainRecipe
from vision_tower.pretraining.setup import initial_model, load_tokenizer, model_config
from vision_tower.text.objectives import OBJECTIVES
from vision_tower.text.tokenizer import ClipsTokenizer

TOWER = TowerRecipe(width=16, layers=2, mlp=24, heads=2)
RECIPE = ModelRecipe(
    image=TOWER,
    text=TowerRecipe(width=12, layers=1, mlp=24, heads=2),
    captioner=TowerRecipe(width=8, layers=1, mlp=16, heads=2),
    embed_dim=10,
    image_size=24,
    patch_size=8,
    text_length=9,
    target_length=7,
    vocabulary_size=60,
)


@pytest.fixture(scope="module")
def tokenizer() -> ClipsTokenizer:
    return ClipsTokenizer.train(["a dog and a cat", "the red hat"], 60)


def built(recipe: ModelRecipe, tokenizer: ClipsTokenizer) -> ClipsModel:
    torch.manual_seed(0)
    return ClipsModel.from_scratch(model_config(recipe, tokenizer)).eval()


@pytest.mark.parametrize("class_token", [False, True])
@pytest.mark.parametrize("size", [16, 48, 50])
def test_resized_sincos_model_equals_one_built_at_that_size(
    tokenizer: ClipsTokenizer, class_token: bool, size: int
) -> None:
    recipe = dataclasses.replace(RECIPE, class_token=class_token)
    small, direct = built(recipe, tokenizer), built(dataclasses.replace(recipe, image_size=size), tokenizer)
    resized = at_resolution(small, size).eval()
    assert resized.config.vision_config.image_size == size and small.config.vision_config.image_size == 24
    assert torch.equal(tower_parts(resized.vision_model).positions, tower_parts(direct.vision_model).positions)
    skipped = {name for name, value in direct.named_parameters() if value is tower_parts(direct.vision_model).positions}
    direct.load_state_dict({k: v for k, v in small.state_dict().items() if k not in skipped}, strict=False)
    pixels = torch.randn(2, 3, size, size)
    with torch.no_grad():
        assert torch.equal(resized.embed_images(pixels), direct.embed_images(pixels))
        ids = torch.randint(0, 20, (2, 9))
        first, second = (some(pixels, web_ids=ids, labels=ids[:, :5]).caption_sum for some in (resized, direct))
        assert torch.equal(first, second)
    assert not tower_parts(resized.vision_model).positions.requires_grad


@pytest.mark.parametrize("class_token", [False, True])
@pytest.mark.parametrize("side", [2, 3, 7])
def test_interpolated_positions_equal_open_clip(class_token: bool, side: int) -> None:
    torch.manual_seed(0)
    table = torch.randn(9 + class_token, 16)
    # open_clip has only towers with class token.
    state = {"visual.positional_embedding": table if class_token else torch.cat([torch.zeros(1, 16), table])}
    resize_pos_embed(state, SimpleNamespace(visual=SimpleNamespace(grid_size=(side, side))))
    theirs = state["visual.positional_embedding"][0 if class_token else 1 :]
    torch.testing.assert_close(interpolate_positions(table, side, class_token), theirs, atol=1e-6, rtol=0)


@pytest.mark.parametrize("class_token", [False, True])
def test_learned_positions_are_interpolated_others_kept(tokenizer: ClipsTokenizer, class_token: bool) -> None:
    model = built(dataclasses.replace(RECIPE, class_token=class_token, positions="learned"), tokenizer)
    positions = tower_parts(model.vision_model).positions
    with torch.no_grad():
        positions.normal_()
    resized = at_resolution(model, 40)
    expected = interpolate_positions(positions.detach().view(-1, 16), 5, class_token)
    found = tower_parts(resized.vision_model).positions
    assert found.requires_grad and torch.equal(found.view(-1, 16), expected)
    others = {name: value for name, value in model.state_dict().items() if "position_embedding" not in name}
    assert all(torch.equal(resized.state_dict()[name], value) for name, value in others.items())
    assert at_resolution(model, 24) is model
    with raises_user_error(key="image_size", value=7):
        at_resolution(model, 7)


def test_load_encoder_at_another_image_size(encoder_dir: Path) -> None:
    encoder = load_encoder(encoder_dir, "cpu", image_size=160)
    image = Image.effect_noise((50, 30), 80).convert("RGB")
    pixels = encoder.processor(images=[image], return_tensors="pt")["pixel_values"]
    assert pixels.shape == (1, 3, 160, 160) and encoder.model.patches(pixels).shape[1] == 25
    assert encoder.embed_images([image]).norm().item() == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize(
    ("file", "content", "named"),
    [
        ("config.json", "{", "config.json"),
        ("model.safetensors", "no weights", ""),
        ("tokenizer.json", "{", "tokenizer.json"),
        ("tower/preprocessor_config.json", "{", "tower"),
    ],
)
def test_damaged_file_is_named(encoder_dir: Path, tmp_path: Path, file: str, content: str, named: str) -> None:
    folder = Path(shutil.copytree(encoder_dir, tmp_path / "damaged"))
    (folder / file).write_text(content)
    with raises_user_error(file=folder / named):
        load_encoder(folder, "cpu")


@pytest.mark.parametrize("kind", ["missing", "unexpected", "mismatched"])
def test_checkpoint_with_other_weights_is_refused(encoder_dir: Path, tmp_path: Path, kind: str) -> None:
    folder = Path(shutil.copytree(encoder_dir, tmp_path / "damaged"))
    state = load_file(folder / "model.safetensors")
    value = state.pop("visual_projection.weight")
    changed = {"missing": {}, "unexpected": {"visual_projection.weight": value, "extra": value.clone()}}
    changed["mismatched"] = {"visual_projection.weight": value[:-1].clone()}
    save_file(state | changed[kind], folder / "model.safetensors", metadata={"format": "pt"})
    with raises_user_error(file=folder) as caught:
        load_encoder(folder, "cpu")
    assert kind in caught.value.problem
    assert ("extra" if kind == "unexpected" else "visual_projection.weight") in caught.value.problem


def test_unusable_device_is_refused(encoder_dir: Path) -> None:
    with raises_user_error(key="device", value="gpu"):
        load_encoder(encoder_dir, "gpu")


@pytest.fixture
def trained(tokenizer: ClipsTokenizer, tmp_path: Path) -> Path:
    save_encoder(built(RECIPE, tokenizer), tokenizer, tmp_path / "first")
    return tmp_path / "first"


def test_start_from_an_encoder_at_a_larger_image_size(trained: Path, tokenizer: ClipsTokenizer) -> None:
    recipe = dataclasses.replace(RECIPE, image_size=32, start_from=str(trained))
    whole = PretrainRecipe(output_dir="unused", data=PairsRecipe(shards="nowhere/*.tar"), model=recipe)
    own = load_tokenizer(whole)
    assert own.fast.get_vocab() == tokenizer.fast.get_vocab()
    model = initial_model(recipe, own)
    first = built(RECIPE, tokenizer)
    assert tower_parts(model.vision_model).positions.shape == (16, 16)
    for name, value in first.state_dict().items():
        if value is not tower_parts(first.vision_model).positions and "vision_model.embeddings.position" not in name:
            assert torch.equal(model.state_dict()[name], value), name
    trainable = {name for name, value in first.named_parameters() if value.requires_grad}
    assert {name for name, value in model.named_parameters() if value.requires_grad} == trainable


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("image", dataclasses.replace(TOWER, layers=3)),
        ("embed_dim", 12),
        ("class_token", True),
        ("positions", "learned"),
        ("target_length", 8),
        ("patch_size", 4),
    ],
)
def test_start_from_an_encoder_of_another_shape_is_refused(
    trained: Path, tokenizer: ClipsTokenizer, field: str, value: Any
) -> None:
    recipe = dataclasses.replace(RECIPE, **{field: value})
    with raises_user_error(key=f"model.{field}", value=value) as caught:
        continued(trained, recipe, model_config(recipe, tokenizer))
    assert str(trained) in str(caught.value)


def test_start_from_an_encoder_without_captioner_initializes_one(trained: Path, tokenizer: ClipsTokenizer) -> None:
    model = built(RECIPE, tokenizer)
    model.config.captioner_layers = 0
    model.captioner = None
    model.save_pretrained(trained)
    recipe = dataclasses.replace(RECIPE, captioner=TOWER, target_length=50)
    continuation = continued(trained, recipe, model_config(recipe, tokenizer))
    queries = continuation.captioner.queries
    assert queries.shape == (50, 16) and queries.std().item() == pytest.approx(1, rel=0.1)
    assert all(value.isfinite().all() for value in continuation.parameters())
    assert torch.equal(continuation.text_model.head.weight, model.text_model.head.weight)


@pytest.mark.parametrize(("name", "captioner"), [("clipa-mix", False), ("coca", True)])
def test_start_with_another_objective_keeps_only_the_towers(
    trained: Path, tokenizer: ClipsTokenizer, name: Any, captioner: bool
) -> None:
    before = load_model(trained)
    continuation = continued(trained, RECIPE, model_config(RECIPE, tokenizer, OBJECTIVES[name]))
    assert (continuation.captioner is not None) is captioner
    assert torch.equal(continuation.visual_projection.weight, before.visual_projection.weight)
    if continuation.captioner is not None:  # CLIPS' captioner has other inputs: no weight of it is kept
        assert not torch.equal(continuation.captioner.head.weight, before.captioner.head.weight)


def test_start_from_a_folder_without_encoder_is_refused(
    tmp_path: Path, trained: Path, tokenizer: ClipsTokenizer
) -> None:
    with raises_user_error(file=tmp_path / "none" / "config.json"):
        continued(tmp_path / "none", RECIPE, model_config(RECIPE, tokenizer))
    shutil.copytree(trained, tmp_path / "bare", ignore=shutil.ignore_patterns("tokenizer*"))
    with raises_user_error(file=tmp_path / "bare" / "tokenizer.json"):
        ClipsTokenizer.from_pretrained(tmp_path / "bare")
    with raises_user_error(key="model.vocabulary", value="vocab.txt"):
        dataclasses.replace(RECIPE, start_from="run", vocabulary="vocab.txt").check()


def test_pretrain_with_start_from_at_a_larger_size(encoder_dir: Path, sample_world: Path, tmp_path: Path) -> None:
    """`clips-mllm pretrain` with `start_from`, at a learning rate that hardly changes the weights."""
    towers = {f"model.{name}": "{width: 32, layers: 2, mlp: 64, heads: 2}" for name in ("image", "text", "captioner")}
    given = towers | {
        "output_dir": tmp_path / "larger",
        "data.shards": sample_world / "pretrain" / "*.tar",
        "model.start_from": encoder_dir,
        "model.embed_dim": 32,
        "model.image_size": 128,
        "model.patch_size": 32,
        "model.text_length": 24,
        "model.target_length": 32,
        "model.vocabulary_size": 400,
        "training.global_batch_size": 8,
        "training.device_batch_size": 8,
        "training.learning_rate": 1e-7,
        "training.max_steps": 2,
        "training.workers": 0,
        "training.precision": "fp32",
    }
    pretrain([f"--{name}={value}" for name, value in given.items()])
    before, after = load_encoder(encoder_dir, "cpu", image_size=128), load_encoder(tmp_path / "larger", "cpu")
    assert after.tokenizer.fast.get_vocab() == before.tokenizer.fast.get_vocab()
    moved = {
        name: (value - before.model.state_dict()[name]).abs().max().item()
        for name, value in after.model.state_dict().items()
    }
    assert 0 < max(moved.values()) < 1e-6
    size = after.processor(images=[Image.new("RGB", (9, 9))], return_tensors="pt")["pixel_values"].shape
    assert size == (1, 3, 128, 128)


def test_tower_with_class_token_works_in_an_mllm(tokenizer: ClipsTokenizer, sample_world: Path, tmp_path: Path) -> None:
    from clips_mllm.model.build import build_mllm
    from clips_mllm.model.checkpoint import load_mllm, save_mllm

    model = built(dataclasses.replace(RECIPE, class_token=True), tokenizer)
    save_encoder(model, tokenizer, tmp_path / "run")
    kinds: dict[str, Any] = {"feature_layer": -1, "feature_select": "default", "dtype": torch.float32}
    mllm, processor = build_mllm(str(tmp_path / "run" / "tower"), str(sample_world / "llm"), **kinds)
    save_mllm(mllm, processor, tmp_path / "mllm")
    loaded = load_mllm(tmp_path / "mllm", device="cpu")
    pixels = torch.randn(1, 3, 24, 24)
    seen: list[torch.Tensor] = []
    loaded.model.model.multi_modal_projector.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    with torch.no_grad():
        loaded.model.get_image_features(pixels)
        patches = model.patches(pixels)
    torch.testing.assert_close(seen[0].view(patches.shape), patches, atol=1e-6, rtol=0)
