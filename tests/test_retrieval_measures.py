"""Ranks, several right answers, breakdowns and geometry of retrieval: against naive loops and hand calculation."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from clips_eval.positives import multi_positive
from clips_eval.retrieval_measures import Positives, by_length, by_object, geometry, median_rank, several, uniformity
from clips_eval.retrieval_scores import trust
from vision_tower.embedding import EmbeddedPairs
from vision_tower.errors import UserError
from vision_tower.recall import hits_at_k, recall_at_k


@pytest.fixture(scope="module")
def found() -> EmbeddedPairs:
    """30 pictures with two or three captions each, embedded at random but not quite."""
    torch.manual_seed(0)
    owner = torch.tensor([image for image in range(30) for _ in range(2 + image % 2)])
    images = F.normalize(torch.randn(30, 8), dim=1)
    texts = F.normalize(images[owner] + 0.6 * torch.randn(len(owner), 8), dim=1)
    captions = [f"a cat number {'very ' * (n % 5)}{n}" if n % 3 else f"two dogs {n}" for n in range(len(owner))]
    return EmbeddedPairs(
        images=images, texts=texts, owner=owner, names=[f"{n}.png" for n in range(30)], captions=captions
    )


def own(found: EmbeddedPairs) -> tuple[Positives, Positives]:
    texts: Positives = [[t for t, i in enumerate(found.owner.tolist()) if i == image] for image in range(30)]
    return texts, [[image] for image in found.owner.tolist()]


def naive_order(queries: torch.Tensor, candidates: torch.Tensor) -> list[list[int]]:
    return [row.argsort(descending=True).tolist() for row in queries @ candidates.T]


def test_hits_are_what_recall_is_the_share_of(found: EmbeddedPairs) -> None:
    recalls = recall_at_k(found.images, found.texts, found.owner)
    for key, hits in hits_at_k(found.images, found.texts, found.owner).items():
        assert hits.double().mean().item() == pytest.approx(recalls[key], abs=1e-7)
    told = trust(found)
    assert all(told["hits"][key].count("1") / len(told["hits"][key]) == pytest.approx(recalls[key]) for key in recalls)
    for key, recall in recalls.items():
        assert told["intervals"][key]["low"] <= recall <= told["intervals"][key]["high"]
    assert len(told["hits"]["t2i_r1"]) == len(found.texts) == sum(told["captions_per_image"])


def test_median_rank_by_hand_and_of_a_collapsed_encoder(found: EmbeddedPairs) -> None:
    texts, images = own(found)
    for queries, candidates, positives in ((found.images, found.texts, texts), (found.texts, found.images, images)):
        order = naive_order(queries, candidates)
        ranks = [min(row.index(p) for p in right) + 1 for row, right in zip(order, positives, strict=True)]
        assert median_rank(queries, candidates, positives) == torch.tensor(ranks).double().quantile(0.5).item()
    same = torch.ones(30, 8)
    assert median_rank(same, torch.ones(10, 8), [[0]] * 30) == 10


def test_several_right_answers_equal_a_naive_loop(found: EmbeddedPairs) -> None:
    positives: Positives = [[n % 30, (n * 7 + 3) % 30, (n + 11) % 30][: 1 + n % 3] if n % 5 else [] for n in range(75)]
    result = several(found.texts, found.images, positives)
    order = naive_order(found.texts, found.images)
    asked = [(row, set(right)) for row, right in zip(order, positives, strict=True) if right]
    assert result["n"] == len(asked) == 60
    for k in (1, 5, 10):
        assert result[f"r{k}"] == pytest.approx(sum(bool(set(row[:k]) & right) for row, right in asked) / 60)
    precision, average = [], []
    for row, right in asked:
        r = len(right)
        precision.append(len(set(row[:r]) & right) / r)
        average.append(sum(len(set(row[: i + 1]) & right) / (i + 1) for i in range(r) if row[i] in right) / r)
    assert result["r_precision"] == pytest.approx(sum(precision) / 60)
    assert result["map_at_r"] == pytest.approx(sum(average) / 60)
    _, images = own(found)
    single = several(found.texts, found.images, images)
    assert (
        single["map_at_r"]
        == single["r1"]
        == pytest.approx(recall_at_k(found.images, found.texts, found.owner)["t2i_r1"])
    )


def test_geometry_by_hand() -> None:
    images = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    texts = torch.tensor([[0.0, 1.0], [0.0, 1.0]])
    pairs = EmbeddedPairs(images=images, texts=texts, owner=torch.tensor([0, 1]), names=["a", "b"], captions=["x", "y"])
    told = geometry(pairs)
    assert told["modality_gap"] == pytest.approx(math.hypot(0.5, 0.5))
    assert told["alignment"] == pytest.approx((2 + 0) / 2)
    assert told["uniformity_images"] == pytest.approx(-4.0)  # one pair, squared distance 2
    assert told["uniformity_texts"] == pytest.approx(0.0)
    assert uniformity(images[:1]) == 0.0


def test_breakdowns_add_up(found: EmbeddedPairs) -> None:
    hits = trust(found)["hits"]
    groups = by_length(found, hits)
    assert sum(group["n"] for group in groups) == len(found.texts)
    assert [group["words"][0] for group in groups] == sorted({group["words"][0] for group in groups})
    total = sum(group["n"] * group["t2i_r5"] for group in groups) / len(found.texts)
    assert total == pytest.approx(hits["t2i_r5"].count("1") / len(found.texts))
    rows = by_object(found, hits, ["cat", "dog", "elephant", "at"])
    assert [row["object"] for row in rows] == ["cat", "dog"]  # "dogs" counts, "at" inside of "cat" does not
    dogs = [place for place, caption in enumerate(found.captions) if "dogs" in caption]
    assert rows[1]["n_texts"] == len(dogs)
    assert rows[1]["t2i_r1"] == sum(hits["t2i_r1"][place] == "1" for place in dogs) / len(dogs)


def test_eccv_style_positives(found: EmbeddedPairs, tmp_path: Path) -> None:
    owner = found.owner.tolist()
    images = [
        {"cocoid": 100 + n, "split": "test", "sentences": [{"sentid": t} for t, i in enumerate(owner) if i == n]}
        for n in range(30)
    ]
    data = tmp_path / "data.json"
    data.write_text(json.dumps({"images": [*images, {"cocoid": 1, "split": "train", "sentences": []}]}))
    file = tmp_path / "eccv.json"
    tree = {"images_of_caption": {"0": [100, 107], "5": [102]}, "captions_of_image": {"103": [7, 8, 20]}}
    file.write_text(json.dumps(tree))
    told = multi_positive(file, data, "test", found)
    expected = several(found.texts, found.images, [[0, 7] if n == 0 else [2] if n == 5 else [] for n in range(75)])
    assert told["t2i"] == expected and told["t2i"]["n"] == 2
    assert told["i2t"] == several(found.images, found.texts, [[7, 8, 20] if n == 3 else [] for n in range(30)])
    for change, words in (
        ({"images_of_caption": {"0": [999]}}, r"images_of_caption\.0: '999' is no id"),
        ({"images_of_caption": {"999": [100]}}, "'999' is no id of this split"),
        ({"captions_of_image": []}, "no 'captions_of_image'"),
    ):
        file.write_text(json.dumps(tree | change))
        with pytest.raises(UserError, match=words):
            multi_positive(file, data, "test", found)
