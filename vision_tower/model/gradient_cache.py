"""Contrastive-safe accumulation: the gradients of one big batch from many small ones (GradCache, arXiv 2101.06983).

    pass 1, no graph    micro-batch -> towers -> embeddings                     one micro-batch at a time, no captioner
    in between          all embeddings -> InfoNCE of the whole step -> grads   d loss / d embeddings
    pass 2, with graph  micro-batch -> towers -> <embeddings, their grads>     and the captioner's loss

What stays between the passes is embeddings, (pairs, d) numbers, so that the memory of activations is that of one
micro-batch. The towers have no dropout: both passes compute the same embeddings.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch

from vision_tower.model.losses import contrastive_terms
from vision_tower.model.modeling import ClipsOutput


@dataclasses.dataclass(frozen=True, kw_only=True)
class Slopes:
    """The contrastive terms of a step, and their gradients with respect to what the towers gave.

    Args:
        terms: InfoNCE of every stream over the global batch, detached.
        image: gradients of the image embeddings, one (b, d) for each micro-batch.
        texts: the same of the text embeddings, by stream.
        scale: gradient of the logit scale.
    """

    terms: dict[str, torch.Tensor]
    image: tuple[torch.Tensor, ...]
    texts: dict[str, tuple[torch.Tensor, ...]]
    scale: torch.Tensor

    def linear(self, number: int, out: ClipsOutput) -> torch.Tensor:
        """A zero whose gradient is that of the contrastive loss, for micro-batch `number`.

        As every term here, it is to be averaged over micro-batches (see `vision_tower.model.losses`).
        """
        parts = [(out.image * self.image[number]).sum()]
        parts += [(out.texts[stream] * grads[number]).sum() for stream, grads in self.texts.items()]
        product = torch.stack(parts).sum() * len(self.image) + out.scale * self.scale
        return product - product.detach()


def first_pass(
    model: Callable[..., ClipsOutput], batches: Iterable[Mapping[str, Any]], weights: Mapping[str, float]
) -> Slopes:
    """Embed all micro-batches of a step without a graph, and differentiate the contrastive loss of all of them.

    Args:
        model: the model as it trains, wrapped for data parallelism or not.
        batches: its inputs, without labels. They may be moved to the device one by one.
        weights: of the loss terms.
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
    return Slopes(
        terms={stream: term.detach() for stream, term in terms.items()},
        image=_slope(image).split(sizes),
        texts={stream: _slope(value).split(sizes) for stream, value in texts.items()},
        scale=_slope(scale),
    )


def _slope(leaf: torch.Tensor) -> torch.Tensor:
    assert leaf.grad is not None
    return leaf.grad
