"""Zero-shot classification: a class is the mean of its prompts' embeddings, an image gets the nearest class.

    "a photo of a {}." x "dog" --Encoder--> prompts (T, D) --mean, unit norm--> classifier (C, D)
    ROOT/dog/1.jpg ...         --Encoder--> images (N, D) @ classifier.T -----> the five best classes (N, 5)

Shapes: N images, C classes, T templates, D embedding width. As in open_clip and CLIP_benchmark.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from tqdm import tqdm

from vision_tower.common.errors import NotFinite, UserError
from vision_tower.data.image_batches import SkipCounter, decoded
from vision_tower.data.image_folder import ZeroShotTask

if TYPE_CHECKING:
    from vision_tower.checkpoints.encoder import Encoder


@dataclass(frozen=True, kw_only=True)
class ZeroShotScores:
    """Fractions of the readable images; `top5` is None below five classes, a class without images likewise.

    `labels`, `first` and `near` are of each image: its class, whether that is the best, whether it is of the five.
    """

    top1: float
    top5: float | None
    mean_per_class: float
    per_class: list[float | None]
    images_per_class: list[int]
    labels: list[int]
    first: list[bool]
    near: list[bool]


def classify(
    encoder: Encoder, task: ZeroShotTask, batch_size: int, skips: SkipCounter, *, progress: bool = True
) -> ZeroShotScores:
    """Embed the prompts and the images of a task, and score.

    Raises:
        UserError: too many unreadable images, or none at all.
        NotFinite: an embedding is not finite.
    """
    classifier = class_embeddings(encoder, task.names, task.templates, batch_size, progress=progress)
    best, labels = [], []
    with tqdm(total=len(task.images), desc="images", unit="image", disable=not progress) as bar:
        for batch, images in decoded(task.images, batch_size, skips):
            if images:
                best.append(best_classes(encoder.embed_images(images), classifier))
            labels += [image.label for image in batch]
            bar.update(skips.seen - bar.n)
    if not best:
        raise UserError("no readable image to measure on", file=skips.source, remedy="check the data")
    return accuracies(torch.cat(best), torch.tensor(labels), len(task.names))


def class_embeddings(
    encoder: Encoder, names: list[str], templates: list[str], batch_size: int, *, progress: bool = True
) -> torch.Tensor:
    """The classifier, (C, D): unit-norm mean of the unit-norm embeddings of a class's prompts."""
    rows = []
    group = max(1, batch_size // len(templates))  # classes at a time, so that a batch is full with one template too
    with tqdm(total=len(names), desc="classes", unit="class", disable=not progress) as bar:
        for start in range(0, len(names), group):
            some = names[start : start + group]
            prompts = [fill(template, name) for name in some for template in templates]
            embedded = torch.cat([encoder.embed_texts(batch) for batch in _batches(prompts, batch_size)])
            rows.append(F.normalize(embedded.view(len(some), len(templates), -1).mean(dim=1), dim=-1))
            bar.update(len(some))
    return torch.cat(rows)


def fill(template: str, name: str) -> str:
    """The prompt; other braces than `{}` are left as they are."""
    return template.replace("{}", name)


def best_classes(images: torch.Tensor, classifier: torch.Tensor) -> torch.Tensor:
    """The five nearest classes, best first, (N, min(5, C)). Raises NotFinite."""
    scores = images @ classifier.T
    if not torch.isfinite(scores).all():
        raise NotFinite("an embedding holds NaN or infinity")
    return scores.topk(min(5, len(classifier)), dim=1).indices


def accuracies(best: torch.Tensor, labels: torch.Tensor, classes: int) -> ZeroShotScores:
    """Scores of the best classes (N, k) of N images with these labels (N,)."""
    hits = best == labels[:, None]
    counts = torch.bincount(labels, minlength=classes)
    right = torch.bincount(labels[hits[:, 0]], minlength=classes)
    per_class = [good / n if n else None for good, n in zip(right.tolist(), counts.tolist(), strict=True)]
    known = [share for share in per_class if share is not None]
    return ZeroShotScores(
        top1=hits[:, 0].sum().item() / len(labels),
        top5=hits.any(dim=1).sum().item() / len(labels) if classes >= 5 else None,
        mean_per_class=sum(known) / len(known),
        per_class=per_class,
        images_per_class=counts.tolist(),
        labels=labels.tolist(),
        first=hits[:, 0].tolist(),
        near=hits.any(dim=1).tolist(),
    )


def _batches(prompts: list[str], size: int) -> Iterator[list[str]]:
    for start in range(0, len(prompts), size):
        yield prompts[start : start + size]
