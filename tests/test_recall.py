"""Recall@k against hand-computed values and against the naive full matrix."""

from __future__ import annotations

import pytest
import torch

from vision_tower.recall import recall_at_k


def naive(images: torch.Tensor, texts: torch.Tensor, image_of_text: torch.Tensor, k: int) -> tuple[float, float]:
    """Full matrix and `topk`, as public benchmarks do it."""
    scores = images @ texts.T
    top_texts = scores.topk(min(k, len(texts)), dim=1).indices
    top_images = scores.T.topk(min(k, len(images)), dim=1).indices
    i2t = [bool((image_of_text[top] == row).any()) for row, top in enumerate(top_texts)]
    t2i = [bool((top == image_of_text[row]).any()) for row, top in enumerate(top_images)]
    return sum(i2t) / len(i2t), sum(t2i) / len(t2i)


def world(n_images: int, per_image: int, seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Noisy pairs in double precision, texts in random order: no ties, and recall well between 0 and 1."""
    random = torch.Generator().manual_seed(seed)
    images = torch.randn(n_images, 16, generator=random, dtype=torch.float64)
    owner = torch.arange(n_images).repeat_interleave(per_image)
    owner = owner[torch.randperm(len(owner), generator=random)]
    texts = images[owner] + 1.2 * torch.randn(len(owner), 16, generator=random, dtype=torch.float64)
    normal = torch.nn.functional.normalize
    return normal(images, dim=1), normal(texts, dim=1), owner


def test_hand_computed() -> None:
    """Scores are the texts' own coordinates, for the images are the unit vectors.

    text   owner  best images in order
    t0     0      0 1 2   own image first
    t1     0      1 0 2   second
    t2     1      2 0 1   third
    t3     2      1 2 0   second
    image 0: texts t0 (9) t2 (5) t1 (4) t3 (0): first own text at place 1
    image 1: t1 (8) t3 (7) t0 (3) t2 (2):       own text t2 at place 4
    image 2: t2 (9) t3 (6) t0 (1) t1 (0):       own text t3 at place 2
    """
    images = torch.eye(3)
    texts = torch.tensor([[9.0, 3, 1], [4, 8, 0], [5, 2, 9], [0, 7, 6]])
    scores = recall_at_k(images, texts, torch.tensor([0, 0, 1, 2]), ks=(1, 2, 3, 4))
    assert scores == pytest.approx(
        {"i2t_r1": 1 / 3, "i2t_r2": 2 / 3, "i2t_r3": 2 / 3, "i2t_r4": 1}
        | {"t2i_r1": 1 / 4, "t2i_r2": 3 / 4, "t2i_r3": 1, "t2i_r4": 1}
    )


@pytest.mark.parametrize("chunk", [1, 7, 40, 1024])
def test_equals_the_naive_version(chunk: int) -> None:
    images, texts, owner = world(n_images=40, per_image=5, seed=chunk)
    scores = recall_at_k(images, texts, owner, chunk=chunk)
    for k in (1, 5, 10):
        assert (scores[f"i2t_r{k}"], scores[f"t2i_r{k}"]) == pytest.approx(naive(images, texts, owner, k))
    assert 0 < scores["t2i_r1"] < scores["t2i_r10"] < 1


def test_a_collapsed_encoder_scores_chance() -> None:
    """Everything ties: counting only strictly better scores would report a perfect 1."""
    point = torch.ones(1, 8)
    scores = recall_at_k(point.expand(20, 8), point.expand(20, 8), torch.arange(20))
    assert scores["i2t_r1"] == scores["t2i_r1"] == pytest.approx(1 / 20)
    assert scores["t2i_r10"] == pytest.approx(10 / 20)


def test_ties_go_to_the_lower_index() -> None:
    images = torch.tensor([[1.0, 0], [1, 0], [0, 1]])
    scores = recall_at_k(images, images, torch.tensor([0, 1, 2]), ks=(1, 2))
    assert scores == pytest.approx({"i2t_r1": 2 / 3, "i2t_r2": 1, "t2i_r1": 2 / 3, "t2i_r2": 1})


def test_k_beyond_the_candidates() -> None:
    assert recall_at_k(torch.eye(2), torch.eye(2).flip(0), torch.tensor([0, 1]), ks=(1, 10)) == pytest.approx(
        {"i2t_r1": 0, "i2t_r10": 1, "t2i_r1": 0, "t2i_r10": 1}
    )


@pytest.mark.parametrize(
    ("owner", "bad_value", "message"),
    [([0, 0], None, "needs a text"), ([0, 1, 1], None, "one image for each text"), ([0, 1], float("nan"), "NaN")],
)
def test_refuses_what_has_no_meaning(owner: list[int], bad_value: float | None, message: str) -> None:
    images = torch.eye(2)
    if bad_value is not None:
        images[0, 0] = bad_value
    with pytest.raises(ValueError, match=message):
        recall_at_k(images, torch.eye(2), torch.tensor(owner))
