"""What recall@k does not tell: ranks, several right answers, which captions fail, and how the embeddings lie.

Shapes: N images, M texts, D embedding width; positives are a list of candidate rows for each query.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import TYPE_CHECKING, Any

from clips_eval.retrieval.scores import spans_of
from clips_eval.stats.median import median_interval

if TYPE_CHECKING:
    from torch import Tensor

    from vision_tower.evaluation.embedding import EmbeddedPairs

KS = (1, 5, 10)
QUERIES = 512  # at a time; all candidates are scored for them
PAIRS = 4000  # rows of a modality that uniformity looks at; all pairs of them
Positives = list[list[int]]


@dataclass(frozen=True, kw_only=True)
class Way:
    """One direction: Q queries (Q, D) among candidates (C, D), and the image that each query is or describes."""

    queries: Tensor
    candidates: Tensor
    positives: Positives
    images: Sequence[int]

    @property
    def clusters(self) -> list[str]:
        """Of the queries that have a positive."""
        return [str(image) for image, own in zip(self.images, self.positives, strict=True) if own]


def measures(found: EmbeddedPairs, hits: dict[str, str], objects: Sequence[str] = ()) -> dict[str, Any]:
    """Everything that needs no further annotation, for retrieval.json.

    Beside numbers over queries stand their 95 % `intervals`, by the same keys. `geometry` has none: it describes how
    this set's embeddings lie to one another, and is no mean over queries that another draw would give anew.

    Args:
        hits: `retrieval_scores.trust`'s, a 0 or 1 for each query.
        objects: names to break the recalls down by.
    """
    owner = found.owner.tolist()
    own_texts: Positives = [[] for _ in range(len(found.images))]
    for text, image in enumerate(owner):
        own_texts[image].append(text)
    ways = {
        "i2t": Way(queries=found.images, candidates=found.texts, positives=own_texts, images=range(len(found.images))),
        "t2i": Way(queries=found.texts, candidates=found.images, positives=[[image] for image in owner], images=owner),
    }
    return {
        "median_rank": _median_ranks(ways),
        "map_at_r": _own_map_at_r(ways),
        "geometry": geometry(found),
        "by_length": by_length(found, hits),
        "by_object": by_object(found, hits, objects),
    }


def _median_ranks(ways: dict[str, Way]) -> dict[str, Any]:
    ranks = {name: best_ranks(way) for name, way in ways.items()}
    spans = {name: asdict(median_interval(ranks[name], way.clusters)) for name, way in ways.items()}
    return {name: float(median(some)) for name, some in ranks.items()} | {"intervals": spans}


def _own_map_at_r(ways: dict[str, Way]) -> dict[str, Any]:
    parts = {name: answers(way)["map_at_r"] for name, way in ways.items()}
    spans = {name: spans_of({name: parts[name]}, way.clusters)[name] for name, way in ways.items()}
    return {name: sum(part) / len(part) for name, part in parts.items()} | {"intervals": spans}


def best_ranks(way: Way) -> list[int]:
    """The place of each query's best positive, 1 at best; of equal scores the positive comes last.

    Equal scores count against the query: an encoder that has collapsed to one point has the last rank, not the first.
    """
    ranks = []
    for start in range(0, len(way.queries), QUERIES):
        scores = way.queries[start : start + QUERIES] @ way.candidates.T
        for row, own in zip(scores, way.positives[start : start + QUERIES], strict=True):
            best = row[own].max()
            ranks.append(int((row >= best).sum()) - int((row[own] >= best).sum()) + 1)
    return ranks


def several(way: Way) -> dict[str, Any]:
    """The means of `answers`, `n` queries that they are over, and the `intervals` of the means by the same keys."""
    parts = answers(way)
    n = len(parts["r1"])
    means = {key: sum(values) / max(n, 1) for key, values in parts.items()}
    return means | {"n": n, "intervals": spans_of(parts, way.clusters)}


def answers(way: Way) -> dict[str, list[float]]:
    """Recall@k where any positive counts, R-precision and mAP@R (Musgrave et al. 2020, as ECCV Caption uses them).

    mAP@R of a query with R positives: the mean over places i <= R of precision at i where place i holds a positive, and
    0 where it does not. A number for each query that has a positive; the others are left out.
    """
    import torch

    deepest = min(max(*KS, *(len(own) for own in way.positives)), len(way.candidates))
    found: dict[str, list[float]] = {key: [] for key in (*(f"r{k}" for k in KS), "r_precision", "map_at_r")}
    for start in range(0, len(way.queries), QUERIES):
        best = (way.queries[start : start + QUERIES] @ way.candidates.T).topk(deepest, dim=1).indices
        for places, own in zip(best, way.positives[start : start + QUERIES], strict=True):
            if not own:
                continue
            right = torch.isin(places, torch.tensor(own, device=places.device)).double().cpu()
            first = right[: len(own)]
            precision = first.cumsum(0) / torch.arange(1, len(first) + 1)
            for k in KS:
                found[f"r{k}"].append(float(right[:k].any()))
            found["r_precision"].append(float(first.sum()) / len(own))
            found["map_at_r"].append(float((precision * first).sum()) / len(own))
    return found


def geometry(found: EmbeddedPairs) -> dict[str, float]:
    """How the unit-norm embeddings lie.

    modality_gap: distance of the two means (Liang et al. 2022). alignment: mean squared distance of a caption from its
    image, uniformity: log of the mean of exp(-2 d^2) over pairs (Wang & Isola 2020); both better when lower.
    """
    images, texts = found.images.double(), found.texts.double()
    return {
        "modality_gap": float((images.mean(0) - texts.mean(0)).norm()),
        "alignment": float((images[found.owner] - texts).pow(2).sum(1).mean()),
        "uniformity_images": uniformity(images),
        "uniformity_texts": uniformity(texts),
    }


def uniformity(rows: Tensor) -> float:
    """Of at most PAIRS rows, evenly spaced; 0 for a single row."""
    import torch

    if len(rows) > PAIRS:
        rows = rows[torch.linspace(0, len(rows) - 1, PAIRS).round().long()]
    if len(rows) < 2:
        return 0.0
    return float(torch.pdist(rows).pow(2).mul(-2).exp().mean().log())


def by_length(found: EmbeddedPairs, hits: dict[str, str]) -> list[dict[str, Any]]:
    """Text to image, by words in the caption: four groups of nearly equal size; equal lengths stay together."""
    lengths = [len(caption.split()) for caption in found.captions]
    ordered = sorted(lengths)
    edges = sorted({ordered[min(len(ordered) * part // 4, len(ordered) - 1)] for part in range(1, 4)})
    groups: dict[int, list[int]] = {}
    for place, length in enumerate(lengths):
        groups.setdefault(sum(length > edge for edge in edges), []).append(place)
    owner = found.owner.tolist()
    rows = []
    for _, places in sorted(groups.items()):
        words = [lengths[place] for place in places]
        means, spans = _shares(hits, places, "t2i", owner)
        rows.append({"words": [min(words), max(words)], "n": len(places), **means, "intervals": spans})
    return rows


def by_object(found: EmbeddedPairs, hits: dict[str, str], objects: Sequence[str]) -> list[dict[str, Any]]:
    """For each name: the captions that contain it as a word, and the images of which any caption does.

    A name that no caption contains has no row.
    """
    owner = found.owner.tolist()
    rows = []
    for name in objects:
        word = re.compile(rf"\b{re.escape(name)}(?:s|es)?\b", re.IGNORECASE)
        texts = [place for place, caption in enumerate(found.captions) if word.search(caption)]
        images = sorted({owner[place] for place in texts})
        if texts:
            counts = {"object": name, "n_texts": len(texts), "n_images": len(images)}
            means, spans = _shares(hits, texts, "t2i", owner)
            more, wider = _shares(hits, images, "i2t", range(len(found.images)))
            rows.append(counts | means | more | {"intervals": spans | wider})
    return rows


def _shares(
    hits: dict[str, str], places: list[int], way: str, images: Sequence[int]
) -> tuple[dict[str, float], dict[str, dict[str, Any]]]:
    """Recalls of the queries at `places`, and their intervals; `images` are those of all queries."""
    parts = {key: [float(text[place]) for place in places] for key, text in hits.items() if way in key}
    means = {key: sum(part) / len(part) for key, part in parts.items()}
    return means, spans_of(parts, [str(images[place]) for place in places])
