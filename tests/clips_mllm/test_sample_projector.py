"""Projector of the sample world: its loss, patches matched to words, the command, the stage that reads its file."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from clips_mllm.data.recipe import InstructionRecipe
from clips_mllm.model.recipe import MllmRecipe
from clips_mllm.sample.projector import (
    PULL,
    SHARPNESS,
    Captioned,
    WordProjectorRecipe,
    fit_to_words,
    main,
    rare_words,
    read_captions,
    word_loss,
)
from clips_mllm.train import main as train
from tests.helpers.errors import raises_user_error
from tests.helpers.train_runs import weights, words


def test_loss_equals_a_naive_computation() -> None:
    torch.manual_seed(0)
    patches, embeddings = torch.randn(2, 3, 4), torch.randn(5, 4)
    weights = torch.tensor([[0.5, 0.0, 0.5, 0.0, 0.0], [0.0, 1.0, 0.0, 0.0, 0.0]])
    unit = sum(float(word @ word) for word in embeddings) / 5
    wanted = 0.0
    for image, shares in zip(patches, weights, strict=True):
        distances = [[float((patch - word) @ (patch - word)) / unit for word in embeddings] for patch in image]
        for at, share in enumerate(shares.tolist()):
            likelihoods = [
                math.exp(-SHARPNESS * row[at]) / sum(math.exp(-SHARPNESS * other) for other in row) for row in distances
            ]
            wanted -= share * math.log(sum(likelihoods) / 3) / 2
        wanted += PULL * sum(min(row) for row in distances) / 6
    assert float(word_loss(patches, embeddings, weights)) == pytest.approx(wanted, rel=1e-5)


def test_rare_and_frequent_pieces_are_not_words() -> None:
    """Piece 1 is in every caption and 9 in one; 5 in three of twelve, 7 in four."""
    captions = [{1, 5, 7}, {1, 5}, {1, 5}, {1, 7}, {1, 7}, {1, 7}, {1, 9}, *[{1}] * 5]
    words, weights = rare_words(captions)
    assert words.tolist() == [5, 7]
    both = math.log(12 / 3), math.log(12 / 4)
    torch.testing.assert_close(weights[0], torch.tensor(both) / sum(both))
    assert weights[1].tolist() == [1, 0] and weights[6].tolist() == [0, 0]


def test_data_without_single_images_has_no_words() -> None:
    dataset: Any = [{"images": [], "labels": [1, 2]}] * 3
    model: Any = _model(features=4)
    captioned = read_captions(model, dataset, lambda _: {})  # type: ignore[arg-type]
    assert not len(captioned.words) and not len(captioned.features)


def test_number_of_images_is_limited_by_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Five of ten rows fit, evenly spaced: 2 patches x 4 features x 4 bytes are 32 bytes per image."""
    seen: list[int] = []

    class Rows(list[dict[str, Any]]):
        def __getitem__(self, index: Any) -> Any:
            seen.append(index)
            return super().__getitem__(index)

    monkeypatch.setattr("clips_mllm.sample.projector.MAX_FEATURE_BYTES", 5 * 32 + 31)
    read_captions(_model(features=4), Rows([{"images": [], "labels": []}] * 10), lambda _: {})  # type: ignore[arg-type]
    assert seen == [0, 2, 4, 6, 8]


def _model(features: int) -> Any:
    projector = SimpleNamespace(linear_1=SimpleNamespace(in_features=features))
    return SimpleNamespace(
        device=torch.device("cpu"),
        config=SimpleNamespace(image_seq_length=2),
        model=SimpleNamespace(multi_modal_projector=projector),
    )


def test_patches_are_matched_to_words() -> None:
    """Two of an image's four patches show things; captions name the things but not their positions."""
    torch.manual_seed(0)
    things, draws = torch.randn(6, 16), torch.Generator().manual_seed(1)
    embeddings = torch.randn(6, 8)
    features, weights = torch.randn(300, 4, 16) * 0.1, torch.zeros(300, 6)
    shown = torch.full((300, 4), -1)
    for row in range(300):
        named = torch.randperm(6, generator=draws)[:2]
        places = torch.randperm(4, generator=draws)[:2]
        features[row, places] += things[named]
        shown[row, places] = named
        weights[row, named] = 0.5
    projector = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 8))
    fit_to_words(projector, Captioned(features, torch.arange(6), weights), embeddings, steps=200)
    with torch.no_grad():
        nearest = torch.cdist(projector(features), embeddings).argmin(dim=-1)
    assert (nearest == shown)[shown >= 0].float().mean() > 0.98


def test_stage_1_starts_from_the_written_projector(sample_world: Path, encoder_dir: Path, tmp_path: Path) -> None:
    file = tmp_path / "projector.safetensors"
    values = {
        "model.tower": encoder_dir / "tower",
        "model.llm": sample_world / "llm",
        "model.projector": file,
        "data.file": sample_world / "llava" / "stage1.json",
        "training.max_steps": 1,
        "training.learning_rate": 0,
    }
    main([*words(tmp_path / "run", sample_world, **values), "--projector_init_steps=3"])
    train(words(tmp_path / "run", sample_world, **values))
    written, trained = load_file(file), weights(tmp_path / "run")
    assert set(written) == {f"linear_{layer}.{part}" for layer in (1, 2) for part in ("weight", "bias")}
    for name, value in written.items():
        assert torch.equal(trained[f"model.multi_modal_projector.{name}"], value)


@pytest.mark.parametrize(
    ("model", "steps", "key"),
    [
        ({}, 5, "model.projector"),
        ({"projector": "p", "tiles": 4}, 5, "model.tiles"),
        ({"projector": "p"}, 0, "projector_init_steps"),
    ],
)
def test_recipe_is_checked(model: dict[str, Any], steps: int, key: str) -> None:
    recipe = WordProjectorRecipe(
        output_dir="o",
        model=MllmRecipe(tower="t", llm="l", **model),
        data=InstructionRecipe(file="f", template="plain"),
        projector_init_steps=steps,
    )
    with raises_user_error(key=key):
        recipe.check()
