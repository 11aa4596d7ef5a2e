"""Zero-shot classification: a class embedding is the mean over its prompts; an image gets the nearest class.

    "a photo of a {}." x "dog" --Encoder--> prompts (T, D) --mean, unit norm--> classifier (C, D)
    ROOT/dog/1.jpg ...         --Encoder--> images (N, D) @ classifier.T -----> five best classes (N, 5)

Shapes: N images, C classes, T templates, D embedding width. As in open_clip and CLIP_benchmark.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from tqdm import tqdm

from vision_tower.common.errors import NotFinite, UserError
from vision_tower.data.image_batches import SkipCounter, decoded
from vision_tower.data.image_folder import ZeroShotTask
from vision_tower.evaluation.embedding import embed_captions

if TYPE_CHECKING:
    from vision_tower.checkpoints.encoder import Encoder


@dataclass(frozen=True, kw_only=True)
class ZeroShotScores:
    """Accuracies as fractions of the readable images.

    Attributes:
        top5: None if there are fewer than five classes.
        per_class: None for a class without images.
        labels: class of each image.
        first: for each image, True if its class ranks first.
        near: for each image, True if its class is among the best five.
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
    """Embed the prompts and images of a task, and return its scores.

    Raises:
        UserError: too many unreadable images, or no readable one.
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
        raise UserError("no readable image", file=skips.source, remedy="check the data")
    return accuracies(torch.cat(best), torch.tensor(labels), len(task.names))


def class_embeddings(
    encoder: Encoder, names: list[str], templates: list[str], batch_size: int, *, progress: bool = True
) -> torch.Tensor:
    """Return the classifier, (C, D): for each class the normalized mean of its prompts' unit-norm embeddings."""
    rows = []
    group = max(1, batch_size // len(templates))  # classes at a time, so that their prompts fill a batch
    with tqdm(total=len(names), desc="classes", unit="class", disable=not progress) as bar:
        for start in range(0, len(names), group):
            classes = names[start : start + group]
            # Not str.format: a template may contain other braces.
            prompts = [template.replace("{}", name) for name in classes for template in templates]
            embedded = embed_captions(encoder, prompts, batch_size, progress=False)
            rows.append(F.normalize(embedded.view(len(classes), len(templates), -1).mean(dim=1), dim=-1))
            bar.update(len(classes))
    return torch.cat(rows)


def best_classes(images: torch.Tensor, classifier: torch.Tensor) -> torch.Tensor:
    """Return the five nearest classes, best first, (N, min(5, C)). Raises NotFinite for NaN or infinity."""
    scores = images @ classifier.T
    if not torch.isfinite(scores).all():
        raise NotFinite("an embedding contains NaN or infinity")
    return scores.topk(min(5, len(classifier)), dim=1).indices


def accuracies(best: torch.Tensor, labels: torch.Tensor, classes: int) -> ZeroShotScores:
    """Compute the scores from the best classes (N, k) and the labels (N,) of N images."""
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
