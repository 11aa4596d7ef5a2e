"""The projector's start by words: its loss by hand, what it finds without being told where, what it leaves alone."""

from __future__ import annotations

import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from clips_mllm.data.recipe import InstructionRecipe
from clips_mllm.model.recipe import MllmRecipe
from clips_mllm.train import main
from clips_mllm.training.recipe import TrainRecipe
from clips_mllm.training.stage_recipe import MllmTraining
from clips_mllm.training.word_start import (
    PULL,
    SHARPNESS,
    Captioned,
    fit_to_words,
    rare_words,
    read_captions,
    word_loss,
)
from tests.helpers.train_runs import weights, words
from vision_tower.common.errors import UserError


def test_the_loss_by_hand() -> None:
    torch.manual_seed(0)
    patches, embeddings = torch.randn(2, 3, 4), torch.randn(5, 4)
    weights = torch.tensor([[0.5, 0.0, 0.5, 0.0, 0.0], [0.0, 1.0, 0.0, 0.0, 0.0]])
    unit = sum(float(word @ word) for word in embeddings) / 5
    wanted = 0.0
    for image, shares in zip(patches, weights, strict=True):
        distances = [[float((patch - word) @ (patch - word)) / unit for word in embeddings] for patch in image]
        for at, share in enumerate(shares.tolist()):
            said = [
                math.exp(-SHARPNESS * row[at]) / sum(math.exp(-SHARPNESS * other) for other in row) for row in distances
            ]
            wanted -= share * math.log(sum(said) / 3) / 2
        wanted += PULL * sum(min(row) for row in distances) / 6
    assert float(word_loss(patches, embeddings, weights)) == pytest.approx(wanted, rel=1e-5)


def test_pieces_too_rare_or_too_common_are_not_words() -> None:
    """Piece 1 is in every caption and 9 in one; 5 in three of twelve, 7 in four."""
    captions = [{1, 5, 7}, {1, 5}, {1, 5}, {1, 7}, {1, 7}, {1, 7}, {1, 9}, *[{1}] * 5]
    words, weights = rare_words(captions)
    assert words.tolist() == [5, 7]
    both = math.log(12 / 3), math.log(12 / 4)
    torch.testing.assert_close(weights[0], torch.tensor(both) / sum(both))
    assert weights[1].tolist() == [1, 0] and weights[6].tolist() == [0, 0]


def test_a_set_without_single_images_has_no_words() -> None:
    """Texts alone, or several images a row: the projector is left as it is."""
    dataset: Any = [{"images": [], "labels": [1, 2]}] * 3
    model: Any = _model(features=4)
    captioned = read_captions(model, dataset, lambda _: {})  # type: ignore[arg-type]
    assert not len(captioned.words) and not len(captioned.features)


def test_no_more_images_than_their_features_have_room(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of ten rows, evenly taken, as many as fit: 2 patches x 4 features x 4 bytes are 32 bytes an image."""
    seen: list[int] = []

    class Rows(list[dict[str, Any]]):
        def __getitem__(self, index: Any) -> Any:
            seen.append(index)
            return super().__getitem__(index)

    monkeypatch.setattr("clips_mllm.training.word_start.FEATURE_BYTES", 5 * 32 + 31)
    read_captions(_model(features=4), Rows([{"images": [], "labels": []}] * 10), lambda _: {})  # type: ignore[arg-type]
    assert seen == [0, 2, 4, 6, 8]


def _model(features: int) -> Any:
    projector = SimpleNamespace(linear_1=SimpleNamespace(in_features=features))
    return SimpleNamespace(
        device=torch.device("cpu"),
        config=SimpleNamespace(image_seq_length=2),
        model=SimpleNamespace(multi_modal_projector=projector),
    )


def test_it_finds_which_patch_shows_which_word() -> None:
    """Images of four patches, two of them things, in any order; captions name the two things, not where they are."""
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


def test_stage_1_starts_from_it(sample_world: Path, encoder_dir: Path, tmp_path: Path) -> None:
    """Other projector, all else as it was; the draws of the run do not depend on it."""
    states = {}
    for steps in (0, 3):
        folder = tmp_path / str(steps)
        parts = {"model.tower": encoder_dir / "tower", "model.llm": sample_world / "llm", "model.word_steps": steps}
        stage = {"data.file": sample_world / "llava" / "stage1.json", "training.max_steps": 1}
        main(words(folder, sample_world, **parts, **stage))
        states[steps] = weights(folder)
    changed = {name for name in states[0] if not torch.equal(states[0][name], states[3][name])}
    assert changed == {name for name in states[0] if "multi_modal_projector" in name}


@pytest.mark.parametrize(
    "recipe",
    [MllmRecipe(checkpoint="x", word_steps=5), MllmRecipe(tower="t", llm="l", tiles=4, word_steps=5)],
)
def test_it_is_for_stage_1_without_tiles(recipe: MllmRecipe) -> None:
    with pytest.raises(UserError, match="word_steps: a start of stage 1 without tiles"):
        recipe.check()


def test_no_start_by_words_under_zero_3() -> None:
    recipe = TrainRecipe(
        output_dir="o",
        model=MllmRecipe(tower="t", llm="l", word_steps=5),
        data=InstructionRecipe(file="f", template="plain"),
        training=MllmTraining(deepspeed=str(Path(__file__).parents[2] / "configs" / "deepspeed" / "zero3.json")),
    )
    with pytest.raises(UserError, match=r"model\.word_steps=5: under ZeRO-3"):
        recipe.check()
