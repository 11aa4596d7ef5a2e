"""Attention maps: weights from the tokens of an answer to the patches of each image."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from clips_mllm.talk.engine import Engine
from clips_mllm.talk.images import InputImage
from clips_mllm.talk.prompt import Prompt

if TYPE_CHECKING:
    from PIL.Image import Image


def attention_maps(engine: Engine, prompt: Prompt, answer: str) -> list[torch.Tensor]:
    """Return a map (side, side) per image that sums to 1: the mean over answer tokens, layers and heads.

    For an image in tiles it is the map of the overview, which precedes the tiles. The prompt is read, or taken from the
    prefix cache, with the usual attention; only the answer is read with eager attention, which returns its weights.
    """
    ids = engine.mllm.tokenizer(answer, add_special_tokens=False)["input_ids"]
    if not ids or not prompt.images:
        return []
    weights = engine.run(lambda: _weights(engine, prompt, ids))
    tower, processor = engine.mllm.model.config.vision_config, engine.mllm.processor
    side = tower.image_size // tower.patch_size
    # A class token that is not removed precedes the patches.
    offset = processor.num_additional_image_tokens - (processor.vision_feature_select_strategy == "default")
    maps = []
    for start in prompt.starts:
        patches = weights[start + offset :][: side * side]
        maps.append((patches / patches.sum().clamp_min(1e-12)).view(side, side))
    return maps


def _weights(engine: Engine, prompt: Prompt, ids: list[int]) -> torch.Tensor:
    """Return the mean attention to each position of the prompt, on the CPU."""
    cache, known = engine.prefixes.longest(prompt)
    engine.read(prompt, cache, known)
    model: Any = engine.mllm.model
    before = model.config.text_config._attn_implementation
    model.set_attn_implementation({"text_config": "eager"})
    try:
        out = model(
            input_ids=torch.tensor([ids], device=engine.mllm.device), past_key_values=cache, output_attentions=True
        )
    finally:
        model.set_attn_implementation({"text_config": before})
    total = sum(layer[0].float().mean(dim=(0, 1)) for layer in out.attentions)  # (h, answer, positions) -> (positions)
    return (total / len(out.attentions))[: len(prompt.ids)].cpu()


def overlay(image: InputImage, weights: torch.Tensor, side: int = 384) -> Image:
    """Return the image, resized to a square, with a heat map of the weights."""
    from PIL import Image as Pil

    scaled = (weights - weights.min()) / (weights.max() - weights.min()).clamp_min(1e-12)
    heat = Pil.fromarray((scaled * 255).byte().numpy()).resize((side, side), Pil.Resampling.BICUBIC)
    red = Pil.merge("RGB", (heat, heat.point(lambda value: max(0, 2 * value - 255)), Pil.new("L", heat.size)))
    return Pil.composite(red, image.image.resize((side, side)), heat.point(lambda value: value * 3 // 5))
