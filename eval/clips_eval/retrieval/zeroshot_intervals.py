"""How far zero-shot accuracies can be trusted.

Apart from the command for the same reason as `retrieval_scores`: `--help` must not import torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from clips_eval.stats.uncertainty import Scores, interval

if TYPE_CHECKING:
    from vision_tower.evaluation.zeroshot import ZeroShotScores


def intervals(scores: ZeroShotScores) -> dict[str, dict[str, Any]]:
    """95 % intervals of the scores that are known, by the same keys; every image is a cluster of its own.

    The mean per class is a sum over classes of right / n, each divided by the number C of classes with images.
    """
    known = sum(n > 0 for n in scores.images_per_class)
    parts = {"top1": _of(scores.first), "mean_per_class": _of(scores.first, known, scores.labels)}
    if scores.top5 is not None:
        parts["top5"] = _of(scores.near)
    return {key: asdict(interval(part)) for key, part in parts.items()}


def _of(hits: Sequence[bool], classes: int = 1, labels: Sequence[int] | None = None) -> Scores:
    return Scores(
        numerators=[hit / classes for hit in hits],
        denominators=[1.0] * len(hits),
        clusters=[str(place) for place in range(len(hits))],
        strata=None if labels is None else [str(label) for label in labels],
    )
