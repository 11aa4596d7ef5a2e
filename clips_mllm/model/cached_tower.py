"""A frozen tower that runs once for an image: what it said is kept on disk, and the projector reads it from there.

images --store--> known:   features                    +
                    unknown: pixels --tower--> features --+--> model(pixel_values=features) --projector--> image tokens
                                                   |
                                                   +--> store

The tower that runs is not part of the engine's forward pass, and under ZeRO-3 it is a whole copy: no collective waits
for a rank whose images are all known, or that has only text.

Shapes: n images of a batch, m of them unknown, p patches, w width of the tower.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from transformers import LlavaForConditionalGeneration, LlavaNextProcessor, LlavaProcessor, TrainingArguments
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.modeling_outputs import BaseModelOutputWithPooling

from clips_mllm.model.feature_store import DIGESTS, IS_KNOWN, KNOWN, FeatureStore
from clips_mllm.model.fingerprints import module_hash, value_hash
from vision_tower.common.errors import UserError
from vision_tower.data.images import DECODING


def open_cached_tower(
    folder: str | None, model: LlavaForConditionalGeneration, processor: LlavaProcessor, arguments: TrainingArguments
) -> CachedTower | None:
    """The tower of a model whose stage is set, with its store; none without a folder. All ranks must call it together.

    Raises:
        UserError: a tower that trains, whose features change with every step; or images in tiles.
    """
    if folder is None:
        return None
    if isinstance(processor, LlavaNextProcessor):
        raise UserError(
            "images in tiles are not kept", key="data.feature_cache", remedy="take the cache out of the recipe"
        )
    tower, config = model.model.vision_tower, model.config
    if any(value.requires_grad for value in tower.parameters()):
        raise UserError(
            "the tower trains, so its features change",
            key="data.feature_cache",
            remedy="take the cache out of the recipe",
        )
    layers = config.vision_feature_layer
    autocast = arguments.bf16 and tower.dtype == torch.float32
    about = {
        "tower": {"class": type(tower).__name__, "weights": module_hash(tower)},
        "attention": tower.config._attn_implementation,
        "feature_layer": layers,
        "feature_select": config.vision_feature_select_strategy,
        "image_processor": processor.image_processor.to_dict(),
        "decoding": DECODING,
        "precision": f"{tower.dtype}{' under bf16 autocast' if autocast else ''} on {arguments.device.type}",
    }
    width = tower.config.hidden_size * (1 if isinstance(layers, int) else len(layers))
    # Under autocast the hidden states of an fp32 tower stay fp32.
    store = FeatureStore(Path(folder) / value_hash(about), about=about, width=width, dtype=tower.dtype)
    return CachedTower(model, store, arguments.device)


class CachedTower:
    """Completes batches of `InstructionCollator`: features in the place of pixels, for every image."""

    def __init__(self, model: LlavaForConditionalGeneration, store: FeatureStore, device: torch.device) -> None:
        self.model = model
        self.store = store
        self.layer = model.config.vision_feature_layer
        self.select = model.config.vision_feature_select_strategy
        self.tower = _whole_copy(model.model.vision_tower, device)

    @contextmanager
    def completed(self, inputs: dict[str, Any], accelerator: Accelerator) -> Iterator[dict[str, Any]]:
        """Within this context the model takes the completed batch; the tower runs in the precision of the training."""
        with accelerator.autocast():
            batch = self.complete(inputs)
        with features_for_pixels(self.model):
            yield batch

    @torch.no_grad()
    def complete(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """`pixel_values` (m, 3, h, w), known features and digests become `pixel_values` (n, p, w)."""
        rest = {name: value for name, value in inputs.items() if name not in (KNOWN, IS_KNOWN, DIGESTS, "pixel_values")}
        known, is_known = inputs[KNOWN], inputs[IS_KNOWN]
        if is_known.all():
            return rest | {"pixel_values": known}
        computed = self.features(inputs["pixel_values"])
        for digest, features in zip(inputs[DIGESTS].cpu().numpy(), computed, strict=True):
            self.store.put(digest.tobytes(), features)
        every = computed.new_empty((len(is_known), *computed.shape[1:]))
        every[~is_known] = computed
        if is_known.any():
            every[is_known] = known
        return rest | {"pixel_values": every}

    def features(self, pixels: torch.Tensor) -> torch.Tensor:
        """What `LlavaModel.get_image_features` hands to its projector, (m, p, w)."""
        layers = [self.layer] if isinstance(self.layer, int) else self.layer
        hidden = self.tower(pixels.to(self.tower.dtype), output_hidden_states=self.layer).hidden_states
        drop = 1 if self.select == "default" else 0
        chosen = torch.cat([hidden[layer][:, drop:] for layer in layers], dim=-1)
        # On GPUs autocast leaves CLIP's hidden states in fp32; the projector would round them as this does.
        return chosen.to(self.store.dtype)


def _whole_copy(tower: Any, device: torch.device) -> Any:
    """The tower itself, or under ZeRO-3, where it is in pieces, a copy of it."""
    if not is_deepspeed_zero3_enabled():
        return tower
    import deepspeed

    copy = type(tower)(tower.config).to(device, tower.dtype).requires_grad_(False)
    with deepspeed.zero.GatheredParameters(list(tower.parameters())):
        copy.load_state_dict(tower.state_dict())
    return copy


@contextmanager
def features_for_pixels(model: LlavaForConditionalGeneration) -> Iterator[None]:
    """Within this context the model takes the tower's features as `pixel_values`; only the projector runs on them."""
    inner = model.model

    def project(pixel_values: torch.Tensor, **_: Any) -> BaseModelOutputWithPooling:
        # Annotated as one tensor, but LLaVA itself puts a list there.
        return BaseModelOutputWithPooling(pooler_output=list(inner.multi_modal_projector(pixel_values)))  # type: ignore[arg-type]

    inner.get_image_features = project  # type: ignore[method-assign]  # hides the method of the class
    try:
        yield
    finally:
        del inner.get_image_features
