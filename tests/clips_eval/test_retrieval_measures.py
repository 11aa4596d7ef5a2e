"""Ranks, several positives, breakdowns and geometry of retrieval: against naive loops and hand calculation."""

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

from clips_eval.retrieval.data import load_positives
from clips_eval.retrieval.measures import (
    Direction,
    Positives,
    best_ranks,
    by_length,
    by_object,
    directions,
    geometry,
    measures,
    multi_positive,
    query_metrics,
    uniformity,
)
from clips_eval.retrieval.scores import hits_and_intervals
from clips_eval.stats.uncertainty import Scores, interval, median_interval, wilson
from tests.helpers.errors import raises_user_error
from vision_tower.evaluation.embedding import EmbeddedPairs
from vision_tower.evaluation.recall import hits_at_k, recall_at_k


@pytest.fixture(scope="module")
def pairs() -> EmbeddedPairs:
    """30 images with two or three captions each; captions are noisy copies of their image's embedding."""
    torch.manual_seed(0)
    owner = torch.tensor([image for image in range(30) for _ in range(2 + image % 2)])
    images = F.normalize(torch.randn(30, 8), dim=1)
    texts = F.normalize(images[owner] + 0.6 * torch.randn(len(owner), 8), dim=1)
    captions = [f"a cat number {'very ' * (n % 5)}{n}" if n % 3 else f"two dogs {n}" for n in range(len(owner))]
    return EmbeddedPairs(
        images=images, texts=texts, owner=owner, names=[f"{n}.png" for n in range(30)], captions=captions
    )


def from_texts(pairs: EmbeddedPairs, positives: Positives | None = None) -> Direction:
    owner = pairs.owner.tolist()
    own = [[image] for image in owner] if positives is None else positives
    return Direction(queries=pairs.texts, candidates=pairs.images, positives=own, images=owner)


def from_images(pairs: EmbeddedPairs, positives: Positives | None = None) -> Direction:
    own = [[t for t, i in enumerate(pairs.owner.tolist()) if i == image] for image in range(len(pairs.images))]
    return Direction(
        queries=pairs.images,
        candidates=pairs.texts,
        positives=own if positives is None else positives,
        images=range(len(pairs.images)),
    )


def naive_order(queries: torch.Tensor, candidates: torch.Tensor) -> list[list[int]]:
    return [row.argsort(descending=True).tolist() for row in queries @ candidates.T]


def test_mean_of_hits_is_recall(pairs: EmbeddedPairs) -> None:
    recalls = recall_at_k(pairs.images, pairs.texts, pairs.owner)
    for key, hits in hits_at_k(pairs.images, pairs.texts, pairs.owner).items():
        assert hits.double().mean().item() == pytest.approx(recalls[key], abs=1e-7)
    result = hits_and_intervals(pairs)
    shares = {key: hits.count("1") / len(hits) for key, hits in result["hits"].items()}
    assert shares == pytest.approx(recalls)
    for key, recall in recalls.items():
        assert result["intervals"][key]["low"] <= recall <= result["intervals"][key]["high"]
    assert len(result["hits"]["t2i_r1"]) == len(pairs.texts) == sum(result["captions_per_image"])


def test_ranks_equal_naive_loop_and_collapsed_encoder_ranks_last(pairs: EmbeddedPairs) -> None:
    ranks = {}
    for name, direction in (("i2t", from_images(pairs)), ("t2i", from_texts(pairs))):
        order = naive_order(direction.queries, direction.candidates)
        rows = zip(order, direction.positives, strict=True)
        ranks[name] = [min(row.index(p) for p in positives) + 1 for row, positives in rows]
        assert best_ranks(direction) == ranks[name]
    result = measures(pairs, hits_and_intervals(pairs)["hits"])["median_rank"]
    assert (result["i2t"], result["t2i"]) == (median(ranks["i2t"]), median(ranks["t2i"]))
    assert result["intervals"]["t2i"] == asdict(median_interval(ranks["t2i"], [str(i) for i in pairs.owner.tolist()]))
    assert (result["intervals"]["t2i"]["n"], result["intervals"]["t2i"]["clusters"]) == (75, 30)
    same = Direction(queries=torch.ones(30, 8), candidates=torch.ones(10, 8), positives=[[0]] * 30, images=range(30))
    assert set(best_ranks(same)) == {10}


def test_median_interval_equals_naive_cluster_bootstrap() -> None:
    random = np.random.default_rng(3)
    values, clusters = random.integers(1, 40, 31).tolist(), [str(n // 4) for n in range(31)]
    found = median_interval(values, clusters, resamples=200)
    of = {name: [v for v, c in zip(values, clusters, strict=True) if c == name] for name in sorted(set(clusters))}
    draws, medians = np.random.default_rng([0, 2]), []
    for _ in range(200):
        drawn = draws.integers(0, 8, 8)
        medians.append(median([v for cluster in drawn for v in list(of.values())[cluster]]))
    assert (found.low, found.high) == pytest.approx(tuple(np.quantile(medians, (0.025, 0.975))))
    assert (found.n, found.clusters) == (31, 8)
    # Five captions with the same rank are one observation of their image: the interval is wider.
    ranks = [float(n) for n in range(1, 31) for _ in range(5)]
    shared = median_interval(ranks, [str(n // 5) for n in range(150)], resamples=300)
    apart = median_interval(ranks, [str(n) for n in range(150)], resamples=300)
    assert shared.low < apart.low < 15.5 < apart.high < shared.high  # type: ignore[operator]


def test_median_interval_of_few_clusters_and_of_equal_ranks() -> None:
    few = median_interval([1, 2, 3, 4, 5, 6], ["a", "b", "c", "d", "e", "e"])
    assert (few.low, few.high, few.n, few.clusters) == (None, None, 6, 5)
    equal = median_interval([1.0] * 6, list("abcdef"))
    assert (equal.low, equal.high) == (1.0, 1.0)


def test_multi_positive_metrics_equal_naive_loop(pairs: EmbeddedPairs) -> None:
    positives: Positives = [[n % 30, (n * 7 + 3) % 30, (n + 11) % 30][: 1 + n % 3] if n % 5 else [] for n in range(75)]
    result = multi_positive(from_texts(pairs, positives))
    order = naive_order(pairs.texts, pairs.images)
    annotated = [(row, set(right)) for row, right in zip(order, positives, strict=True) if right]
    assert result["n"] == len(annotated) == 60
    for k in (1, 5, 10):
        assert result[f"r{k}"] == pytest.approx(sum(bool(set(row[:k]) & right) for row, right in annotated) / 60)
    precision, average = [], []
    for row, right in annotated:
        r = len(right)
        precision.append(len(set(row[:r]) & right) / r)
        average.append(sum(len(set(row[: i + 1]) & right) / (i + 1) for i in range(r) if row[i] in right) / r)
    assert result["r_precision"] == pytest.approx(sum(precision) / 60)
    assert result["map_at_r"] == pytest.approx(sum(average) / 60)
    owner = [str(i) for i, right in zip(pairs.owner.tolist(), positives, strict=True) if right]
    for key in ("r1", "map_at_r"):
        values = average if key == "map_at_r" else [float(row[0] in right) for row, right in annotated]
        expected = interval(Scores(numerators=values, denominators=[1.0] * 60, clusters=owner))
        assert result["intervals"][key] == pytest.approx(asdict(expected))
    single = multi_positive(from_texts(pairs))
    assert (
        single["map_at_r"]
        == single["r1"]
        == pytest.approx(recall_at_k(pairs.images, pairs.texts, pairs.owner)["t2i_r1"])
    )


def test_no_annotated_query_gives_no_interval(pairs: EmbeddedPairs) -> None:
    result = multi_positive(from_texts(pairs, [[] for _ in range(75)]))
    assert result["n"] == 0 and result["map_at_r"] == 0 and result["intervals"] == {}


def test_map_at_r_has_intervals_in_both_directions(pairs: EmbeddedPairs) -> None:
    result = measures(pairs, hits_and_intervals(pairs)["hits"])["map_at_r"]
    for name, direction in (("i2t", from_images(pairs)), ("t2i", from_texts(pairs))):
        values = query_metrics(direction)["map_at_r"]
        assert result[name] == pytest.approx(sum(values) / len(values))
        expected = interval(Scores(numerators=values, denominators=[1.0] * len(values), clusters=direction.clusters))
        assert result["intervals"][name] == asdict(expected)
        assert expected.low is not None and expected.high is not None and expected.low < result[name] < expected.high


def test_geometry_by_hand() -> None:
    images = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    texts = torch.tensor([[0.0, 1.0], [0.0, 1.0]])
    pairs = EmbeddedPairs(images=images, texts=texts, owner=torch.tensor([0, 1]), names=["a", "b"], captions=["x", "y"])
    result = geometry(pairs)
    assert result["modality_gap"] == pytest.approx(math.hypot(0.5, 0.5))
    assert result["alignment"] == pytest.approx((2 + 0) / 2)
    assert result["uniformity_images"] == pytest.approx(-4.0)  # one pair, squared distance 2
    assert result["uniformity_texts"] == pytest.approx(0.0)
    assert uniformity(images[:1]) == 0.0


def test_breakdowns_by_length_and_object(pairs: EmbeddedPairs) -> None:
    hits = hits_and_intervals(pairs)["hits"]
    groups = by_length(pairs, hits)
    assert sum(group["n"] for group in groups) == len(pairs.texts)
    assert [group["words"][0] for group in groups] == sorted({group["words"][0] for group in groups})
    total = sum(group["n"] * group["t2i_r5"] for group in groups) / len(pairs.texts)
    assert total == pytest.approx(hits["t2i_r5"].count("1") / len(pairs.texts))
    rows = by_object(pairs, hits, ["cat", "dog", "elephant", "at"])
    assert [row["object"] for row in rows] == ["cat", "dog"]  # "dogs" counts, "at" inside of "cat" does not
    dogs = [text for text, caption in enumerate(pairs.captions) if "dogs" in caption]
    assert rows[1]["n_texts"] == len(dogs)
    assert rows[1]["t2i_r1"] == sum(hits["t2i_r1"][text] == "1" for text in dogs) / len(dogs)


def test_group_interval_counts_only_its_own_images() -> None:
    """All four images are found; a group of two has Wilson's interval for n = 2, not 4."""
    eye = torch.eye(4)
    captions = ["a cat", "the cat", "one long long dog", "one very long dog"]
    pairs = EmbeddedPairs(images=eye, texts=eye, owner=torch.arange(4), names=list("abcd"), captions=captions)
    hits = hits_and_intervals(pairs)["hits"]
    low, high = wilson(1.0, 2)
    two_hits = {"low": low, "high": high, "n": 2, "clusters": 2}
    cat = by_object(pairs, hits, ["cat"])[0]
    assert set(cat["intervals"]) == {f"{way}_r{k}" for way in ("i2t", "t2i") for k in (1, 5, 10)}
    assert all(span == two_hits for span in cat["intervals"].values())
    groups = by_length(pairs, hits)
    assert [group["n"] for group in groups] == [2, 2]
    assert all(group["intervals"] == {f"t2i_r{k}": two_hits for k in (1, 5, 10)} for group in groups)


def test_positives_file_in_eccv_caption_form(pairs: EmbeddedPairs, tmp_path: Path) -> None:
    owner = pairs.owner.tolist()
    images = [
        {"cocoid": 100 + n, "split": "test", "sentences": [{"sentid": t} for t, i in enumerate(owner) if i == n]}
        for n in range(30)
    ]
    data = tmp_path / "data.json"
    data.write_text(json.dumps({"images": [*images, {"cocoid": 1, "split": "train", "sentences": []}]}))
    file = tmp_path / "eccv.json"
    tree = {"images_of_caption": {"0": [100, 107], "5": [102]}, "captions_of_image": {"103": [7, 8, 20]}}
    file.write_text(json.dumps(tree))
    of_caption, of_image = load_positives(file, data, "test")
    both = directions(pairs, of_caption, of_image)
    expected = from_texts(pairs, [[0, 7] if n == 0 else [2] if n == 5 else [] for n in range(75)])
    assert multi_positive(both["t2i"]) == multi_positive(expected) and multi_positive(both["t2i"])["n"] == 2
    assert of_image == [[7, 8, 20] if n == 3 else [] for n in range(30)]
    assert multi_positive(both["i2t"]) == multi_positive(from_images(pairs, of_image))
    for change, key, value in (
        ({"images_of_caption": {"0": [999]}}, "images_of_caption.0", "999"),
        ({"images_of_caption": {"999": [100]}}, "images_of_caption", "999"),
        ({"captions_of_image": []}, "captions_of_image", None),
    ):
        file.write_text(json.dumps(tree | change))
        with raises_user_error(file=file, key=key, value=value):
            load_positives(file, data, "test")
