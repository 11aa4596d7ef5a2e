"""Objectives: loss terms, texts, and terms of weight 0."""

from __future__ import annotations

import collections
import random
from typing import Any

import pytest
import torch

from tests.helpers.errors import raises_user_error
from vision_tower.text.objectives import OBJECTIVES, CaptionRecipe, LossWeights, choose_objective
from vision_tower.text.text_streams import CaptionSampler
from vision_tower.text.tokenizer import ClipsTokenizer

WEB, FULL = "alt text", "A dog runs. Two cats sleep. The sun is up."


@pytest.fixture(scope="module")
def tokenizer() -> ClipsTokenizer:
    return ClipsTokenizer.train([WEB, FULL], 200)


def drawn(
    tokenizer: ClipsTokenizer, name: Any, weights: LossWeights | None = None, **captions: Any
) -> list[dict[str, str]]:
    """Decode 500 draws."""
    objective = choose_objective(name, weights or LossWeights())
    draw = CaptionSampler(tokenizer, objective, CaptionRecipe(**captions), room=20)
    rng = random.Random(0)
    return [
        {stream: tokenizer.fast.decode(pieces) for stream, pieces in draw(WEB, FULL, rng).items()} for _ in range(500)
    ]


@pytest.mark.parametrize(
    ("name", "weights", "streams"),
    [
        ("clip-web", {"web": 1}, {"web"}),
        ("clip-synthetic", {"sub": 1}, {"sub"}),
        ("clipa-mix", {"mix": 1}, {"mix"}),
        ("coca", {"mix": 1, "caption": 2}, {"mix", "target"}),
        ("clips", {"web": 0.5, "sub": 0.5, "caption": 2}, {"web", "sub", "target"}),
    ],
)
def test_terms_and_texts(tokenizer: ClipsTokenizer, name: Any, weights: dict[str, float], streams: set[str]) -> None:
    assert choose_objective(name, LossWeights()).weights == weights
    assert set(drawn(tokenizer, name)[0]) == streams


def test_text_of_each_stream(tokenizer: ClipsTokenizer) -> None:
    web, full = WEB, FULL.lower()
    sentences = {"a dog runs.", "two cats sleep.", "the sun is up."}
    clips = drawn(tokenizer, "clips")
    assert {row["web"] for row in clips} == {web} and {row["target"] for row in clips} == {full}
    assert {row["sub"] for row in clips} == sentences
    assert {row["sub"] for row in drawn(tokenizer, "clip-synthetic")} == {full}
    mixed = collections.Counter(row["mix"] for row in drawn(tokenizer, "clipa-mix"))
    assert set(mixed) == {web, full} and 350 < mixed[web] < 450  # 400 expected, deviation 9
    coca = drawn(tokenizer, "coca", web_share=0.5)
    assert {row["mix"] for row in coca} == {web, full} and all(row["mix"] == row["target"] for row in coca)


def test_budgets_and_reductions_come_from_the_recipe(tokenizer: ClipsTokenizer) -> None:
    assert {row["web"] for row in drawn(tokenizer, "clip-web", web_budget=1)} == {"alt"}
    assert {row["sub"] for row in drawn(tokenizer, "clip-synthetic", budget=3)} == {"a dog runs"}
    for reduction in ("random", "block", "sub-caption"):
        texts = {row["sub"] for row in drawn(tokenizer, "clip-synthetic", reduction=reduction, budget=3)}
        assert len(texts) > 2 and all(len(tokenizer.pieces([text])[0]) == 3 for text in texts), reduction
    two = {row["sub"] for row in drawn(tokenizer, "clips", sentences=2)}
    assert two == {"a dog runs. two cats sleep.", "a dog runs. the sun is up.", "two cats sleep. the sun is up."}
    shorter = {row["sub"] for row in drawn(tokenizer, "clips", budget=2)}
    assert shorter == {"a dog", "two cats", "the sun"}


@pytest.mark.parametrize("caption", ["🐶", "...", "a" * 500, "no stop"])
@pytest.mark.parametrize("reduction", ["sentences", "truncation", "random", "block", "sub-caption"])
def test_no_text_is_blank(tokenizer: ClipsTokenizer, caption: str, reduction: Any) -> None:
    objective = choose_objective("clips", LossWeights())
    draw = CaptionSampler(tokenizer, objective, CaptionRecipe(reduction=reduction, budget=2), room=20)
    assert all(1 <= len(draw("", caption, random.Random(seed))["sub"]) <= 2 for seed in range(20))


def test_term_with_weight_0_is_not_computed(tokenizer: ClipsTokenizer) -> None:
    assert set(drawn(tokenizer, "clips", LossWeights(sub=0))[0]) == {"web", "target"}
    assert set(drawn(tokenizer, "clips", LossWeights(caption=0))[0]) == {"web", "sub"}
    # The captioner reads the web caption also where no InfoNCE does.
    assert set(drawn(tokenizer, "clips", LossWeights(web=0))[0]) == {"web", "sub", "target"}
    assert choose_objective("coca", LossWeights(caption=0)).weights == OBJECTIVES["clipa-mix"].weights


def test_without_a_caption_term_there_is_no_captioner(tokenizer: ClipsTokenizer) -> None:
    from vision_tower.model.modeling import ClipsModel
    from vision_tower.model.recipe import ModelRecipe, TowerRecipe
    from vision_tower.pretraining.setup import model_config

    tower = TowerRecipe(width=16, layers=1, mlp=32, heads=2)
    recipe = ModelRecipe(
        image=tower,
        text=tower,
        captioner=tower,
        embed_dim=8,
        image_size=16,
        patch_size=8,
        text_length=9,
        target_length=12,
    )
    counts = {}
    for name in OBJECTIVES:
        for caption in (None, 0.0):
            weights = LossWeights() if caption is None else LossWeights(caption=caption)
            model = ClipsModel.from_scratch(model_config(recipe, tokenizer, choose_objective(name, weights)))
            counts[name, caption] = sum(value.numel() for value in model.parameters())
            assert any(key.startswith("captioner") for key in model.state_dict()) is (
                caption is None and name in ("coca", "clips")
            )
    assert counts["clips", None] == counts["coca", None] > counts["clips", 0.0] == counts["clip-web", None]


@pytest.mark.parametrize("name", OBJECTIVES)
def test_every_parameter_of_an_objective_is_trained(tokenizer: ClipsTokenizer, name: Any) -> None:
    """Data-parallel training requires it, and a frozen part would make comparisons unfair."""
    from vision_tower.model.losses import caption_term, contrastive_terms, weighted_losses
    from vision_tower.model.modeling import ClipsModel
    from vision_tower.model.recipe import ModelRecipe, TowerRecipe
    from vision_tower.pretraining.setup import model_config

    torch.manual_seed(0)
    tower = TowerRecipe(width=16, layers=1, mlp=32, heads=2)
    recipe = ModelRecipe(
        image=tower,
        text=tower,
        captioner=tower,
        embed_dim=8,
        image_size=16,
        patch_size=8,
        text_length=20,
        target_length=24,
    )
    objective = choose_objective(name, LossWeights())
    model = ClipsModel.from_scratch(model_config(recipe, tokenizer, objective))
    draw = CaptionSampler(tokenizer, objective, CaptionRecipe(), recipe.text_room)
    rng = random.Random(0)
    texts = [draw(WEB, FULL, rng), draw("other", "A bird. A fish.", rng)]
    batch = {
        f"{stream}_ids": tokenizer.contrastive_layout([row[stream] for row in texts], 20)
        for stream in objective.streams
    }
    if objective.captioned:
        batch["labels"] = tokenizer.target_layout([row["target"] for row in texts], 24)
    out = model(torch.randn(2, 3, 16, 16), **batch)
    terms = contrastive_terms(out.image, out.texts, out.scale, objective.weights)
    if objective.captioned:
        assert out.caption_sum is not None
        terms["caption"] = caption_term(out.caption_sum, [batch["labels"]])
    weighted_losses(terms, out.scale, objective.weights).total.backward()
    still = [key for key, value in model.named_parameters() if value.requires_grad and value.grad is None]
    assert not still


@pytest.mark.parametrize(
    ("weights", "key"),
    [
        (LossWeights(web=-1.0), "loss.web"),
        (LossWeights(mix=1.0), "loss.mix"),
        (LossWeights(web=0.0, sub=0.0, caption=0.0), "loss"),
    ],
)
def test_bad_weights(weights: LossWeights, key: str) -> None:
    with raises_user_error(key=key):
        choose_objective("clips", weights)


@pytest.mark.parametrize(
    "values",
    [{"budget": 0}, {"web_budget": 21}, {"sentences": 0}, {"web_share": 1.5}],
)
def test_bad_caption_recipes(values: dict[str, Any]) -> None:
    ((name, value),) = values.items()
    with raises_user_error(key=f"captions.{name}", value=value):
        CaptionRecipe(**values).check(20)


def test_batches_are_trimmed_to_their_longest_text(tokenizer: ClipsTokenizer) -> None:
    """All streams to one length, since they share a forward pass, at most the context length; targets are excluded."""
    from vision_tower.data.pairs import CaptionSample, PairCollator
    from vision_tower.data.readers import ReaderPosition

    cursor = ReaderPosition(reader=0, draws=0, places=())

    def lengths(*texts: tuple[int, int], trim: bool = True) -> set[tuple[int, ...]]:
        pixels = torch.zeros(3, 2, 2, dtype=torch.uint8)
        samples = [
            CaptionSample(pixels, "", "", {"web": [9] * web, "sub": [9] * sub, "target": [9] * 40}, "", cursor)
            for web, sub in texts
        ]
        batch = PairCollator(tokenizer=tokenizer, text_length=20, target_length=24, trim=trim)(samples)
        assert all((batch[name][:, -1] == tokenizer.cls).all() for name in ("web_ids", "sub_ids"))
        return {tuple(batch[name].shape) for name in ("web_ids", "sub_ids")}

    assert lengths((2, 5), (7, 1)) == {(2, 10)}  # [bos], seven pieces, [eos], [CLS]
    assert lengths((2, 50)) == lengths((2, 5), trim=False) == {(1, 20)}
