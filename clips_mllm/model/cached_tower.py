"""Frozen vision tower with cached features: the tower runs once per image, the projector reads the cache.

    images --store--> cached:  features                    +
                      missing: pixels --tower--> features --+--> stock LLaVA with `GivenFeatures` as its vision tower
                                                     |
                                                     +--> store

The tower runs outside the engine's forward pass, and under ZeRO-3 it is a full copy: no collective waits for a rank
whose images are all cached, or that has only text.

Shapes: n images of a batch, m of them missing in the cache, p patches, w width of the tower.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn
from transformers import LlavaForConditionalGeneration, LlavaNextProcessor, LlavaProcessor, TrainingArguments
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.modeling_outputs import BaseModelOutputWithPooling

from clips_mllm.model.feature_store import DIGESTS, IS_KNOWN, KNOWN, FeatureStore
from clips_mllm.model.fingerprints import module_hash
from vision_tower.common.errors import UserError
from vision_tower.common.hashes import value_hash
from vision_tower.data.images import DECODING


def open_cached_tower(
    folder: str | None, model: LlavaForConditionalGeneration, processor: LlavaProcessor, arguments: TrainingArguments
) -> CachedTower | None:
    """Return the model's tower with its feature store, or None without a folder. All ranks must call it together.

    The stage must be applied before, so that the tower's `requires_grad` is final.

    Raises:
        UserError: the tower trains, so its features change with every step; or images are tiled.
    """
    if folder is None:
        return None
    if isinstance(processor, LlavaNextProcessor):
        raise UserError("tiled images cannot be cached", key="data.feature_cache", value=folder, remedy="remove it")
    tower, config = model.model.vision_tower, model.config
    if any(value.requires_grad for value in tower.parameters()):
        raise UserError(
            "needs a frozen tower", key="data.feature_cache", value=folder, remedy="remove it, or set stage.tower=false"
        )
    autocast = arguments.bf16 and tower.dtype == torch.float32
    about = {
        "tower": {"class": type(tower).__name__, "weights": module_hash(tower)},
        "attention": tower.config._attn_implementation,
        "feature_layer": config.vision_feature_layer,
        "feature_select": config.vision_feature_select_strategy,
        "image_processor": processor.image_processor.to_dict(),
        "decoding": DECODING,
        "precision": f"{tower.dtype}{' under bf16 autocast' if autocast else ''} on {arguments.device.type}",
    }
    # Under autocast the hidden states of an fp32 tower stay fp32.
    store = FeatureStore(Path(folder) / value_hash(about), about=about, dtype=tower.dtype)
    return CachedTower(model, store, arguments.device)


class GivenFeatures(nn.Module):
    """Vision tower whose input are features that are already computed and selected."""

    def forward(self, pixel_values: torch.Tensor, **_: Any) -> BaseModelOutputWithPooling:
        """Return the features (n, p, w) as the only hidden state."""
        return BaseModelOutputWithPooling(hidden_states=(pixel_values,))  # type: ignore[arg-type]


# Arguments of stock LLaVA's forward: read the only hidden state, all positions.
READ_GIVEN: dict[str, Any] = {"vision_feature_layer": 0, "vision_feature_select_strategy": "full"}


class CachedTower:
    """Replaces the pixels in batches of `InstructionCollator` by features."""

    def __init__(self, model: LlavaForConditionalGeneration, store: FeatureStore, device: torch.device) -> None:
        self.model = model
        self.store = store
        self.layer = model.config.vision_feature_layer
        self.select = model.config.vision_feature_select_strategy
        self.tower = _full_copy(model.model.vision_tower, device)

    @contextmanager
    def completed(self, inputs: dict[str, Any], accelerator: Accelerator) -> Iterator[dict[str, Any]]:
        """Yield the completed batch; inside the context, the model's vision tower is `GivenFeatures`."""
        with accelerator.autocast():  # the tower runs in the precision of the training
            batch = self.complete(inputs)
        inner = self.model.model
        tower, inner.vision_tower = inner.vision_tower, GivenFeatures()
        try:
            yield batch | READ_GIVEN
        finally:
            inner.vision_tower = tower

    @torch.no_grad()
    def complete(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """Turn `pixel_values` (m, 3, h, w), cached features and digests into `pixel_values` (n, p, w)."""
        rest = {name: value for name, value in inputs.items() if name not in (KNOWN, IS_KNOWN, DIGESTS, "pixel_values")}
        known, is_known = inputs[KNOWN], inputs[IS_KNOWN]
        if is_known.all():
            return rest | {"pixel_values": known}
        computed = self.features(inputs["pixel_values"])
        for digest, features in zip(inputs[DIGESTS].cpu().numpy(), computed, strict=True):
            self.store.put(digest.tobytes(), features)
        merged = computed.new_empty((len(is_known), *computed.shape[1:]))
        merged[~is_known] = computed
        if is_known.any():
            merged[is_known] = known
        return rest | {"pixel_values": merged}

    def features(self, pixels: torch.Tensor) -> torch.Tensor:
        """Return the projector's input (m, p, w), selected as `LlavaModel.get_image_features` does."""
        layers = [self.layer] if isinstance(self.layer, int) else self.layer
        hidden = self.tower(pixels.to(self.tower.dtype), output_hidden_states=self.layer).hidden_states
        drop = 1 if self.select == "default" else 0
        chosen = torch.cat([hidden[layer][:, drop:] for layer in layers], dim=-1)
        # On GPUs autocast leaves CLIP's hidden states in fp32; the projector would cast them to the same dtype.
        return chosen.to(self.store.dtype)


def _full_copy(tower: Any, device: torch.device) -> Any:
    """Return the tower itself, or under ZeRO-3, which partitions it, a full copy."""
    if not is_deepspeed_zero3_enabled():
        return tower
    import deepspeed

    copy = type(tower)(tower.config).to(device, tower.dtype).requires_grad_(False)
    with deepspeed.zero.GatheredParameters(list(tower.parameters())):
        copy.load_state_dict(tower.state_dict())
    return copy
