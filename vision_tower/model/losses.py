"""The terms of the objectives as pure fp32 functions (CLIPS: arXiv 2411.16828, equation 6).

    total = sum over terms of weight * term;   terms: InfoNCE(image, stream) for each text stream, and the caption's CE

Shapes: b = pairs on this rank, B = pairs on all ranks, d = embedding width, n = target tokens, v = vocabulary.
Every function returns what this rank, or one micro-batch of it, adds; the *mean* over ranks and micro-batches is the
loss of the global batch, which is what data-parallel training with accumulation differentiates.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from vision_tower.common.ranks import rank, world
from vision_tower.text.objectives import CAPTION
from vision_tower.text.tokenizer import IGNORED

LOGITS_CHUNK = 2**24  # 64 MB in fp32: similarities, or logits, that are held together


@dataclasses.dataclass(frozen=True)
class Losses:
    """What is differentiated, and what is only reported (detached)."""

    total: torch.Tensor
    report: dict[str, torch.Tensor]


def weighted_losses(terms: Mapping[str, torch.Tensor], scale: torch.Tensor, weights: Mapping[str, float]) -> Losses:
    """The weighted sum of the terms, and each of them as `loss_...` for the log."""
    total = torch.stack([weight * terms[name] for name, weight in weights.items()]).sum()
    report = {f"loss_{name}": terms[name] for name in weights} | {"temperature": 1 / scale}
    return Losses(total, {name: value.detach().float() for name, value in report.items()})


def contrastive_terms(
    image: torch.Tensor, texts: Mapping[str, torch.Tensor], scale: torch.Tensor, weights: Mapping[str, float]
) -> dict[str, torch.Tensor]:
    """InfoNCE of the images with every text stream that has a weight."""
    return {stream: info_nce(image, texts[stream], scale) for stream in weights if stream != CAPTION}


def info_nce(image: torch.Tensor, text: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Symmetric InfoNCE of this rank's unit-norm pairs (b, d) against the texts and images of all ranks.

    The (B, B) matrix is never held, nor this rank's (b, B) rows of it where those are many: see `_own_among`.
    """
    image, text = image.float(), text.float()
    scale = scale.float()
    return (_own_among(image, gather(text), scale) + _own_among(text, gather(image), scale)) / 2


def _own_among(queries: torch.Tensor, candidates: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Mean cross entropy of each query (b, d) finding its own among all candidates (B, d).

    In blocks of rows whose scores are computed again in the backward pass, so that memory does not grow with b * B.
    """
    start = rank() * len(queries)
    labels = torch.arange(start, start + len(queries), device=queries.device)
    rows = max(LOGITS_CHUNK // len(candidates), 1)
    if rows >= len(queries):
        return F.cross_entropy(scale * queries @ candidates.T, labels)

    def block(some: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(scale * some @ candidates.T, targets, reduction="sum")

    parts = zip(queries.split(rows), labels.split(rows), strict=True)
    sums = [checkpoint(block, some, targets, use_reentrant=False) for some, targets in parts]
    return torch.stack(sums).sum() / len(queries)


def caption_term(summed: torch.Tensor, labels: Sequence[torch.Tensor]) -> torch.Tensor:
    """The captioner's loss: a sum over target tokens / the mean number of them, so that the mean is sum / global count.

    Args:
        summed: the sum over one micro-batch's targets.
        labels: of all micro-batches of the step on this rank.
    """
    count = torch.stack([(part != IGNORED).sum() for part in labels]).sum().to(summed.device)
    if world() > 1:
        dist.all_reduce(count)
    return summed * (len(labels) * world()) / count.clamp(min=1)


def summed_cross_entropy(
    hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, backward: torch.dtype = torch.float32
) -> torch.Tensor:
    """Sum of cross entropies of `hidden @ weight.T`, (n, w) x (v, w), without ever holding the (n, v) logits.

    Args:
        backward: precision of the two products that make the gradients; the loss is computed in that of the inputs.
    """
    total: torch.Tensor = _SummedCrossEntropy.apply(hidden, weight, labels, backward)
    return total


class _SummedCrossEntropy(torch.autograd.Function):
    """Gradients are computed block by block in the forward pass, while a block's logits are there."""

    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, backward: torch.dtype
    ) -> torch.Tensor:
        total = hidden.new_zeros(())
        to_hidden = torch.empty_like(hidden) if ctx.needs_input_grad[0] else None
        to_weight = torch.zeros_like(weight) if ctx.needs_input_grad[1] else None
        low_hidden, low_weight = hidden.to(backward), weight.to(backward)
        rows = max(LOGITS_CHUNK // len(weight), 1)
        for start in range(0, len(hidden), rows):
            part = slice(start, start + rows)
            scores = hidden[part] @ weight.T
            place = labels[part, None]
            norm = scores.logsumexp(dim=1, keepdim=True)
            total += (norm - scores.gather(1, place)).sum()
            if to_hidden is None and to_weight is None:
                continue
            slope = scores.sub_(norm).exp_()  # softmax, then minus one at the label
            slope.scatter_add_(1, place, slope.new_full(place.shape, -1.0))
            slope = slope.to(backward)
            if to_hidden is not None:
                to_hidden[part] = slope @ low_weight
            if to_weight is None:
                continue
            if slope.dtype == to_weight.dtype:
                to_weight.addmm_(slope.T, low_hidden[part])
            else:
                to_weight += slope.T @ low_hidden[part]
        ctx.save_for_backward(*(value for value in (to_hidden, to_weight) if value is not None))
        return total

    @staticmethod
    def backward(ctx: Any, upstream: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None, None, None]:  # type: ignore[override]
        saved = iter(ctx.saved_tensors)
        to_hidden, to_weight = (next(saved) * upstream if needed else None for needed in ctx.needs_input_grad[:2])
        return to_hidden, to_weight, None, None


def gather(rows: torch.Tensor) -> torch.Tensor:
    """(b, d) of every rank -> (B, d) in rank order, with gradients to all of them."""
    if world() == 1:
        return rows
    from torch.distributed.nn.functional import all_gather

    return torch.cat(all_gather(rows.contiguous()))
