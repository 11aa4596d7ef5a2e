"""Ranks, several right answers, breakdowns and geometry of retrieval: against naive loops and hand calculation."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from pathlib import Path
from statistics import median

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from clips_eval.retrieval.measures import (
    Positives,
    Way,
    answers,
    best_ranks,
    by_length,
    by_object,
    geometry,
    measures,
    several,
    uniformity,
)
from clips_eval.retrieval.positives import multi_positive
from clips_eval.retrieval.scores import trust
from clips_eval.stats.median import median_interval
from clips_eval.stats.uncertainty import Scores, interval, wilson
from vision_tower.common.errors import UserError
from vision_tower.evaluation.embedding import EmbeddedPairs
from vision_tower.evaluation.recall import hits_at_k, recall_at_k


@pytest.fixture(scope="module")
def found() -> EmbeddedPairs:
    """30 images with two or three captions each, embedded at random but not quite."""
    torch.manual_seed(0)
    owner = torch.tensor([image for image in range(30) for _ in range(2 + image % 2)])
    images = F.normalize(torch.randn(30, 8), dim=1)
    texts = F.normalize(images[owner] + 0.6 * torch.randn(len(owner), 8), dim=1)
    captions = [f"a cat number {'very ' * (n % 5)}{n}" if n % 3 else f"two dogs {n}" for n in range(len(owner))]
    return EmbeddedPairs(
        images=images, texts=texts, owner=owner, names=[f"{n}.png" for n in range(30)], captions=captions
    )


def from_texts(found: EmbeddedPairs, positives: Positives | None = None) -> Way:
    owner = found.owner.tolist()
    own = [[image] for image in owner] if positives is None else positives
    return Way(queries=found.texts, candidates=found.images, positives=own, images=owner)


def from_images(found: EmbeddedPairs, positives: Positives | None = None) -> Way:
    own = [[t for t, i in enumerate(found.owner.tolist()) if i == image] for image in range(len(found.images))]
    return Way(
        queries=found.images,
        candidates=found.texts,
        positives=own if positives is None else positives,
        images=range(len(found.images)),
    )


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


def test_ranks_by_hand_and_of_a_collapsed_encoder(found: EmbeddedPairs) -> None:
    ranks = {}
    for name, way in (("i2t", from_images(found)), ("t2i", from_texts(found))):
        order = naive_order(way.queries, way.candidates)
        ranks[name] = [min(row.index(p) for p in right) + 1 for row, right in zip(order, way.positives, strict=True)]
        assert best_ranks(way) == ranks[name]
    told = measures(found, trust(found)["hits"])["median_rank"]
    assert (told["i2t"], told["t2i"]) == (median(ranks["i2t"]), median(ranks["t2i"]))
    assert told["intervals"]["t2i"] == asdict(median_interval(ranks["t2i"], [str(i) for i in found.owner.tolist()]))
    assert (told["intervals"]["t2i"]["n"], told["intervals"]["t2i"]["clusters"]) == (75, 30)
    same = Way(queries=torch.ones(30, 8), candidates=torch.ones(10, 8), positives=[[0]] * 30, images=range(30))
    assert set(best_ranks(same)) == {10}


def test_the_interval_of_a_median_draws_images() -> None:
    """Against a loop that writes every resample out."""
    random = np.random.default_rng(3)
    values, clusters = random.integers(1, 40, 31).tolist(), [str(n // 4) for n in range(31)]
    found = median_interval(values, clusters, resamples=200)
    of = {name: [v for v, c in zip(values, clusters, strict=True) if c == name] for name in sorted(set(clusters))}
    draws, medians = np.random.default_rng([0, 2]), []
    for _ in range(200):
        drawn = draws.integers(0, 8, 8)
        medians.append(median([v for place in drawn for v in list(of.values())[place]]))
    assert (found.low, found.high) == pytest.approx(tuple(np.quantile(medians, (0.025, 0.975))))
    assert (found.n, found.clusters) == (31, 8)
    # Captions that all rank alike are one observation of their image, not five: the interval is wider.
    ranks = [float(n) for n in range(1, 31) for _ in range(5)]
    shared = median_interval(ranks, [str(n // 5) for n in range(150)], resamples=300)
    apart = median_interval(ranks, [str(n) for n in range(150)], resamples=300)
    assert shared.low < apart.low < 15.5 < apart.high < shared.high  # type: ignore[operator]


def test_the_interval_of_a_median_of_few_and_of_equal_ranks() -> None:
    few = median_interval([1, 2, 3, 4, 5, 6], ["a", "b", "c", "d", "e", "e"])
    assert (few.low, few.high, few.n, few.clusters) == (None, None, 6, 5)
    equal = median_interval([1.0] * 6, list("abcdef"))
    assert (equal.low, equal.high) == (1.0, 1.0)


def test_several_right_answers_equal_a_naive_loop(found: EmbeddedPairs) -> None:
    positives: Positives = [[n % 30, (n * 7 + 3) % 30, (n + 11) % 30][: 1 + n % 3] if n % 5 else [] for n in range(75)]
    result = several(from_texts(found, positives))
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
    owner = [str(i) for i, right in zip(found.owner.tolist(), positives, strict=True) if right]
    for key in ("r1", "map_at_r"):
        values = average if key == "map_at_r" else [float(row[0] in right) for row, right in asked]
        wanted = interval(Scores(numerators=values, denominators=[1.0] * 60, clusters=owner))
        assert result["intervals"][key] == pytest.approx(asdict(wanted))
    single = several(from_texts(found))
    assert (
        single["map_at_r"]
        == single["r1"]
        == pytest.approx(recall_at_k(found.images, found.texts, found.owner)["t2i_r1"])
    )


def test_no_query_with_a_positive_has_no_interval(found: EmbeddedPairs) -> None:
    told = several(from_texts(found, [[] for _ in range(75)]))
    assert told["n"] == 0 and told["map_at_r"] == 0 and told["intervals"] == {}


def test_own_map_at_r_has_an_interval_both_ways(found: EmbeddedPairs) -> None:
    told = measures(found, trust(found)["hits"])["map_at_r"]
    for name, way in (("i2t", from_images(found)), ("t2i", from_texts(found))):
        values = answers(way)["map_at_r"]
        assert told[name] == pytest.approx(sum(values) / len(values))
        wanted = interval(Scores(numerators=values, denominators=[1.0] * len(values), clusters=way.clusters))
        assert told["intervals"][name] == asdict(wanted)
        assert wanted.low is not None and wanted.high is not None and wanted.low < told[name] < wanted.high


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


def test_a_group_rests_on_its_own_images() -> None:
    """Four images with a caption each, all found: of two of them Wilson's interval is that of two, not of four."""
    eye = torch.eye(4)
    captions = ["a cat", "the cat", "one long long dog", "one very long dog"]
    pairs = EmbeddedPairs(images=eye, texts=eye, owner=torch.arange(4), names=list("abcd"), captions=captions)
    hits = trust(pairs)["hits"]
    low, high = wilson(1.0, 2)
    alike = {"low": low, "high": high, "n": 2, "clusters": 2}
    cat = by_object(pairs, hits, ["cat"])[0]
    assert set(cat["intervals"]) == {f"{way}_r{k}" for way in ("i2t", "t2i") for k in (1, 5, 10)}
    assert all(span == alike for span in cat["intervals"].values())
    groups = by_length(pairs, hits)
    assert [group["n"] for group in groups] == [2, 2]
    assert all(group["intervals"] == {f"t2i_r{k}": alike for k in (1, 5, 10)} for group in groups)


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
    expected = several(from_texts(found, [[0, 7] if n == 0 else [2] if n == 5 else [] for n in range(75)]))
    assert told["t2i"] == expected and told["t2i"]["n"] == 2
    assert told["i2t"] == several(from_images(found, [[7, 8, 20] if n == 3 else [] for n in range(30)]))
    for change, words in (
        ({"images_of_caption": {"0": [999]}}, r"images_of_caption\.0: '999' is no id"),
        ({"images_of_caption": {"999": [100]}}, "'999' is no id of this split"),
        ({"captions_of_image": []}, "no 'captions_of_image'"),
    ):
        file.write_text(json.dumps(tree | change))
        with pytest.raises(UserError, match=words):
            multi_positive(file, data, "test", found)
