"""Model FLOPs against PyTorch's FlopCounterMode."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from vision_tower.model.config import ClipsConfig
from vision_tower.model.flops import blocks, training_flops
from vision_tower.model.modeling import ClipsModel
from vision_tower.text.tokenizer import IGNORED


def tiny(**values: Any) -> ClipsModel:
    tower = {"num_hidden_layers": 2, "num_attention_heads": 2}
    vision = {"hidden_size": 16, "intermediate_size": 48, "image_size": 32, "patch_size": 8, **tower}
    text = {"hidden_size": 24, "intermediate_size": 40, "vocab_size": 50, "max_position_embeddings": 7, **tower}
    config: dict[str, Any] = {
        "vision_config": vision | values.pop("vision", {"vision_use_head": False}),
        "text_config": text | {"projection_size": 12, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0},
        "captioner_width": 20,
        "captioner_layers": 3,
        "captioner_heads": 2,
        "captioner_mlp": 28,
        "captioner_queries": 6,
        "projection_dim": 12,
    }
    return ClipsModel.from_scratch(ClipsConfig(**config | values))


def batch(pairs: int = 4) -> dict[str, torch.Tensor]:
    ids = torch.ones(pairs, 7, dtype=torch.long)
    return {"pixel_values": torch.zeros(pairs, 3, 32, 32), "web_ids": ids, "sub_ids": ids}


def counted(run: Any) -> int:
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


@pytest.mark.parametrize("vision", [{"vision_use_head": False}, {"model_type": "vit"}])
def test_towers_equal_flop_counter(vision: dict[str, Any]) -> None:
    model = tiny(vision=vision, captioner_layers=0)
    model.set_attn_implementation("eager")  # the counter lacks some fused kernels
    forward = counted(lambda: model(**batch()))
    assert training_flops(model, batch()) == 3 * forward
    model.vision_model.requires_grad_(False)
    model.visual_projection.requires_grad_(False)
    image = counted(lambda: model.embed_images(batch()["pixel_values"]))
    assert training_flops(model, batch()) == 3 * forward - 2 * image


def test_captioner_equals_hand_count() -> None:
    """16 patches and 7 words before 6 queries; 5 targets in all; width 20, MLP 28, vocabulary 50."""
    labels = torch.full((4, 6), IGNORED)
    labels[0, :3] = labels[1, :2] = 5
    extra = training_flops(tiny(), batch() | {"labels": labels}) - training_flops(tiny(captioner_layers=0), batch())
    attended = 23 * 23 + sum(23 + query for query in range(1, 7))
    layer = 2 * 29 * (4 * 20 * 20 + 2 * 20 * 28) + 4 * attended * 20
    assert blocks(1, 20, 28, 29, attended) == layer
    projections = 2 * 20 * (16 * 16 + 7 * 24)
    assert extra == 3 * (4 * (3 * layer + projections) + 5 * 2 * 20 * 50)
