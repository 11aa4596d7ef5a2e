"""The CLIPS objective as pure fp32 functions (arXiv 2411.16828, equation 6).

    total = contrastive * (InfoNCE(image, web) + InfoNCE(image, sub)) / 2  +  caption * CE(full synthetic caption)

Shapes: b = pairs on this rank, B = pairs on all ranks, d = embedding width, q = queries, v = vocabulary.
Every function returns what this rank adds; the *mean over ranks* is the loss of the global batch, which is what
data-parallel training differentiates.
"""

from __future__ import annotations

import dataclasses

import torch
import torch.distributed as dist
import torch.nn.functional as F

from vision_tower.pretrain_recipe import LossWeights
from vision_tower.tokenizer import IGNORED


@dataclasses.dataclass(frozen=True)
class Losses:
    """What is differentiated, and what is only reported (detached)."""

    total: torch.Tensor
    report: dict[str, torch.Tensor]


def clips_losses(
    *,
    image: torch.Tensor,
    web: torch.Tensor,
    sub: torch.Tensor,
    scale: torch.Tensor,
    caption_logits: torch.Tensor,
    caption_labels: torch.Tensor,
    weights: LossWeights,
) -> Losses:
    """The CLIPS loss of one step from unit-norm embeddings (b, d), logits (b, q, v) and labels (b, q)."""
    loss_web = info_nce(image, web, scale)
    loss_sub = info_nce(image, sub, scale)
    loss_caption = caption_cross_entropy(caption_logits, caption_labels)
    total = weights.contrastive * (loss_web + loss_sub) / 2 + weights.caption * loss_caption
    report = {"loss_web": loss_web, "loss_sub": loss_sub, "loss_caption": loss_caption, "temperature": 1 / scale}
    return Losses(total, {name: value.detach().float() for name, value in report.items()})


def info_nce(image: torch.Tensor, text: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Symmetric InfoNCE of this rank's pairs against the texts and images of all ranks.

    Only the (b, B) rows of this rank are ever held, never the (B, B) matrix.
    """
    image, text = image.float(), text.float()
    start = _rank() * len(image)
    labels = torch.arange(start, start + len(image), device=image.device)
    to_text = F.cross_entropy(scale.float() * image @ gather(text).T, labels)
    to_image = F.cross_entropy(scale.float() * text @ gather(image).T, labels)
    return (to_text + to_image) / 2


def caption_cross_entropy(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Sum over this rank's target tokens / the mean count per rank, so that ranks' mean = sum / global count."""
    summed = F.cross_entropy(logits.float().flatten(0, 1), labels.flatten(), ignore_index=IGNORED, reduction="sum")
    count = (labels != IGNORED).sum()
    if _world() > 1:
        dist.all_reduce(count)
    return summed * _world() / count.clamp(min=1)


def gather(rows: torch.Tensor) -> torch.Tensor:
    """(b, d) of every rank -> (B, d) in rank order, with gradients to all of them."""
    if _world() == 1:
        return rows
    from torch.distributed.nn.functional import all_gather

    return torch.cat(all_gather(rows.contiguous()))


def _world() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def _rank() -> int:
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0
