"""Recall@k between images and texts, without ever holding the whole similarity matrix.

    images (N, D) --chunk of rows--> scores (chunk, M) --> rank of the best own text  --> i2t_r1, i2t_r5, i2t_r10
    texts  (M, D) --chunk of rows--> scores (chunk, N) --> rank of the own image      --> t2i_r1, t2i_r5, t2i_r10

Shapes: N images, M texts, D embedding width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


def recall_at_k(
    images: Tensor,
    texts: Tensor,
    image_of_text: Tensor,
    ks: Sequence[int] = (1, 5, 10),
    chunk: int = 1024,
) -> dict[str, float]:
    """Recall@k in both directions, as fractions of the queries.

    Image to text: an image counts if *any* of its texts is among its k best texts (the usual protocol for COCO and
    Flickr30K with five captions an image). Text to image: a text counts if its image is among its k best images.

    Ties go to the lower index, as in a stable descending sort. So an encoder that has collapsed to a single point
    scores chance instead of 1. Where no tie lies across place k this equals a `topk` over the full matrix.

    Args:
        images: (N, D), unit norm if the score is to be the cosine.
        texts: (M, D).
        image_of_text: (M,) integer, the row of `images` each text belongs to.
        chunk: queries at a time; the extra memory is `chunk * max(N, M)` scores, linear in the data.
    Returns:
        `{"i2t_r1": ..., "t2i_r1": ...}`, one pair of keys for each k.
    Raises:
        ValueError: shapes that do not fit, an image without a text, or an embedding that is not finite.
    """
    import torch

    _check(images, texts, image_of_text)
    rows = torch.arange(len(images), device=images.device)
    i2t = torch.cat([
        _best_rank(images[part] @ texts.T, image_of_text[None, :] == part[:, None]) for part in rows.split(chunk)
    ])  # fmt: skip
    t2i = torch.cat([
        _best_rank(texts[part] @ images.T, image_of_text[part][:, None] == rows[None, :])
        for part in torch.arange(len(texts), device=texts.device).split(chunk)
    ])  # fmt: skip
    ranks = {"i2t": i2t, "t2i": t2i}
    return {f"{way}_r{k}": (rank < k).double().mean().item() for way, rank in ranks.items() for k in ks}


def _best_rank(scores: Tensor, own: Tensor) -> Tensor:
    """Place (from 0) of each row's best own column: how many columns score better, or equal at a lower index.

    Args:
        scores: (rows, columns).
        own: (rows, columns) boolean, at least one true in a row.
    Returns:
        (rows,) int64.
    """
    import torch

    # The own score is taken from the same matrix product: a product of other shape may differ in the last bit.
    best, place = scores.masked_fill(~own, -torch.inf).max(dim=1, keepdim=True)  # of equals the first
    columns = torch.arange(scores.shape[1], device=scores.device)
    return ((scores > best) | ((scores == best) & (columns < place))).sum(dim=1)


def _check(images: Tensor, texts: Tensor, image_of_text: Tensor) -> None:
    import torch

    if images.ndim != 2 or texts.ndim != 2 or images.shape[1] != texts.shape[1]:
        raise ValueError(f"images {tuple(images.shape)} and texts {tuple(texts.shape)} must be (N, D) and (M, D)")
    if image_of_text.shape != (len(texts),):
        raise ValueError(f"image_of_text {tuple(image_of_text.shape)} must be ({len(texts)},), one image for each text")
    # NaN compares false with everything, so it would rank first everywhere and look like a perfect score.
    if not (torch.isfinite(images).all() and torch.isfinite(texts).all()):
        raise ValueError("an embedding holds NaN or infinity")
    if not torch.equal(image_of_text.unique(), torch.arange(len(images), device=image_of_text.device)):
        raise ValueError(f"each of the {len(images)} images needs a text, and each text an image among them")
