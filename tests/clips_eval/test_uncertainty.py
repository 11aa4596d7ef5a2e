"""Intervals and paired tests: against hand calculation, the binomial, a naive bootstrap, lmms-eval's aggregates."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from clips_eval.lmms.documents import by_document
from clips_eval.stats.uncertainty import Difference, Scores, Undefined, holm, interval, paired, value, wilson
from clips_eval.tasks import metrics


def accuracy_of(right: list[float], clusters: list[str] | None = None) -> Scores:
    names = [str(index) for index in range(len(right))] if clusters is None else clusters
    return Scores(numerators=right, denominators=[1.0] * len(right), clusters=names)


def test_independent_answers_give_binomial_interval() -> None:
    rng = random.Random(0)
    right = [float(rng.random() < 0.7) for _ in range(1000)]
    found = interval(accuracy_of(right))
    share = sum(right) / 1000
    low, high = wilson(share, 1000)
    assert found.low == pytest.approx(low, abs=0.005) and found.high == pytest.approx(high, abs=0.005)
    assert (found.n, found.clusters, value(accuracy_of(right))) == (1000, 1000, share)


def test_correlated_questions_widen_the_interval() -> None:
    """Ten questions per image, all right or all wrong, count as one: the width is that of 100 images."""
    rng = random.Random(1)
    image = [float(rng.random() < 0.5) for _ in range(100)]
    right = [score for score in image for _ in range(10)]
    apart = interval(accuracy_of(right))
    together = interval(accuracy_of(right, [str(index // 10) for index in range(1000)]))
    low, high = wilson(sum(image) / 100, 100)
    assert together.high - together.low == pytest.approx(high - low, rel=0.1)  # type: ignore[operator]
    assert together.high - together.low > 2.5 * (apart.high - apart.low)  # type: ignore[operator]
    assert together.clusters == 100 and together.n == 1000


def test_documents_not_counted_do_not_change_the_interval() -> None:
    """Three open questions among 800 documents have the interval of n = 3."""
    for right in (0.0, 1.0):
        few = Scores(
            numerators=[right] * 3 + [0.0] * 797,
            denominators=[1.0] * 3 + [0.0] * 797,
            clusters=[str(index) for index in range(800)],
        )
        found = interval(few)
        assert (found.low, found.high) == pytest.approx(wilson(right, 3))
        assert (found.n, found.clusters, value(few)) == (3, 3, right)


def test_undefined_resamples_are_left_out() -> None:
    """Two of fourteen images have an open question, one right and one wrong."""
    top, bottom = [1.0, 0.0] + [0.0] * 12, [1.0, 1.0] + [0.0] * 12
    found = interval(Scores(numerators=top, denominators=bottom, clusters=[str(index) for index in range(14)]))
    assert (found.low, found.high) == (0.0, 1.0) and found.clusters == 2


def test_undefined_metric_cannot_be_compared() -> None:
    ours = Scores(numerators=[1.0, 0.0], denominators=[1.0, 1.0], clusters=["a", "b"])
    theirs = Scores(numerators=[0.0, 0.0], denominators=[0.0, 0.0], clusters=["a", "b"])
    assert value(theirs) == 0.0 and interval(theirs).low is None
    with pytest.raises(Undefined):
        paired(ours, theirs)


def test_verdict_if_lower_is_better() -> None:
    fewer = paired(accuracy_of([0.0] * 40), accuracy_of([1.0] * 40))
    assert fewer.verdict == "worse" and replace(fewer, lower=True).verdict == "better"


def test_f1_interval_equals_naive_cluster_bootstrap() -> None:
    """Clusters of unequal size, resampled in a loop and aggregated by the metric's own function."""
    rng = random.Random(2)
    clusters = [str(rng.randrange(40)) for _ in range(200)]
    rows = [{"prediction": rng.choice(["yes", "no"]), "ground_truth": rng.choice(["yes", "no"])} for _ in clusters]
    found = by_document("clips_pope_random", "f1", rows, metrics.pope_f1(rows))
    assert found is not None
    fast = interval(found.scores(clusters))
    names = sorted(set(clusters))
    of = {name: [row for row, cluster in zip(rows, clusters, strict=True) if cluster == name] for name in names}
    draws = [
        metrics.pope_f1([row for name in rng.choices(names, k=len(names)) for row in of[name]]) for _ in range(800)
    ]
    low, high = np.quantile(draws, (0.025, 0.975))
    assert fast.low == pytest.approx(low, abs=0.015) and fast.high == pytest.approx(high, abs=0.015)


def test_equal_scores_and_single_image_get_wilsons_interval() -> None:
    assert interval(accuracy_of([1.0] * 20)).low == pytest.approx(wilson(1.0, 20)[0])
    one = interval(accuracy_of([1.0, 0.0, 1.0], ["a"] * 3))
    assert one.clusters == 1 and one.high - one.low > 0.7  # type: ignore[operator]
    points = Scores(numerators=[150.0] * 4, denominators=[1.0] * 4, clusters=list("abcd"))
    assert interval(points).low is None


def test_interval_has_its_nominal_coverage() -> None:
    rng = np.random.default_rng(3)
    hit = 0
    for _ in range(200):
        image = rng.random(60) < 0.6
        right = [float(x) for x in np.repeat(image, 3)]
        found = interval(accuracy_of(right, [str(n // 3) for n in range(180)]), resamples=400)
        hit += found.low <= 0.6 <= found.high  # type: ignore[operator]
    assert 0.89 <= hit / 200 <= 0.99


def test_paired_test_is_stronger_than_two_intervals() -> None:
    """Both runs are near 60 %, ours is right on 30 more of 1,000 documents: the intervals overlap."""
    rng = random.Random(4)
    theirs = [float(rng.random() < 0.6) for _ in range(1000)]
    wrong = [index for index, right in enumerate(theirs) if not right][:30]
    ours = [1.0 if index in wrong else right for index, right in enumerate(theirs)]
    found = paired(accuracy_of(ours), accuracy_of(theirs))
    assert found.value == pytest.approx(0.03)
    assert found.low > 0 and found.p < 0.005 and found.verdict == "better"
    assert paired(accuracy_of(theirs), accuracy_of(ours)).verdict == "worse"
    assert interval(accuracy_of(ours)).low < interval(accuracy_of(theirs)).high  # type: ignore[operator]
    same = paired(accuracy_of(ours), accuracy_of(ours))
    assert (same.value, same.p, same.verdict) == (0.0, 1.0, "no difference")


def test_permutation_test_equals_sign_test() -> None:
    """Five documents, all better: 2 of the 32 permutations are as extreme."""
    found = paired(accuracy_of([1.0] * 5), accuracy_of([0.0] * 5), resamples=4000)
    assert found.p == pytest.approx(2 / 32, abs=0.012)


def test_paired_refuses_different_documents() -> None:
    with pytest.raises(ValueError):
        paired(accuracy_of([1.0, 0.0]), accuracy_of([1.0, 0.0], ["a", "b"]))


def test_holm_by_hand() -> None:
    raw = [0.04, 0.01, 0.03]
    found = holm([Difference(value=0.1, low=0, high=1, p=p, n=9, clusters=9) for p in raw])
    assert [one.adjusted for one in found] == pytest.approx([0.06, 0.03, 0.06])
    assert [one.verdict for one in found] == ["no difference", "better", "no difference"]


def test_document_terms_reproduce_every_metric() -> None:
    rng = random.Random(5)
    pope = [
        {"prediction": rng.choice(["yes", "no", "?"]), "ground_truth": rng.choice(["yes", "no"])} for _ in range(50)
    ]
    pope = [row | {"score": float(row["prediction"] == row["ground_truth"])} for row in pope]
    kinds = [{"score": float(rng.random() < 0.5), "kind": rng.choice(["open", "yes_no"])} for _ in range(50)]
    turns: list[dict[str, Any]] = [
        {"index": n + 1_000_000 * turn, "score": float(rng.random() < 0.8)} for n in range(20) for turn in range(3)
    ]
    cases = [
        ("clips_pope_random", "precision", pope, metrics.pope_precision(pope)),
        ("clips_pope_random", "recall", pope, metrics.pope_recall(pope)),
        ("clips_pope_random", "yes_ratio", pope, metrics.pope_yes_ratio(pope)),
        ("pope", "accuracy", pope, sum(row["score"] for row in pope) / 50),
        ("clips_easy_vqa", "open_accuracy", kinds, metrics.easy_vqa_open_accuracy(kinds)),
        ("clips_mmbench", "accuracy", turns, metrics.mmbench_accuracy(turns)),
        ("gqa", "exact_match", [1.0, 0.0, 0.5], 0.5),
    ]
    for task, metric, rows, reported in cases:
        found = by_document(task, metric, rows, reported)  # type: ignore[arg-type]
        assert found is not None, metric
    assert by_document("gqa", "exact_match", [1.0, 0.0], 0.75) is None  # not the mean of the documents: no interval
    assert by_document("nocaps_val", "nocaps_CIDEr", [{"answer": ["a"], "pred": "b", "image_id": 1}], 1.0) is None


def test_mme_score_equals_lmms_eval() -> None:
    from lmms_eval.tasks.mme.utils import mme_aggregate_results

    rng = random.Random(6)
    rows = [
        {"question_id": f"{category}/{n}", "category": category, "score": float(rng.random() < 0.7)}
        for category in ("count", "color")
        for n in range(15)
        for _ in range(2)
    ]
    reported = mme_aggregate_results(rows)
    found = by_document("mme", "mme_perception_score", [*rows, None], reported)
    assert found is not None
    clusters = [row["question_id"] for row in rows] + ["other"]
    span = interval(found.scores(clusters))
    assert span.low < reported < span.high and span.clusters == 30  # type: ignore[operator]


def test_holm_over_150_metrics_can_be_significant() -> None:
    """Holm multiplies the smallest p by the number of metrics: 1 / 2001 would exceed 5 % from 101 metrics on."""
    names = [str(number) for number in range(200)]
    right, wrong = (Scores(numerators=[share] * 200, denominators=[1] * 200, clusters=names) for share in (1, 0))
    clear = paired(right, wrong)
    assert clear.p < 1 / 20_000
    assert all(one.adjusted is not None and one.adjusted < 0.05 for one in holm([clear] * 150))
    assert paired(right, right).p == 1


def test_yes_ratio_is_not_compared() -> None:
    from types import SimpleNamespace

    from clips_eval.experiments.compare_report import _metrics

    tasks = {"clips_pope_random": dict.fromkeys(["accuracy", "yes_ratio", "target_yes_ratio", "n"], 0.5)}
    run: Any = SimpleNamespace(retrieval=None, lmms=SimpleNamespace(tasks=tasks))
    assert _metrics(run) == [("clips_pope_random", "accuracy")]
