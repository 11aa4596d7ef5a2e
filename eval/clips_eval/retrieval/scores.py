"""From embeddings to recall and example retrievals.

Apart from the command, because the option parser runs the `TYPE_CHECKING` imports of the module that holds a recipe:
torch among them would make `--help` take seconds.
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

KS = (1, 5, 10)
EXAMPLES = 4  # queries kept in each direction for the report


def score(encoder: Path, found: EmbeddedPairs) -> dict[str, float]:
    """Recall@k both ways, as fractions. Raises UserError on an encoder whose embeddings are not finite."""
    from vision_tower.evaluation.recall import recall_at_k

    try:
        return recall_at_k(found.images, found.texts, found.owner, ks=KS)
    except NotFinite as error:
        raise diverged(encoder) from error


def trust(found: EmbeddedPairs) -> dict[str, Any]:
    """Intervals of the recalls by image, and what they rest on: a 0 or 1 for each query, for comparisons.

    `data_sha256` tells whether two runs were measured on the same data, see `data_digest`.
    """
    from vision_tower.evaluation.recall import hits_at_k

    hits = {
        key: "".join("1" if hit else "0" for hit in queries.tolist())
        for key, queries in hits_at_k(found.images, found.texts, found.owner, ks=KS).items()
    }
    told = {"hits": hits, "captions_per_image": found.owner.bincount(minlength=len(found.images)).tolist()}
    return {
        "intervals": {key: asdict(interval(hit_scores(text, query_clusters(told, key)))) for key, text in hits.items()},
        "data_sha256": data_digest(found),
        **told,
    }


def data_digest(found: EmbeddedPairs) -> str:
    """SHA-256 over the bytes of the images, the captions and which belong together, all in their order.

    File names and places are not in it, so the same data as a JSON, a CSV or shards are the same.
    """
    return value_hash([found.digests, list(zip(found.owner.tolist(), found.captions, strict=True))])


def hit_scores(hits: str, clusters: list[str]) -> Scores:
    """A string of 0 and 1, a character for each query, as a metric by document."""
    return mean_scores([float(hit) for hit in hits], clusters)


def mean_scores(values: Sequence[float], clusters: Sequence[str]) -> Scores:
    """The mean of a value for each query, as a metric by document."""
    return Scores(numerators=values, denominators=[1.0] * len(values), clusters=clusters)


def spans_of(parts: Mapping[str, Sequence[float]], clusters: Sequence[str]) -> dict[str, dict[str, Any]]:
    """The interval of each mean as JSON has it: low, high, n queries, clusters; none where nothing was asked.

    Of a group of queries only these are given: the others say nothing of it.
    """
    return {key: asdict(interval(mean_scores(values, clusters))) for key, values in parts.items() if values}


def query_clusters(told: dict[str, Any], key: str) -> list[str]:
    """The image of each query: an image's captions share its luck."""
    if key.startswith("i2t"):
        return [str(place) for place in range(len(told["hits"][key]))]
    return [str(place) for place, count in enumerate(told["captions_per_image"]) for _ in range(count)]


def examples(found: EmbeddedPairs, folder: Path) -> dict[str, list[dict[str, Any]]]:
    """A few queries with their five best answers, evenly spaced over the data so that none is hand-picked.

    Image files are named relative to `folder`, where the scores are written, so that a run can be moved.
    """
    owner = found.owner.tolist()
    rows: dict[str, list[dict[str, Any]]] = {"text_to_image": [], "image_to_text": []}
    for query in _spread(len(found.texts), EXAMPLES):
        best = (found.texts[query] @ found.images.T).topk(min(5, len(found.images))).indices.tolist()
        row = {"query": found.captions[query], "images": [_place(found.names[i], folder) for i in best]}
        rows["text_to_image"].append(row | {"correct": [i == owner[query] for i in best]})
    for query in _spread(len(found.images), EXAMPLES):
        best = (found.images[query] @ found.texts.T).topk(min(5, len(found.texts))).indices.tolist()
        row = {"query": _place(found.names[query], folder), "texts": [found.captions[j] for j in best]}
        rows["image_to_text"].append(row | {"correct": [owner[j] == query for j in best]})
    return rows


def _place(name: str, folder: Path) -> str:
    """An image inside a shard has no file of its own and keeps its name."""
    return os.path.relpath(name, folder) if os.path.isfile(name) else name


def _spread(total: int, count: int) -> list[int]:
    """At most `count` places, evenly spaced in `range(total)`."""
    return sorted({(2 * i + 1) * total // (2 * count) for i in range(count)})
