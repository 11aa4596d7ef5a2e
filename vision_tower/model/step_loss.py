"""The loss of an optimiser step, in one piece or over micro-batches.

    one batch        forward -> terms -> total
    micro-batches    `gradient_cache.first_pass` over all -> for each: forward -> its part of the total

The captioner needs no cache, for its loss is a sum over pairs; it only needs the count of targets of the whole step.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from vision_tower.model.gradient_cache import Slopes, first_pass
from vision_tower.model.losses import Losses, caption_term, contrastive_terms, weighted_losses
from vision_tower.model.modeling import ClipsOutput
from vision_tower.text.objectives import CAPTION


class StepLoss:
    """Losses of micro-batches, whose mean over them and over ranks is the loss of the global batch.

    Args:
        weights: of the loss terms.
    """

    def __init__(self, weights: Mapping[str, float]) -> None:
        self.weights = weights
        self.contrastive = any(name != CAPTION for name in weights)
        self._batches: Sequence[Mapping[str, Any]] = ()
        self._slopes: Slopes | None = None
        self._number = 0

    def start(self, batches: Sequence[Mapping[str, Any]]) -> None:
        """Take the micro-batches of a step; they are to be called for in this order."""
        self._batches = batches
        self._slopes, self._number = None, 0

    def __call__(
        self,
        model: Callable[..., ClipsOutput],
        inputs: Mapping[str, Any],
        to_device: Callable[[dict[str, Any]], dict[str, Any]],
    ) -> Losses:
        """The next micro-batch.

        Args:
            model: as it trains, wrapped for data parallelism or not.
            inputs: the micro-batch, on the device.
            to_device: moves another one there, for the pass without graph.
        """
        if self.contrastive and len(self._batches) > 1 and self._slopes is None:
            towers = (to_device(_without(batch, "keys", "labels")) for batch in self._batches)
            self._slopes = first_pass(model, towers, self.weights)
        out = model(**_without(inputs, "keys"))
        found = self._slopes.terms if self._slopes else None
        terms = found or contrastive_terms(out.image, out.texts, out.scale, self.weights)
        if out.caption_sum is not None:
            terms = terms | {CAPTION: caption_term(out.caption_sum, [batch["labels"] for batch in self._batches])}
        losses = weighted_losses(terms, out.scale, self.weights)
        if self._slopes is None:
            return losses
        self._number += 1
        return Losses(losses.total + self._slopes.linear(self._number - 1, out), losses.report)


def _without(batch: Mapping[str, Any], *names: str) -> dict[str, Any]:
    return {name: value for name, value in batch.items() if name not in names}
