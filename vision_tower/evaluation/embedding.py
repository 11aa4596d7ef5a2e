"""Embed a set of images with their captions, with a progress bar.

pairs --image_batches.decoded--> Encoder.embed_images --> images (N, D)
      --captions---------------> Encoder.embed_texts ---> texts  (M, D), owner (M,)
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from tqdm import tqdm

from vision_tower.common.errors import UserError
from vision_tower.data.image_batches import CaptionedImage, SkipCounter, decoded

if TYPE_CHECKING:
    from vision_tower.checkpoints.encoder import Encoder


@dataclass(frozen=True, kw_only=True)
class EmbeddedPairs:
    """Unit-norm fp32 embeddings of N images and M captions; `owner[j]` is the image that caption j describes."""

    images: torch.Tensor  # (N, D)
    texts: torch.Tensor  # (M, D)
    owner: torch.Tensor  # (M,) int64
    names: list[str]  # N, of the images
    captions: list[str]  # M
    digests: list[str] = field(default_factory=list)  # N, SHA-256 of the encoded images; empty if unknown


def embed_pairs(
    encoder: Encoder,
    pairs: Iterable[CaptionedImage],
    batch_size: int,
    skips: SkipCounter,
    *,
    total: int | None,
    progress: bool = True,
) -> EmbeddedPairs:
    """Embed every readable image and its captions.

    Args:
        batch_size: images, or captions, at a time.
        skips: counts unreadable images.
        total: number of pairs for the progress bar; None if unknown.
    Raises:
        UserError: too many unreadable images, or no readable one.
    """
    images: list[torch.Tensor] = []
    names: list[str] = []
    captions: list[str] = []
    owner: list[int] = []
    digests: list[str] = []
    with tqdm(total=total, desc="images", unit="image", disable=not progress) as bar:
        for batch, decoded_images in decoded(pairs, batch_size, skips, digests):
            if decoded_images:
                images.append(encoder.embed_images(decoded_images))
            for pair in batch:
                captions += pair.texts
                owner += [len(names)] * len(pair.texts)
                names.append(pair.name)
            bar.update(skips.seen - bar.n)
    if not images:
        raise UserError("no readable image", file=skips.source, remedy="check the data")
    texts = embed_captions(encoder, captions, batch_size, progress=progress)
    return EmbeddedPairs(
        images=torch.cat(images),
        texts=texts,
        owner=torch.tensor(owner),
        names=names,
        captions=captions,
        digests=digests,
    )


def embed_captions(encoder: Encoder, captions: list[str], batch_size: int, *, progress: bool = True) -> torch.Tensor:
    """Return embeddings (M, D) of M captions; M is at least 1."""
    texts = []
    with tqdm(total=len(captions), desc="texts", unit="text", disable=not progress) as bar:
        for start in range(0, len(captions), batch_size):
            batch = captions[start : start + batch_size]
            texts.append(encoder.embed_texts(batch))
            bar.update(len(batch))
    return torch.cat(texts)
