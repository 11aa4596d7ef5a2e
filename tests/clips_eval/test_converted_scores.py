"""Scores of an encoder do not change when it is converted to open_clip and back."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image

from clips_eval import retrieve, zeroshot
from clips_mllm import convert
from vision_tower.checkpoints.encoder import load_encoder, save_encoder
from vision_tower.data.image_folder import DEFAULT_TEMPLATES, read_templates
from vision_tower.evaluation.zeroshot import class_embeddings
from vision_tower.model.modeling import ClipsModel
from vision_tower.model.recipe import ModelRecipe, TowerRecipe
from vision_tower.pretraining.setup import model_config
from vision_tower.text.tokenizer import ClipsTokenizer

NAMES = ["cat", "dog", "hat", "moon", "cup", "bus"]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`run`: an encoder with class token, as published ones have; `open_clip` and `back`: converted to it and back."""
    root = tmp_path_factory.mktemp("converted")
    tokenizer = ClipsTokenizer.train([f"a photo of the {name} in an image" for name in NAMES], 90)
    tower = TowerRecipe(width=16, layers=2, mlp=20, heads=2)
    recipe = ModelRecipe(
        image=tower,
        text=tower,
        captioner=tower,
        embed_dim=10,
        image_size=24,
        patch_size=8,
        class_token=True,
        text_length=12,
        vocabulary_size=90,
    )
    torch.manual_seed(0)
    save_encoder(ClipsModel.from_scratch(model_config(recipe, tokenizer)), tokenizer, root / "run")
    convert.main([str(root / "run"), str(root / "open_clip"), "--to", "open_clip"])
    convert.main([str(root / "open_clip"), str(root / "back"), "--to", "clips"])
    random = np.random.default_rng(0)
    for name in NAMES:
        (root / "data" / name).mkdir(parents=True)
        for number in range(4):
            pixels = random.integers(0, 255, (30, 20, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / "data" / name / f"{number}.png")
    return root


def test_zero_shot_scores_survive_conversion(root: Path) -> None:
    found = {}
    for name in ("run", "back"):
        zeroshot.main([str(root / name), "--data", str(root / "data"), "--device", "cpu"])
        found[name] = json.loads((root / name / "zeroshot.json").read_text())
    for key in ("top1", "top5", "mean_per_class", "classes", "preprocessing", "n_texts"):
        assert found["run"][key] == found["back"][key]
    assert 0 < found["back"]["top5"] < 1 and found["run"]["sha256"] != found["back"]["sha256"]


def test_retrieval_scores_survive_conversion(root: Path) -> None:
    lines = [f"{name}/{number}.png,a photo of the {name} {number}" for name in NAMES for number in range(4)]
    (root / "pairs.csv").write_text("\n".join(["image,caption", *lines]))
    data = ["--format", "csv", "--data", str(root / "pairs.csv"), "--images", str(root / "data"), "--device", "cpu"]
    found = {}
    for name in ("run", "back"):
        retrieve.main([str(root / name), *data])
        found[name] = json.loads((root / name / "retrieval.json").read_text())
    recalls = [f"{way}_r{k}" for way in ("i2t", "t2i") for k in (1, 5, 10)]
    assert [found["run"][key] for key in recalls] == [found["back"][key] for key in recalls]
    assert 0 < found["back"]["i2t_r10"] < 1


def test_classifier_equals_open_clip(root: Path) -> None:
    """Our model and tokenizer after conversion give the classifier of open_clip's."""
    name = f"local-dir:{root / 'open_clip'}"
    templates = read_templates(DEFAULT_TEMPLATES)
    theirs = open_clip.build_zero_shot_classifier(
        open_clip.create_model(name).eval(), open_clip.get_tokenizer(name), NAMES, templates
    )
    ours = class_embeddings(load_encoder(root / "back", "cpu"), NAMES, templates, batch_size=64, progress=False)
    assert (ours - theirs.T).abs().max() < 1e-5
