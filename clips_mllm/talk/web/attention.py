"""Where an answer looked: attention from its tokens to the patches of each image."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from clips_mllm.talk.engine import Engine
from clips_mllm.talk.prompt import InputImage, Prompt

if TYPE_CHECKING:
    from PIL.Image import Image


def attention_maps(engine: Engine, prompt: Prompt, answer: str) -> list[torch.Tensor]:
    """For each image a map (side, side) that sums to 1: mean over the answer's tokens, all layers and heads.

    Of an image in tiles it is the view of the whole, which comes first.

    The prompt is read, or taken from what was kept; only the answer's tokens are read with plain attention, which alone
    tells its weights.
    """
    ids = engine.mllm.tokenizer(answer, add_special_tokens=False)["input_ids"]
    if not ids or not prompt.images:
        return []
    weights = engine.run(lambda: _weights(engine, prompt, ids))
    tower, processor = engine.mllm.model.config.vision_config, engine.mllm.processor
    side = tower.image_size // tower.patch_size
    # A class token that stays in the sequence comes first.
    ahead = processor.num_additional_image_tokens - (processor.vision_feature_select_strategy == "default")
    maps = []
    for start in prompt.starts:
        patches = weights[start + ahead :][: side * side]
        maps.append((patches / patches.sum().clamp_min(1e-12)).view(side, side))
    return maps


def _weights(engine: Engine, prompt: Prompt, ids: list[int]) -> torch.Tensor:
    """Mean attention to each position of the prompt, on the CPU."""
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
    """The image, squared, with warm colours where the weights are large."""
    from PIL import Image as Pil

    scaled = (weights - weights.min()) / (weights.max() - weights.min()).clamp_min(1e-12)
    heat = Pil.fromarray((scaled * 255).byte().numpy()).resize((side, side), Pil.Resampling.BICUBIC)
    red = Pil.merge("RGB", (heat, heat.point(lambda value: max(0, 2 * value - 255)), Pil.new("L", heat.size)))
    return Pil.composite(red, image.image.resize((side, side)), heat.point(lambda value: value * 3 // 5))
