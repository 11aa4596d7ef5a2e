"""Another resolution, and runs that start from an encoder: against directly built models and open_clip."""

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

from vision_tower.checkpoints.encoder import load_encoder, save_encoder
from vision_tower.checkpoints.loading import at_resolution, continued, load_model
from vision_tower.common.errors import UserError
from vision_tower.model.modeling import ClipsModel
from vision_tower.model.positions import interpolate_positions
from vision_tower.model.recipe import ModelRecipe, TowerRecipe
from vision_tower.model.towers import tower_parts
from vision_tower.pretrain import load_tokenizer, model_config, starting_model
from vision_tower.pretrain import main as pretrain
from vision_tower.pretraining.recipe import PairsRecipe, PretrainRecipe
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
def test_sincos_positions_are_those_of_a_model_built_at_that_size(
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
def test_learned_positions_are_interpolated_as_open_clip_does(class_token: bool, side: int) -> None:
    torch.manual_seed(0)
    table = torch.randn(9 + class_token, 16)
    # open_clip knows towers with class token only.
    state = {"visual.positional_embedding": table if class_token else torch.cat([torch.zeros(1, 16), table])}
    resize_pos_embed(state, SimpleNamespace(visual=SimpleNamespace(grid_size=(side, side))))
    theirs = state["visual.positional_embedding"][0 if class_token else 1 :]
    torch.testing.assert_close(interpolate_positions(table, side, class_token), theirs, atol=1e-6, rtol=0)


@pytest.mark.parametrize("class_token", [False, True])
def test_learned_positions_of_a_model(tokenizer: ClipsTokenizer, class_token: bool) -> None:
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
    with pytest.raises(UserError, match="image size 7: smaller than one patch of 8 pixels"):
        at_resolution(model, 7)


def test_an_encoder_is_loaded_at_another_size_with_its_processor(encoder_dir: Path) -> None:
    encoder = load_encoder(encoder_dir, "cpu", image_size=160)
    image = Image.effect_noise((50, 30), 80).convert("RGB")
    pixels = encoder.processor(images=[image], return_tensors="pt")["pixel_values"]
    assert pixels.shape == (1, 3, 160, 160) and encoder.model.patches(pixels).shape[1] == 25
    assert encoder.embed_images([image]).norm().item() == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("config.json", "{", "config.json: line 1: not valid JSON"),
        ("model.safetensors", "no weights", "cannot be read as ClipsModel"),
        ("tokenizer.json", "{", "tokenizer.json: not a readable tokenizer"),
        ("tower/preprocessor_config.json", "{", "cannot be read as AutoImageProcessor"),
    ],
)
def test_a_damaged_encoder_is_named(encoder_dir: Path, tmp_path: Path, file: str, content: str, message: str) -> None:
    folder = Path(shutil.copytree(encoder_dir, tmp_path / "damaged"))
    (folder / file).write_text(content)
    with pytest.raises(UserError, match=message) as caught:
        load_encoder(folder, "cpu")
    assert str(caught.value).startswith(str(folder))


def test_a_device_that_is_not_here(encoder_dir: Path) -> None:
    with pytest.raises(UserError, match=r"device gpu: not usable here"):
        load_encoder(encoder_dir, "gpu")


@pytest.fixture
def trained(tokenizer: ClipsTokenizer, tmp_path: Path) -> Path:
    save_encoder(built(RECIPE, tokenizer), tokenizer, tmp_path / "first")
    return tmp_path / "first"


def test_a_run_starts_from_an_encoder_at_a_larger_size(trained: Path, tokenizer: ClipsTokenizer) -> None:
    recipe = dataclasses.replace(RECIPE, image_size=32, start_from=str(trained))
    whole = PretrainRecipe(output_dir="unused", data=PairsRecipe(shards="nowhere/*.tar"), model=recipe)
    own = load_tokenizer(whole)
    assert own.fast.get_vocab() == tokenizer.fast.get_vocab()
    model = starting_model(recipe, own)
    first = built(RECIPE, tokenizer)
    assert tower_parts(model.vision_model).positions.shape == (16, 16)
    for name, value in first.state_dict().items():
        if value is not tower_parts(first.vision_model).positions and "vision_model.embeddings.position" not in name:
            assert torch.equal(model.state_dict()[name], value), name
    trainable = {name for name, value in first.named_parameters() if value.requires_grad}
    assert {name for name, value in model.named_parameters() if value.requires_grad} == trainable


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image": dataclasses.replace(TOWER, layers=3)}, r"model\.image: .*layers=3.* in the recipe, .*layers=2"),
        ({"embed_dim": 12}, r"model\.embed_dim: 12 in the recipe, 10 in .*first"),
        ({"class_token": True}, r"model\.class_token: True in the recipe, False in "),
        ({"positions": "learned"}, r"model\.positions: learned in the recipe, sincos in "),
        ({"target_length": 8}, r"model\.target_length: 8 in the recipe, 7 in "),
        ({"patch_size": 4}, r"model\.patch_size: 4 in the recipe, 8 in "),
    ],
)
def test_a_start_of_another_shape_is_refused(
    trained: Path, tokenizer: ClipsTokenizer, changes: dict[str, object], message: str
) -> None:
    recipe = dataclasses.replace(RECIPE, **changes)
    with pytest.raises(UserError, match=message):
        continued(trained, recipe, model_config(recipe, tokenizer))


def test_a_start_without_captioner_gets_a_fresh_one(trained: Path, tokenizer: ClipsTokenizer) -> None:
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
def test_a_start_for_another_objective_keeps_the_towers_alone(
    trained: Path, tokenizer: ClipsTokenizer, name: Any, captioner: bool
) -> None:
    before = load_model(trained)
    continuation = continued(trained, RECIPE, model_config(RECIPE, tokenizer, OBJECTIVES[name]))
    assert (continuation.captioner is not None) is captioner
    assert torch.equal(continuation.visual_projection.weight, before.visual_projection.weight)
    if continuation.captioner is not None:  # that of CLIPS reads other things: nothing of it stays
        assert not torch.equal(continuation.captioner.head.weight, before.captioner.head.weight)


def test_a_start_that_is_none(tmp_path: Path, trained: Path, tokenizer: ClipsTokenizer) -> None:
    with pytest.raises(UserError, match=r"config\.json: missing"):
        continued(tmp_path / "none", RECIPE, model_config(RECIPE, tokenizer))
    shutil.copytree(trained, tmp_path / "bare", ignore=shutil.ignore_patterns("tokenizer*"))
    with pytest.raises(UserError, match=r"tokenizer\.json: missing"):
        ClipsTokenizer.from_pretrained(tmp_path / "bare")
    with pytest.raises(UserError, match=r"model\.vocabulary=vocab\.txt: the encoder in model\.start_from brings"):
        dataclasses.replace(RECIPE, start_from="run", vocabulary="vocab.txt").check()


def test_the_command_goes_on_at_a_larger_size(encoder_dir: Path, sample_world: Path, tmp_path: Path) -> None:
    """`clips-mllm pretrain` with `start_from`, at a learning rate that hardly moves anything."""
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


def test_a_tower_with_class_token_joins_an_llm(tokenizer: ClipsTokenizer, sample_world: Path, tmp_path: Path) -> None:
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
