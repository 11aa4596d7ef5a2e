"""Loss terms as pure fp32 functions (CLIPS: arXiv 2411.16828, equation 6).

    total = sum of weight * term;   terms: InfoNCE(image, stream) for each text stream, and the caption's cross entropy

Shapes: b = pairs on this rank, B = pairs on all ranks, d = embedding width, n = target tokens, v = vocabulary.
Every function returns the contribution of one micro-batch of one rank. The *mean* over ranks and micro-batches is the
loss of the global batch, as data parallelism with accumulation averages gradients.
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

LOGITS_CHUNK = 2**24  # maximum similarities or logits in memory at once: 64 MB in fp32


@dataclasses.dataclass(frozen=True)
class Losses:
    """Total loss to differentiate, and detached values to log."""

    total: torch.Tensor
    report: dict[str, torch.Tensor]


def weighted_losses(terms: Mapping[str, torch.Tensor], scale: torch.Tensor, weights: Mapping[str, float]) -> Losses:
    """Return the weighted sum of the terms; report each term as `loss_NAME`, and the temperature."""
    total = torch.stack([weight * terms[name] for name, weight in weights.items()]).sum()
    report = {f"loss_{name}": terms[name] for name in weights} | {"temperature": 1 / scale}
    return Losses(total, {name: value.detach().float() for name, value in report.items()})


def contrastive_terms(
    image: torch.Tensor, texts: Mapping[str, torch.Tensor], scale: torch.Tensor, weights: Mapping[str, float]
) -> dict[str, torch.Tensor]:
    """Return InfoNCE of the images with every text stream that has a weight."""
    return {stream: info_nce(image, texts[stream], scale) for stream in weights if stream != CAPTION}


def info_nce(image: torch.Tensor, text: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Return the symmetric InfoNCE of this rank's unit-norm pairs (b, d) against texts and images of all ranks.

    Neither the (B, B) similarities nor, if they are large, this rank's (b, B) rows are in memory at once.
    """
    image, text = image.float(), text.float()
    scale = scale.float()
    return (_retrieval_loss(image, gather(text), scale) + _retrieval_loss(text, gather(image), scale)) / 2


def _retrieval_loss(queries: torch.Tensor, candidates: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Return the mean cross entropy of matching each query (b, d) to its pair among all candidates (B, d).

    Large problems are split into blocks of rows with recomputed scores, so memory does not grow with b * B.
    """
    start = rank() * len(queries)
    labels = torch.arange(start, start + len(queries), device=queries.device)
    rows = max(LOGITS_CHUNK // len(candidates), 1)
    if rows >= len(queries):
        return F.cross_entropy(scale * queries @ candidates.T, labels)

    def block_loss(block: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(scale * block @ candidates.T, targets, reduction="sum")

    blocks = zip(queries.split(rows), labels.split(rows), strict=True)
    sums = [checkpoint(block_loss, block, targets, use_reentrant=False) for block, targets in blocks]
    return torch.stack(sums).sum() / len(queries)


def caption_term(summed: torch.Tensor, labels: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return the captioner's loss: summed cross entropy / mean target count, so that the mean is sum / global count.

    Args:
        summed: summed cross entropy of one micro-batch.
        labels: labels of all micro-batches of the step on this rank.
    """
    count = torch.stack([(part != IGNORED).sum() for part in labels]).sum().to(summed.device)
    if world() > 1:
        dist.all_reduce(count)
    return summed * (len(labels) * world()) / count.clamp(min=1)


def summed_cross_entropy(
    hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, backward: torch.dtype = torch.float32
) -> torch.Tensor:
    """Return the summed cross entropy of `hidden @ weight.T`, (n, w) x (v, w), without holding all (n, v) logits.

    Args:
        hidden: states (n, w).
        weight: vocabulary layer (v, w).
        labels: target ids (n,).
        backward: precision of the matrix products of the gradients; the loss has the precision of the inputs.
    """
    total: torch.Tensor = _SummedCrossEntropy.apply(hidden, weight, labels, backward)
    return total


class _SummedCrossEntropy(torch.autograd.Function):
    """Computes the gradients in the forward pass, block by block, while the logits of a block exist."""

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
            logits = hidden[part] @ weight.T
            targets = labels[part, None]
            norm = logits.logsumexp(dim=1, keepdim=True)
            total += (norm - logits.gather(1, targets)).sum()
            if to_hidden is None and to_weight is None:
                continue
            grad = logits.sub_(norm).exp_()  # gradient of the logits: softmax - one_hot(label), in place
            grad.scatter_add_(1, targets, grad.new_full(targets.shape, -1.0))
            grad = grad.to(backward)
            if to_hidden is not None:
                to_hidden[part] = grad @ low_weight
            if to_weight is None:
                continue
            if grad.dtype == to_weight.dtype:
                to_weight.addmm_(grad.T, low_hidden[part])
            else:
                to_weight += grad.T @ low_hidden[part]  # addmm_ needs equal types
        ctx.save_for_backward(*(value for value in (to_hidden, to_weight) if value is not None))
        return total

    @staticmethod
    def backward(ctx: Any, upstream: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None, None, None]:  # type: ignore[override]
        saved = iter(ctx.saved_tensors)
        to_hidden, to_weight = (next(saved) * upstream if needed else None for needed in ctx.needs_input_grad[:2])
        return to_hidden, to_weight, None, None


def gather(rows: torch.Tensor) -> torch.Tensor:
    """Concatenate (b, d) of all ranks to (B, d) in rank order; gradients flow to all ranks."""
    if world() == 1:
        return rows
    from torch.distributed.nn.functional import all_gather

    return torch.cat(all_gather(rows.contiguous()))
