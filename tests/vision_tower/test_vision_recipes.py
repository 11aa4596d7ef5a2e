"""The recipes in configs/vision against the tables of the paper."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from vision_tower.common.recipe import parse_recipe
from vision_tower.model.modeling import ClipsModel
from vision_tower.model.recipe import ModelRecipe, TowerRecipe
from vision_tower.pretraining.recipe import PretrainRecipe
from vision_tower.pretraining.setup import model_config
from vision_tower.text.tokenizer import ClipsTokenizer

CONFIGS = Path(__file__).parents[2] / "configs" / "vision"
# width, layers, mlp, heads of the image tower, then of the text tower and the captioner; embed_dim
SIZES = {
    "ti": ((192, 12, 768, 3), (192, 12, 768, 3), 192),
    "s": ((384, 12, 1536, 6), (384, 12, 1536, 6), 384),
    "b": ((768, 12, 3072, 12), (512, 12, 2048, 8), 512),
    "l": ((1024, 24, 4096, 16), (768, 12, 3072, 12), 768),
    "so400m": ((1152, 27, 4304, 16), (1152, 27, 4304, 16), 1152),
    "h": ((1280, 32, 5120, 16), (1024, 24, 4096, 16), 1024),
}
# global batch, learning rate, samples seen, warmup samples
STAGES = {
    "ablation": (32_768, 1.024e-3, 2.56e9, 26e6),
    "pretrain": (32_768, 1.024e-3, 12.8e9, 51e6),
    "finetune": (16_384, 2.56e-5, 1.02e9, 26e6),
    "high": (8_192, 3.2e-6, 256e6, 0),
}
STAGE_OF_PIXELS = {112: "ablation", 84: "pretrain", 160: "pretrain", 224: "finetune"} | dict.fromkeys(
    (336, 378, 384), "high"
)
RECIPES = {
    file.stem: parse_recipe(PretrainRecipe, ["--config", str(file)], command="pretrain")
    for file in sorted(CONFIGS.glob("*[0-9]_*.yaml"))
}


def tower(numbers: tuple[int, int, int, int]) -> TowerRecipe:
    width, layers, mlp, heads = numbers
    return TowerRecipe(width=width, layers=layers, mlp=mlp, heads=heads)


@pytest.mark.parametrize("name", RECIPES)
def test_recipe_matches_the_paper(name: str) -> None:
    recipe = RECIPES[name]
    parts = re.fullmatch(rf"({'|'.join(SIZES)})(\d+)_(\d+)", name)
    assert parts is not None
    image, text, embed_dim = SIZES[parts[1]]
    model, training = recipe.model, recipe.training
    assert (model.image, model.text, model.captioner, model.embed_dim) == (
        tower(image),
        tower(text),
        tower(text),
        embed_dim,
    )
    assert (model.image_size, model.patch_size) == (int(parts[3]), int(parts[2]))
    assert (model.text_length, model.target_length, model.vocabulary_size) == (80, 128, 32_000)
    assert (recipe.output_dir, training.weight_decay, training.beta1, training.beta2) == (
        f"runs/{name}",
        0.2,
        0.9,
        0.95,
    )
    stage = STAGE_OF_PIXELS[model.image_size]
    batch, rate, samples, warm_up = STAGES[stage]
    assert (training.global_batch_size, training.learning_rate, training.schedule) == (batch, rate, "cosine")
    assert training.max_steps * batch == pytest.approx(samples, rel=0.005)
    assert training.warmup_steps * batch == pytest.approx(warm_up, rel=0.001) and training.warmup_ratio == 0
    assert (model.start_from is None) == (stage in ("ablation", "pretrain"))


def test_later_stages_start_from_the_same_model_at_lower_resolution() -> None:
    for name, recipe in RECIPES.items():
        if recipe.model.start_from is None:
            continue
        before = recipe.model.start_from.removeprefix("runs/")
        run = name.partition("_")[0]
        # S and B start at 160 pixels with the ablation recipe and three changes, given in its first lines.
        source = RECIPES.get(before) or RECIPES[f"{run}_112"]
        same = {"image_size": 0, "start_from": None, "vocabulary": None}
        assert dataclasses.replace(recipe.model, **same) == dataclasses.replace(source.model, **same), name
        assert before in RECIPES or f"runs/{before}" in (CONFIGS / f"{run}_112.yaml").read_text()
        assert int(before.partition("_")[2]) < recipe.model.image_size


def test_every_size_has_one_to_three_recipes() -> None:
    runs = [name.partition("_")[0] for name in RECIPES]
    assert set(runs) == {"ti16", "s16", "b16", "l16", "l14", "so400m14", "h14"}
    assert all(runs.count(run) <= 3 for run in runs)


def tower_parameters(numbers: tuple[int, int, int, int]) -> int:
    """Count the parameters of blocks and final norm: four projections, two norms, two MLP layers, all with biases."""
    width, layers, mlp, _ = numbers
    block = 4 * (width * width + width) + 2 * 2 * width + (width * mlp + mlp) + (mlp * width + width)
    return layers * block + 2 * width


@pytest.mark.parametrize("class_token", [False, True])
@pytest.mark.parametrize("patch", [8, 14, 16])
@pytest.mark.parametrize("size", SIZES)
def test_number_of_parameters(size: str, patch: int, class_token: bool) -> None:
    image, text, embed_dim = SIZES[size]
    recipe = ModelRecipe(
        image=tower(image),
        text=tower(text),
        captioner=tower(text),
        embed_dim=embed_dim,
        image_size=224,
        patch_size=patch,
        class_token=class_token,
    )
    recipe.check()
    tokenizer = ClipsTokenizer.train(["a"], 8)
    with torch.device("meta"):
        model = ClipsModel(model_config(recipe, tokenizer))
    tokens = (224 // patch) ** 2 + class_token
    expected: dict[str, Any] = {
        "vision": tower_parameters(image) + 3 * patch**2 * image[0] + class_token * image[0] + tokens * image[0],
        "text": tower_parameters(text) + (32_000 + 80) * text[0] + text[0] * embed_dim,
        "captioner": tower_parameters(text) + image[0] * text[0] + text[0] ** 2 + 128 * text[0] + 32_000 * text[0],
        "rest": image[0] * embed_dim + 1,
    }
    absent = sum(value.numel() for value in model.absent_parameters())
    assert sum(value.numel() for value in model.parameters()) - absent == sum(expected.values())
