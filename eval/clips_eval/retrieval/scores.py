"""Recall, intervals and example retrievals from embeddings; intervals of zero-shot accuracies.

Not in the commands' modules: the option parser executes the `TYPE_CHECKING` imports of a module that holds a recipe,
and importing torch would make `--help` take seconds.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clips_eval.stats.provenance import diverged
from clips_eval.stats.uncertainty import Scores, interval
from vision_tower.common.errors import NotFinite
from vision_tower.common.hashes import value_hash

if TYPE_CHECKING:
    from vision_tower.evaluation.embedding import EmbeddedPairs
    from vision_tower.evaluation.zeroshot import ZeroShotScores

KS = (1, 5, 10)
EXAMPLES = 4  # queries per direction kept for the report


def recalls_of(encoder: Path, pairs: EmbeddedPairs) -> dict[str, float]:
    """Return recall@k in both directions as fractions.

    Raises:
        UserError: the embeddings contain NaN or infinity.
    """
    from vision_tower.evaluation.recall import recall_at_k

    try:
        return recall_at_k(pairs.images, pairs.texts, pairs.owner, ks=KS)
    except NotFinite as error:
        raise diverged(encoder) from error


def hits_and_intervals(pairs: EmbeddedPairs) -> dict[str, Any]:
    """Return `hits` (a string of 0 and 1 per query, for paired comparisons), the recalls' `intervals`, `data_sha256`.

    Two results with the same `data_sha256` can be compared query by query.
    """
    from vision_tower.evaluation.recall import hits_at_k

    hits = {
        key: "".join("1" if hit else "0" for hit in queries.tolist())
        for key, queries in hits_at_k(pairs.images, pairs.texts, pairs.owner, ks=KS).items()
    }
    result = {"hits": hits, "captions_per_image": pairs.owner.bincount(minlength=len(pairs.images)).tolist()}
    return {
        "intervals": {
            key: asdict(interval(hit_scores(text, query_clusters(result, key)))) for key, text in hits.items()
        },
        "data_sha256": data_digest(pairs),
        **result,
    }


def data_digest(pairs: EmbeddedPairs) -> str:
    """Return the SHA-256 of the images' bytes, the captions and their assignment, in order.

    File names and folders are left out: the same data as JSON, CSV or shards has the same digest.
    """
    return value_hash([pairs.digests, list(zip(pairs.owner.tolist(), pairs.captions, strict=True))])


def hit_scores(hits: str, clusters: list[str]) -> Scores:
    """Convert a string of 0 and 1 per query to `Scores`."""
    return mean_scores([float(hit) for hit in hits], clusters)


def mean_scores(values: Sequence[float], clusters: Sequence[str]) -> Scores:
    """`Scores` of the mean of one value per query."""
    return Scores(numerators=values, denominators=[1.0] * len(values), clusters=clusters)


def mean_intervals(values: Mapping[str, Sequence[float]], clusters: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Return the interval of each mean as in retrieval.json; a key without values has none."""
    return {key: asdict(interval(mean_scores(some, clusters))) for key, some in values.items() if some}


def query_clusters(result: dict[str, Any], key: str) -> list[str]:
    """Return the image of each query: captions of the same image are one cluster."""
    if key.startswith("i2t"):
        return [str(image) for image in range(len(result["hits"][key]))]
    return [str(image) for image, count in enumerate(result["captions_per_image"]) for _ in range(count)]


def examples(pairs: EmbeddedPairs, folder: Path) -> dict[str, list[dict[str, Any]]]:
    """Return a few queries with their five best candidates, evenly spaced over the data.

    Image files are named relative to `folder`, which holds the scores, so that a run folder can be moved.
    """
    owner = pairs.owner.tolist()
    rows: dict[str, list[dict[str, Any]]] = {"text_to_image": [], "image_to_text": []}
    for query in _spread(len(pairs.texts), EXAMPLES):
        best = (pairs.texts[query] @ pairs.images.T).topk(min(5, len(pairs.images))).indices.tolist()
        row = {"query": pairs.captions[query], "images": [_relative(pairs.names[i], folder) for i in best]}
        rows["text_to_image"].append(row | {"correct": [i == owner[query] for i in best]})
    for query in _spread(len(pairs.images), EXAMPLES):
        best = (pairs.images[query] @ pairs.texts.T).topk(min(5, len(pairs.texts))).indices.tolist()
        row = {"query": _relative(pairs.names[query], folder), "texts": [pairs.captions[j] for j in best]}
        rows["image_to_text"].append(row | {"correct": [owner[j] == query for j in best]})
    return rows


def zeroshot_intervals(scores: ZeroShotScores) -> dict[str, dict[str, Any]]:
    """Return the intervals of the zero-shot accuracies by their keys; every image is its own cluster.

    The mean per class sums correct / n over classes, each divided by the number of classes with images.
    """
    clusters = [str(image) for image in range(len(scores.first))]
    classes = sum(n > 0 for n in scores.images_per_class)
    per_class = Scores(
        numerators=[hit / classes for hit in scores.first],
        denominators=[1.0] * len(clusters),
        clusters=clusters,
        strata=[str(label) for label in scores.labels],
    )
    metrics = {"top1": mean_scores([float(hit) for hit in scores.first], clusters), "mean_per_class": per_class}
    if scores.top5 is not None:
        metrics["top5"] = mean_scores([float(hit) for hit in scores.near], clusters)
    return {key: asdict(interval(metric)) for key, metric in metrics.items()}


def _relative(name: str, folder: Path) -> str:
    """Return the path relative to `folder`; an image inside a shard has no file and keeps its name."""
    return os.path.relpath(name, folder) if os.path.isfile(name) else name


def _spread(total: int, count: int) -> list[int]:
    """Return at most `count` indices, evenly spaced in `range(total)`."""
    return sorted({(2 * i + 1) * total // (2 * count) for i in range(count)})
