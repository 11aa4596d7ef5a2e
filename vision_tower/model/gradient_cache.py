"""Gradient accumulation with the contrastive loss of the full batch (GradCache, arXiv 2101.06983).

    pass 1, no graph    micro-batch -> towers -> embeddings                    for each micro-batch, no captioner
    between             all embeddings -> InfoNCE of the full step -> grads    d loss / d embeddings
    pass 2, with graph  micro-batch -> towers -> <embeddings, grads>           plus the captioner's loss

Only embeddings (pairs, d) are kept between the passes, so activation memory is that of one micro-batch. The towers have
no dropout, so both passes compute the same embeddings.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch

from vision_tower.model.losses import contrastive_terms
from vision_tower.model.modeling import ClipsOutput


@dataclasses.dataclass(frozen=True, kw_only=True)
class EmbeddingGrads:
    """Contrastive terms of a step and their gradients with respect to the tower outputs.

    Args:
        terms: InfoNCE of every stream over the global batch, detached.
        image: gradients of the image embeddings, one (b, d) per micro-batch.
        texts: gradients of the text embeddings, by stream.
        scale: gradient of the logit scale.
    """

    terms: dict[str, torch.Tensor]
    image: tuple[torch.Tensor, ...]
    texts: dict[str, tuple[torch.Tensor, ...]]
    scale: torch.Tensor

    def surrogate_loss(self, number: int, out: ClipsOutput) -> torch.Tensor:
        """Return a zero with the gradient of the contrastive loss for micro-batch `number`.

        Like every term, it is averaged over micro-batches (see `vision_tower.model.losses`).
        """
        parts = [(out.image * self.image[number]).sum()]
        parts += [(out.texts[stream] * grads[number]).sum() for stream, grads in self.texts.items()]
        product = torch.stack(parts).sum() * len(self.image) + out.scale * self.scale
        return product - product.detach()


def first_pass(
    model: Callable[..., ClipsOutput], batches: Iterable[Mapping[str, Any]], weights: Mapping[str, float]
) -> EmbeddingGrads:
    """Embed all micro-batches of a step without a graph and differentiate their joint contrastive loss.

    Args:
        model: the model, possibly wrapped for data parallelism.
        batches: inputs without labels; an iterator can move them to the device one at a time.
        weights: weights of the loss terms.
    """
    with torch.no_grad():
        outs = [model(**batch) for batch in batches]
    image = torch.cat([out.image for out in outs]).requires_grad_()
    streams = [stream for stream in outs[0].texts if stream in weights]
    texts = {stream: torch.cat([out.texts[stream] for out in outs]).requires_grad_() for stream in streams}
    scale = outs[0].scale.clone().requires_grad_()
    with torch.enable_grad():
        terms = contrastive_terms(image, texts, scale, weights)
        total = torch.stack([weights[stream] * term for stream, term in terms.items()]).sum()
    total.backward()
    sizes = [len(out.image) for out in outs]
    return EmbeddingGrads(
        terms={stream: term.detach() for stream, term in terms.items()},
        image=_grad(image).split(sizes),
        texts={stream: _grad(value).split(sizes) for stream, value in texts.items()},
        scale=_grad(scale),
    )


def _grad(leaf: torch.Tensor) -> torch.Tensor:
    assert leaf.grad is not None
    return leaf.grad
