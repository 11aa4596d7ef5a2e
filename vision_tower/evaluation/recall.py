"""Recall@k between images and texts, computed block by block: the full similarity matrix is never in memory.

    texts (M, D), images (N, D) --block by block--> scores (TEXTS, IMAGES) --topk of rows-----> best images per text
                                                                           --topk of columns--> best texts per image

Shapes: N images, M texts, D embedding width, Q queries, C candidates.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from vision_tower.common.errors import NotFinite

# Size of a block. One product serves both directions; wide blocks make the cost of topk over columns small.
TEXTS, IMAGES = 1024, 8192
TIED = 64  # queries with ties that are ranked over all candidates at a time


def recall_at_k(
    images: Tensor,
    texts: Tensor,
    image_of_text: Tensor,
    ks: Sequence[int] = (1, 5, 10),
    block: tuple[int, int] = (TEXTS, IMAGES),
) -> dict[str, float]:
    """Return recall@k in both directions as fractions of the queries, equal to CLIP_benchmark's.

    Image to text: an image counts if *any* of its texts is among its k best texts, the usual protocol for COCO and
    Flickr30K, which have five captions per image. Text to image: a text counts if its image is among its k best images.

    If scores are tied at rank k (duplicate captions), `torch.topk` over all candidates decides, as in CLIP_benchmark
    (`clip_benchmark.metrics.zeroshot_retrieval`). It sees only the scores, so a collapsed encoder scores chance.
    Fractions are rounded to fp32, as in CLIP_benchmark.

    Args:
        images: (N, D), of unit norm for cosine similarity.
        texts: (M, D).
        image_of_text: (M,) integer, the row of `images` that each text describes.
        block: texts and images at a time. Memory is one block plus max(ks) + 1 scores per query, linear in N + M.
    Returns:
        `{"i2t_r1": ..., "t2i_r1": ...}`, a pair of keys for each k.
    Raises:
        ValueError: shapes that do not fit, or an image without a text.
        NotFinite: an embedding is not finite.
    """
    found = hits_at_k(images, texts, image_of_text, ks, block)
    return {key: _share(hits) for key, hits in found.items()}


def hits_at_k(
    images: Tensor,
    texts: Tensor,
    image_of_text: Tensor,
    ks: Sequence[int] = (1, 5, 10),
    block: tuple[int, int] = (TEXTS, IMAGES),
) -> dict[str, Tensor]:
    """Return the hits that `recall_at_k` averages, one bool per query, (N,) and (M,). Same arguments and errors."""
    _check(images, texts, image_of_text)
    rows = torch.arange(len(images), device=images.device)
    of_image = _Best(images, min(max(ks) + 1, len(texts)))
    of_text = _Best(texts, min(max(ks) + 1, len(images)))
    for some_texts in _parts(len(texts), block[0]):
        for some_images in _parts(len(images), block[1]):
            scores = texts[some_texts] @ images[some_images].T
            of_text.add(some_texts, scores, first=some_images.start)
            of_image.add(some_images, scores.T, first=some_texts.start)
    i2t = {f"i2t_r{k}": _hits(of_image.ranked(k, images, texts), image_of_text, rows) for k in ks}
    t2i = {f"t2i_r{k}": _hits(of_text.ranked(k, texts, images), rows, image_of_text) for k in ks}
    return i2t | t2i


class _Best:
    """The `keep` best candidates of each query, updated block by block: scores and indices, (Q, keep)."""

    def __init__(self, queries: Tensor, keep: int) -> None:
        self.keep = keep
        self.values = torch.full((len(queries), keep), -torch.inf, dtype=queries.dtype, device=queries.device)
        self.indices = torch.zeros((len(queries), keep), dtype=torch.long, device=queries.device)

    def add(self, rows: slice, scores: Tensor, first: int) -> None:
        """Add the scores (q, c) of the queries `rows` with the candidates from index `first` on."""
        new = scores.topk(min(self.keep, scores.shape[1]), dim=1)
        values = torch.cat([self.values[rows], new.values], dim=1)
        indices = torch.cat([self.indices[rows], new.indices + first], dim=1)
        self.values[rows], order = values.topk(self.keep, dim=1)
        self.indices[rows] = indices.gather(1, order)

    def ranked(self, k: int, queries: Tensor, candidates: Tensor) -> Tensor:
        """Return the indices of the k best candidates of each query, (Q, min(k, C))."""
        indices = self.indices[:, :k].clone()
        if k < self.keep:
            # The order of the blocks must not decide between candidates tied at rank k.
            tied = (self.values[:, k - 1] == self.values[:, k]).nonzero().squeeze(1)
            for part in tied.split(TIED):
                indices[part] = (queries[part] @ candidates.T).topk(k, dim=1).indices
        return indices


def _parts(total: int, max_size: int) -> list[slice]:
    """Divide `range(total)` into parts of nearly equal size.

    A last part of a single row would use a matrix-vector kernel, whose rounding differs, and so break ties.
    """
    count = -(-total // max_size)
    edges = [total * part // count for part in range(count + 1)]
    return [slice(start, end) for start, end in itertools.pairwise(edges)]


def _hits(ranked: Tensor, image_of_candidate: Tensor, image_of_query: Tensor) -> Tensor:
    """Return True for each query with a candidate of its own image in `ranked` (Q, k)."""
    return (image_of_candidate[ranked] == image_of_query[:, None]).any(dim=1)


def _share(hits: Tensor) -> float:
    return torch.tensor(hits.sum().item() / len(hits), dtype=torch.float32).item()


def _check(images: Tensor, texts: Tensor, image_of_text: Tensor) -> None:
    if images.ndim != 2 or texts.ndim != 2 or images.shape[1] != texts.shape[1]:
        raise ValueError(f"images {tuple(images.shape)} and texts {tuple(texts.shape)} must be (N, D) and (M, D)")
    if image_of_text.shape != (len(texts),):
        raise ValueError(f"image_of_text {tuple(image_of_text.shape)} must be ({len(texts)},), one image for each text")
    if not (torch.isfinite(images).all() and torch.isfinite(texts).all()):
        raise NotFinite("an embedding contains NaN or infinity")
    if not torch.equal(image_of_text.unique(), torch.arange(len(images), device=image_of_text.device)):
        raise ValueError(f"each of the {len(images)} images needs a text, and each text an image among them")
