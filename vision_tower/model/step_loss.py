"""Loss of an optimizer step, for one batch or several micro-batches.

    one batch        forward -> terms -> total
    micro-batches    `gradient_cache.first_pass` over all -> for each: forward -> its part of the total

The captioner needs no cache: its loss is a sum over pairs, divided by the number of targets of the full step.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from vision_tower.model.gradient_cache import EmbeddingGrads, first_pass
from vision_tower.model.losses import Losses, caption_term, contrastive_terms, weighted_losses
from vision_tower.model.modeling import ClipsOutput
from vision_tower.text.objectives import CAPTION


class StepLoss:
    """Losses of micro-batches. Their mean over micro-batches and ranks is the loss of the global batch.

    Args:
        weights: weights of the loss terms.
    """

    def __init__(self, weights: Mapping[str, float]) -> None:
        self.weights = weights
        self.contrastive = any(name != CAPTION for name in weights)
        self._batches: Sequence[Mapping[str, Any]] = ()
        self._grads: EmbeddingGrads | None = None
        self._number = 0

    def start(self, batches: Sequence[Mapping[str, Any]]) -> None:
        """Set the micro-batches of a step, in the order of the following calls."""
        self._batches = batches
        self._grads, self._number = None, 0

    def __call__(
        self,
        model: Callable[..., ClipsOutput],
        inputs: Mapping[str, Any],
        to_device: Callable[[dict[str, Any]], dict[str, Any]],
    ) -> Losses:
        """Return the losses of the next micro-batch.

        Args:
            model: the model, possibly wrapped for data parallelism.
            inputs: the micro-batch, on the device.
            to_device: moves a micro-batch to the device, for the pass without graph.
        """
        if self.contrastive and len(self._batches) > 1 and self._grads is None:
            towers = (to_device(_without(batch, "keys", "labels")) for batch in self._batches)
            self._grads = first_pass(model, towers, self.weights)
        out = model(**_without(inputs, "keys"))
        cached = self._grads.terms if self._grads else None
        terms = cached or contrastive_terms(out.image, out.texts, out.scale, self.weights)
        if out.caption_sum is not None:
            terms = terms | {CAPTION: caption_term(out.caption_sum, [batch["labels"] for batch in self._batches])}
        losses = weighted_losses(terms, out.scale, self.weights)
        if self._grads is None:
            return losses
        self._number += 1
        return Losses(losses.total + self._grads.surrogate_loss(self._number - 1, out), losses.report)


def _without(batch: Mapping[str, Any], *names: str) -> dict[str, Any]:
    return {name: value for name, value in batch.items() if name not in names}
