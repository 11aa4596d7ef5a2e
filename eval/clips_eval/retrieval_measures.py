"""What recall@k does not tell: ranks, several right answers, which captions fail, and how the embeddings lie.

Shapes: N images, M texts, D embedding width; positives are a list of candidate rows for each query.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

    from vision_tower.embedding import EmbeddedPairs

KS = (1, 5, 10)
QUERIES = 512  # at a time; all candidates are scored for them
PAIRS = 4000  # rows of a modality that uniformity looks at; all pairs of them
Positives = list[list[int]]


def measures(found: EmbeddedPairs, hits: dict[str, str], objects: Sequence[str] = ()) -> dict[str, Any]:
    """Everything that needs no further annotation, for retrieval.json.

    Args:
        hits: `retrieval_scores.trust`'s, a 0 or 1 for each query.
        objects: names to break the recalls down by.
    """
    own_texts: Positives = [[] for _ in range(len(found.images))]
    for text, image in enumerate(found.owner.tolist()):
        own_texts[image].append(text)
    own_image = [[image] for image in found.owner.tolist()]
    return {
        "median_rank": {
            "i2t": median_rank(found.images, found.texts, own_texts),
            "t2i": median_rank(found.texts, found.images, own_image),
        },
        "map_at_r": {
            "i2t": several(found.images, found.texts, own_texts)["map_at_r"],
            "t2i": several(found.texts, found.images, own_image)["map_at_r"],
        },
        "geometry": geometry(found),
        "by_length": by_length(found, hits),
        "by_object": by_object(found, hits, objects),
    }


def median_rank(queries: Tensor, candidates: Tensor, positives: Positives) -> float:
    """Median over the queries of the place of the best positive, 1 at best; of equal scores the positive comes last.

    Equal scores count against the query: an encoder that has collapsed to one point has the last rank, not the first.
    """
    import torch

    ranks = []
    for start in range(0, len(queries), QUERIES):
        scores = queries[start : start + QUERIES] @ candidates.T
        for row, own in zip(scores, positives[start : start + QUERIES], strict=True):
            best = row[own].max()
            ranks.append(int((row >= best).sum()) - int((row[own] >= best).sum()) + 1)
    return float(torch.tensor(ranks, dtype=torch.float64).quantile(0.5))


def several(queries: Tensor, candidates: Tensor, positives: Positives) -> dict[str, float]:
    """Recall@k where any positive counts, R-precision and mAP@R (Musgrave et al. 2020, as ECCV Caption uses them).

    mAP@R of a query with R positives: the mean over places i <= R of precision at i where place i holds a positive, and
    0 where it does not. Queries without a positive are left out; `n` counts the others.
    """
    import torch

    deepest = min(max(*KS, *(len(own) for own in positives)), len(candidates))
    totals = dict.fromkeys((*(f"r{k}" for k in KS), "r_precision", "map_at_r"), 0.0)
    n = 0
    for start in range(0, len(queries), QUERIES):
        best = (queries[start : start + QUERIES] @ candidates.T).topk(deepest, dim=1).indices
        for places, own in zip(best, positives[start : start + QUERIES], strict=True):
            if not own:
                continue
            right = torch.isin(places, torch.tensor(own, device=places.device)).double().cpu()
            first = right[: len(own)]
            precision = first.cumsum(0) / torch.arange(1, len(first) + 1)
            for k in KS:
                totals[f"r{k}"] += float(right[:k].any())
            totals["r_precision"] += float(first.sum()) / len(own)
            totals["map_at_r"] += float((precision * first).sum()) / len(own)
            n += 1
    return {key: total / max(n, 1) for key, total in totals.items()} | {"n": n}


def geometry(found: EmbeddedPairs) -> dict[str, float]:
    """How the unit-norm embeddings lie.

    modality_gap: distance of the two means (Liang et al. 2022). alignment: mean squared distance of a caption from its
    picture, uniformity: log of the mean of exp(-2 d^2) over pairs (Wang & Isola 2020); both better when lower.
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
    return [
        {
            "words": [min(lengths[place] for place in places), max(lengths[place] for place in places)],
            "n": len(places),
            **_shares(hits, places, "t2i"),
        }
        for _, places in sorted(groups.items())
    ]


def by_object(found: EmbeddedPairs, hits: dict[str, str], objects: Sequence[str]) -> list[dict[str, Any]]:
    """For each name: the captions that contain it as a word, and the pictures of which any caption does."""
    owner = found.owner.tolist()
    rows = []
    for name in objects:
        word = re.compile(rf"\b{re.escape(name)}(?:s|es)?\b", re.IGNORECASE)
        texts = [place for place, caption in enumerate(found.captions) if word.search(caption)]
        images = sorted({owner[place] for place in texts})
        if texts:
            counts = {"object": name, "n_texts": len(texts), "n_images": len(images)}
            rows.append(counts | _shares(hits, texts, "t2i") | _shares(hits, images, "i2t"))
    return rows


def _shares(hits: dict[str, str], places: list[int], way: str) -> dict[str, float]:
    return {key: sum(text[place] == "1" for place in places) / len(places) for key, text in hits.items() if way in key}
