"""Retrieval metrics beyond recall@k: ranks, several positives, breakdowns by caption, embedding geometry.

Shapes: N images, M texts, Q queries, C candidates, D embedding width.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import TYPE_CHECKING, Any

from clips_eval.retrieval.scores import KS, mean_intervals
from clips_eval.stats.uncertainty import median_interval

if TYPE_CHECKING:
    from torch import Tensor

    from vision_tower.evaluation.embedding import EmbeddedPairs

QUERY_CHUNK = 512  # queries scored at a time against all candidates
MAX_UNIFORMITY_ROWS = 4000  # uniformity compares all pairs of rows
Positives = list[list[int]]  # candidate rows of each query


@dataclass(frozen=True, kw_only=True)
class Direction:
    """Queries (Q, D) searching candidates (C, D).

    Args:
        images: Q row numbers, the image that each query is or describes.
    """

    queries: Tensor
    candidates: Tensor
    positives: Positives
    images: Sequence[int]

    @property
    def clusters(self) -> list[str]:
        """Images of the queries that have a positive."""
        return [str(image) for image, own in zip(self.images, self.positives, strict=True) if own]


def measures(pairs: EmbeddedPairs, hits: dict[str, str], objects: Sequence[str] = ()) -> dict[str, Any]:
    """Return the metrics of retrieval.json that need no further annotation.

    Means over queries have 95 % `intervals` with the same keys. `geometry` has none: it describes the embeddings of
    this data set and is not a mean over queries.

    Args:
        hits: 0 or 1 per query, as `hits_and_intervals` returns them.
        objects: names to break the recalls down by.
    """
    owner = pairs.owner.tolist()
    own_texts: Positives = [[] for _ in range(len(pairs.images))]
    for text, image in enumerate(owner):
        own_texts[image].append(text)
    both = directions(pairs, [[image] for image in owner], own_texts)
    return {
        "median_rank": _median_ranks(both),
        "map_at_r": _own_map_at_r(both),
        "geometry": geometry(pairs),
        "by_length": by_length(pairs, hits),
        "by_object": by_object(pairs, hits, objects),
    }


def directions(pairs: EmbeddedPairs, of_caption: Positives, of_image: Positives) -> dict[str, Direction]:
    """Return image-to-text and text-to-image retrieval with the given positives of captions and images."""
    owner, rows = pairs.owner.tolist(), range(len(pairs.images))
    return {
        "i2t": Direction(queries=pairs.images, candidates=pairs.texts, positives=of_image, images=rows),
        "t2i": Direction(queries=pairs.texts, candidates=pairs.images, positives=of_caption, images=owner),
    }


def _median_ranks(both: dict[str, Direction]) -> dict[str, Any]:
    ranks = {name: best_ranks(direction) for name, direction in both.items()}
    intervals = {name: asdict(median_interval(ranks[name], direction.clusters)) for name, direction in both.items()}
    return {name: float(median(some)) for name, some in ranks.items()} | {"intervals": intervals}


def _own_map_at_r(both: dict[str, Direction]) -> dict[str, Any]:
    values = {name: query_metrics(direction)["map_at_r"] for name, direction in both.items()}
    intervals = {
        name: mean_intervals({name: values[name]}, direction.clusters)[name] for name, direction in both.items()
    }
    return {name: sum(some) / len(some) for name, some in values.items()} | {"intervals": intervals}


def best_ranks(direction: Direction) -> list[int]:
    """Return the rank of each query's best positive, from 1.

    Negatives with the same score rank before the positive: an encoder that has collapsed to one point gets the last
    rank, not the first.
    """
    ranks = []
    for start in range(0, len(direction.queries), QUERY_CHUNK):
        scores = direction.queries[start : start + QUERY_CHUNK] @ direction.candidates.T
        for row, own in zip(scores, direction.positives[start : start + QUERY_CHUNK], strict=True):
            best = row[own].max()
            ranks.append(int((row >= best).sum()) - int((row[own] >= best).sum()) + 1)
    return ranks


def multi_positive(direction: Direction) -> dict[str, Any]:
    """Return the means of `query_metrics`, their `intervals` with the same keys, and the number `n` of queries."""
    values = query_metrics(direction)
    n = len(values["r1"])
    means = {key: sum(some) / max(n, 1) for key, some in values.items()}
    return means | {"n": n, "intervals": mean_intervals(values, direction.clusters)}


def query_metrics(direction: Direction) -> dict[str, list[float]]:
    """Return recall@k (any positive counts), R-precision and mAP@R of each query that has a positive.

    mAP@R of a query with R positives is the mean over ranks i <= R of the precision at i if the candidate at rank i is
    positive, else 0 (Musgrave et al. 2020, used by ECCV Caption).
    """
    import torch

    depth = min(max(*KS, *(len(own) for own in direction.positives)), len(direction.candidates))
    values: dict[str, list[float]] = {key: [] for key in (*(f"r{k}" for k in KS), "r_precision", "map_at_r")}
    for start in range(0, len(direction.queries), QUERY_CHUNK):
        scores = direction.queries[start : start + QUERY_CHUNK] @ direction.candidates.T
        best = scores.topk(depth, dim=1).indices
        for rows, own in zip(best, direction.positives[start : start + QUERY_CHUNK], strict=True):
            if not own:
                continue
            positive = torch.isin(rows, torch.tensor(own, device=rows.device)).double().cpu()
            first = positive[: len(own)]
            precision = first.cumsum(0) / torch.arange(1, len(first) + 1)
            for k in KS:
                values[f"r{k}"].append(float(positive[:k].any()))
            values["r_precision"].append(float(first.sum()) / len(own))
            values["map_at_r"].append(float((precision * first).sum()) / len(own))
    return values


def geometry(pairs: EmbeddedPairs) -> dict[str, float]:
    """Return statistics of the unit-norm embeddings.

    modality_gap: distance of the two means (Liang et al. 2022). alignment: mean squared distance of a caption to its
    image; uniformity: log of the mean of exp(-2 d^2) over pairs (Wang & Isola 2020). Lower is better for the last two.
    """
    images, texts = pairs.images.double(), pairs.texts.double()
    return {
        "modality_gap": float((images.mean(0) - texts.mean(0)).norm()),
        "alignment": float((images[pairs.owner] - texts).pow(2).sum(1).mean()),
        "uniformity_images": uniformity(images),
        "uniformity_texts": uniformity(texts),
    }


def uniformity(rows: Tensor) -> float:
    """Return the uniformity of at most MAX_UNIFORMITY_ROWS evenly spaced rows; 0 for a single row."""
    import torch

    if len(rows) > MAX_UNIFORMITY_ROWS:
        rows = rows[torch.linspace(0, len(rows) - 1, MAX_UNIFORMITY_ROWS).round().long()]
    if len(rows) < 2:
        return 0.0
    return float(torch.pdist(rows).pow(2).mul(-2).exp().mean().log())


def by_length(pairs: EmbeddedPairs, hits: dict[str, str]) -> list[dict[str, Any]]:
    """Break text-to-image recall down by caption length in words: four groups of nearly equal size.

    Captions of equal length are in the same group.
    """
    lengths = [len(caption.split()) for caption in pairs.captions]
    ordered = sorted(lengths)
    edges = sorted({ordered[min(len(ordered) * quarter // 4, len(ordered) - 1)] for quarter in range(1, 4)})
    groups: dict[int, list[int]] = {}
    for text, length in enumerate(lengths):
        groups.setdefault(sum(length > edge for edge in edges), []).append(text)
    owner = pairs.owner.tolist()
    rows = []
    for _, texts in sorted(groups.items()):
        words = [lengths[text] for text in texts]
        means, intervals = _group_recalls(hits, texts, "t2i", owner)
        rows.append({"words": [min(words), max(words)], "n": len(texts), **means, "intervals": intervals})
    return rows


def by_object(pairs: EmbeddedPairs, hits: dict[str, str], objects: Sequence[str]) -> list[dict[str, Any]]:
    """Break recall down by name: captions that contain it as a word, and the images of these captions.

    A name that no caption contains has no row.
    """
    owner = pairs.owner.tolist()
    rows = []
    for name in objects:
        word = re.compile(rf"\b{re.escape(name)}(?:s|es)?\b", re.IGNORECASE)
        texts = [text for text, caption in enumerate(pairs.captions) if word.search(caption)]
        images = sorted({owner[text] for text in texts})
        if texts:
            counts = {"object": name, "n_texts": len(texts), "n_images": len(images)}
            t2i, t2i_intervals = _group_recalls(hits, texts, "t2i", owner)
            i2t, i2t_intervals = _group_recalls(hits, images, "i2t", range(len(pairs.images)))
            rows.append(counts | t2i | i2t | {"intervals": t2i_intervals | i2t_intervals})
    return rows


def _group_recalls(
    hits: dict[str, str], queries: list[int], direction: str, images: Sequence[int]
) -> tuple[dict[str, float], dict[str, dict[str, Any]]]:
    """Return the recalls over some queries and their intervals; `images` has the image of every query."""
    # Only this group's queries: Wilson's interval and the clusters must not count the others.
    values = {key: [float(text[query]) for query in queries] for key, text in hits.items() if direction in key}
    means = {key: sum(some) / len(some) for key, some in values.items()}
    return means, mean_intervals(values, [str(images[query]) for query in queries])
