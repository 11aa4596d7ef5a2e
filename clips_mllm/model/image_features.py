"""Projected image features, computed once per distinct image and kept in CPU memory."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

import torch


class FeatureCache:
    """LRU cache of projected image features (tokens, width), keyed by a digest of the pixels.

    Args:
        budget: maximum size in bytes.
    """

    def __init__(self, budget: int) -> None:
        self.budget = budget
        self.size = 0
        self._features: OrderedDict[str, torch.Tensor] = OrderedDict()

    def get(self, digest: str) -> torch.Tensor | None:
        """Return the features of an image on the CPU, or None."""
        if digest in self._features:
            self._features.move_to_end(digest)
        return self._features.get(digest)

    def put(self, digest: str, features: torch.Tensor) -> None:
        """Add the features of a new image."""
        assert digest not in self._features
        # `features` is a view of a batch: without the copy it would keep the whole batch alive.
        kept = features.detach().to("cpu", copy=True)
        self._features[digest] = kept
        self.size += kept.nbytes
        while self.size > self.budget:
            _, dropped = self._features.popitem(last=False)
            self.size -= dropped.nbytes

    def get_or_encode(
        self, digests: Sequence[str], encode: Callable[[list[str]], Sequence[torch.Tensor]], device: torch.device
    ) -> dict[str, torch.Tensor]:
        """Return the features of each distinct image on `device`; `encode` runs once, for the images not cached."""
        cached = {digest: self.get(digest) for digest in dict.fromkeys(digests)}
        missing = [digest for digest, features in cached.items() if features is None]
        found = {digest: features.to(device) for digest, features in cached.items() if features is not None}
        for digest, features in zip(missing, encode(missing) if missing else (), strict=True):
            self.put(digest, features)
            found[digest] = features
        return found


def encoder_output(features: list[torch.Tensor]) -> Any:
    """Wrap features, one (tokens, width) per image, as LLaVA's `mm_encoder_outputs["image"]`."""
    from transformers.modeling_outputs import BaseModelOutputWithPooling

    # Annotated as one tensor, but LLaVA itself passes a list.
    return BaseModelOutputWithPooling(pooler_output=features)  # type: ignore[arg-type]
