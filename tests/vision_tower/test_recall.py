"""Recall@k against hand-computed values, the naive full matrix, and CLIP_benchmark (bit-identical)."""

from __future__ import annotations

import pytest
import torch
from clip_benchmark.metrics import zeroshot_retrieval

from vision_tower.common.errors import NotFinite
from vision_tower.evaluation.recall import recall_at_k


def naive(images: torch.Tensor, texts: torch.Tensor, image_of_text: torch.Tensor, k: int) -> tuple[float, float]:
    """Sort the full matrix, query by query."""
    scores = images @ texts.T
    i2t = [
        k > min((scores[i] > scores[i, j]).sum() for j in (image_of_text == i).nonzero()) for i in range(len(images))
    ]
    t2i = [k > (scores[:, j] > scores[i, j]).sum() for j, i in enumerate(image_of_text)]
    return float(sum(i2t) / len(i2t)), float(sum(t2i) / len(t2i))


class Lookup(torch.nn.Module):
    """Model whose inputs are indices into embedding tables, to pass our embeddings to CLIP_benchmark."""

    def __init__(self, images: torch.Tensor, texts: torch.Tensor) -> None:
        super().__init__()
        self.images, self.texts = images, texts

    def encode_image(self, rows: torch.Tensor) -> torch.Tensor:
        return self.images[rows]

    def encode_text(self, rows: torch.Tensor) -> torch.Tensor:
        return self.texts[rows]


def clip_benchmark(
    images: torch.Tensor, texts: torch.Tensor, image_of_text: torch.Tensor, ks: tuple[int, ...], batch: int = 64
) -> dict[str, float]:
    """Run CLIP_benchmark's `evaluate`, which needs the texts in the order of their images."""
    own = [(image_of_text == row).nonzero().squeeze(1).tolist() for row in range(len(images))]
    loader = [
        (part, [own[row] for row in part.tolist()]) for part in torch.arange(len(images)).split(batch)
    ]  # fmt: skip
    found = zeroshot_retrieval.evaluate(
        Lookup(images, texts), loader, torch.tensor, "cpu", amp=False, recall_k_list=list(ks)
    )
    ways = {"i2t": "text_retrieval", "t2i": "image_retrieval"}
    return {f"{way}_r{k}": found[f"{name}_recall@{k}"] for way, name in ways.items() for k in ks}


def world(
    n_images: int, per_image: int, seed: int, dtype: torch.dtype = torch.float64, width: int = 16
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Random pairs with noise, so that recall is between 0 and 1; the texts are shuffled."""
    random = torch.Generator().manual_seed(seed)
    images = torch.randn(n_images, width, generator=random, dtype=dtype)
    owner = torch.arange(n_images).repeat_interleave(per_image)
    owner = owner[torch.randperm(len(owner), generator=random)]
    texts = images[owner] + 0.3 * width**0.5 * torch.randn(len(owner), width, generator=random, dtype=dtype)
    normal = torch.nn.functional.normalize
    return normal(images, dim=1), normal(texts, dim=1), owner


def test_recall_equals_hand_computed_values() -> None:
    """The images are the unit vectors, so the scores are the texts' coordinates.

    text   owner  best images in order
    t0     0      0 1 2   own image first
    t1     0      1 0 2   second
    t2     1      2 0 1   third
    t3     2      1 2 0   second
    image 0: texts t0 (9) t2 (5) t1 (4) t3 (0): first own text at rank 1
    image 1: t1 (8) t3 (7) t0 (3) t2 (2):       own text t2 at rank 4
    image 2: t2 (9) t3 (6) t0 (1) t1 (0):       own text t3 at rank 2
    """
    images = torch.eye(3)
    texts = torch.tensor([[9.0, 3, 1], [4, 8, 0], [5, 2, 9], [0, 7, 6]])
    scores = recall_at_k(images, texts, torch.tensor([0, 0, 1, 2]), ks=(1, 2, 3, 4))
    assert scores == pytest.approx(
        {"i2t_r1": 1 / 3, "i2t_r2": 2 / 3, "i2t_r3": 2 / 3, "i2t_r4": 1}
        | {"t2i_r1": 1 / 4, "t2i_r2": 3 / 4, "t2i_r3": 1, "t2i_r4": 1}
    )


@pytest.mark.parametrize("block", [(1, 1), (7, 3), (40, 200), (13, 1000), (1024, 8192)])
def test_recall_equals_the_naive_computation(block: tuple[int, int]) -> None:
    images, texts, owner = world(n_images=40, per_image=5, seed=block[0])
    scores = recall_at_k(images, texts, owner, block=block)
    for k in (1, 5, 10):
        assert (scores[f"i2t_r{k}"], scores[f"t2i_r{k}"]) == pytest.approx(naive(images, texts, owner, k))
    assert 0 < scores["t2i_r1"] < scores["t2i_r10"] < 1


@pytest.mark.parametrize("width", [64, 100, 512])
@pytest.mark.parametrize(("n_images", "uneven"), [(157, False), (640, True)])
def test_recall_is_bit_identical_to_clip_benchmark(n_images: int, uneven: bool, width: int) -> None:
    """With five captions per image or an uneven number, and several blocks, in fp32."""
    images, texts, owner = world(n_images, 5, seed=width, dtype=torch.float32, width=width)
    if uneven:  # one to five captions per image, in the order of the images as in COCO
        order = owner.argsort(stable=True)
        kept = order[(torch.arange(len(owner)) % 5) <= (owner[order] * 7 % 5)]
        texts, owner = texts[kept], owner[kept]
    order = owner.argsort(stable=True)
    ours = recall_at_k(images, texts[order], owner[order], block=(256, 300))
    assert ours == clip_benchmark(images, texts[order], owner[order], (1, 5, 10))
    assert 0 < ours["t2i_r1"] < ours["t2i_r10"] < 1


@pytest.mark.parametrize("kinds", [1, 2, 20, 90])
def test_ties_are_decided_as_in_clip_benchmark(kinds: int) -> None:
    """With duplicate captions and images, so that most ranks are tied and `topk` decides."""
    images, texts, owner = world(n_images=300, per_image=2, seed=kinds, dtype=torch.float32, width=48)
    order = owner.argsort(stable=True)
    texts, owner = texts[order], owner[order]
    random = torch.Generator().manual_seed(kinds)
    images = images[torch.randint(kinds, (len(images),), generator=random)]
    texts = texts[torch.randint(2 * kinds, (len(texts),), generator=random)]
    assert recall_at_k(images, texts, owner, block=(128, 64)) == clip_benchmark(images, texts, owner, (1, 5, 10))


def test_single_tied_query_stays_tied() -> None:
    """A single row would use a matrix-vector kernel, whose rounding breaks ties."""
    images, texts, owner = world(n_images=200, per_image=5, seed=3, dtype=torch.float32, width=512)
    order = owner.argsort(stable=True)
    texts, owner = texts[order], owner[order]
    texts[777] = texts[3]  # also the caption of another image
    assert recall_at_k(images, texts, owner, block=(300, 80)) == clip_benchmark(images, texts, owner, (1, 5, 10))


def test_collapsed_encoder_scores_chance() -> None:
    """All scores are equal: counting only strictly better candidates would give a recall of 1."""
    point = torch.ones(1, 8)
    scores = recall_at_k(point.expand(20, 8), point.expand(20, 8), torch.arange(20))
    assert scores["i2t_r1"] == scores["t2i_r1"] == pytest.approx(1 / 20)
    assert scores["i2t_r10"] == scores["t2i_r10"] == pytest.approx(10 / 20)


def test_memory_is_linear_in_the_embeddings(monkeypatch: pytest.MonkeyPatch) -> None:
    """No product is larger than a block, for any number of embeddings."""
    sizes: list[int] = []
    product = torch.Tensor.__matmul__

    def watched(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        out = product(left, right)
        sizes.append(out.numel())
        return out

    images, texts, owner = world(n_images=500, per_image=5, seed=0)
    monkeypatch.setattr(torch.Tensor, "__matmul__", watched)
    recall_at_k(images, texts, owner, block=(100, 50))
    assert max(sizes) == 100 * 50 and sum(sizes) == 500 * 2500


def test_k_larger_than_the_number_of_candidates() -> None:
    assert recall_at_k(torch.eye(2), torch.eye(2).flip(0), torch.tensor([0, 1]), ks=(1, 10)) == pytest.approx(
        {"i2t_r1": 0, "i2t_r10": 1, "t2i_r1": 0, "t2i_r10": 1}
    )


@pytest.mark.parametrize(
    ("owner", "first_value", "error"),
    [([0, 0], 1.0, ValueError), ([0, 1, 1], 1.0, ValueError), ([0, 1], float("nan"), NotFinite)],
)
def test_invalid_arguments_are_refused(owner: list[int], first_value: float, error: type[Exception]) -> None:
    images = torch.eye(2)
    images[0, 0] = first_value
    with pytest.raises(error):
        recall_at_k(images, torch.eye(2), torch.tensor(owner))
