"""Model FLOPs of a training step, for model FLOPs utilization (PaLM, arXiv 2204.02311, appendix B).

    MFU = model FLOPs / (seconds x devices x peak FLOP/s of one device)

Counts the matrix products that the objective needs: once for the forward pass, and twice more for the backward pass of
trained parts. Does not count recomputation (gradient checkpointing, gradient cache), padded targets, norms, activations
and the optimizer. A product (m, k) x (k, n) is 2mkn FLOPs; attention adds 4 x width for each pair of positions that
attends.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from vision_tower.model.towers import has_class_token
from vision_tower.text.objectives import STREAMS
from vision_tower.text.tokenizer import IGNORED

if TYPE_CHECKING:
    from vision_tower.model.modeling import ClipsModel

# Dense bf16 TFLOP/s by CUDA device name, from vendor data sheets, without sparsity.
PEAK_TFLOPS = {
    "NVIDIA A100-SXM4-40GB": 312.0,
    "NVIDIA A100-SXM4-80GB": 312.0,
    "NVIDIA A100-PCIE-40GB": 312.0,
    "NVIDIA A100 80GB PCIe": 312.0,
    "NVIDIA H100 80GB HBM3": 989.4,
    "NVIDIA H100 PCIe": 756.0,
    "NVIDIA H200": 989.4,
    "NVIDIA B200": 2250.0,
    "NVIDIA L40S": 362.0,
    "NVIDIA GeForce RTX 4090": 165.2,
}


def known_peak() -> float | None:
    """Return the peak bf16 FLOP/s of this machine's GPU, or None if it is not in the table."""
    if not torch.cuda.is_available():
        return None
    tflops = PEAK_TFLOPS.get(torch.cuda.get_device_name())
    return None if tflops is None else tflops * 1e12


def blocks(layers: int, width: int, mlp: int, tokens: int, pairs: int) -> int:
    """Return the forward FLOPs of transformer blocks over `tokens` positions with `pairs` (query, key) pairs."""
    return layers * (2 * tokens * (4 * width * width + 2 * width * mlp) + 4 * pairs * width)


def training_flops(model: ClipsModel, batch: Mapping[str, Any]) -> int:
    """Return the model FLOPs of one forward and backward pass over a batch.

    Omits the similarities of InfoNCE, which are below one percent in all our recipes.
    """
    pairs = len(batch["pixel_values"])
    return pairs * (_image(model) + _texts(model, batch)) + _captioner(model, batch)


def _image(model: ClipsModel) -> int:
    vision = model.config.vision_config
    tokens = _patches(model) + has_class_token(vision)
    stem = 2 * _patches(model) * 3 * vision.patch_size**2 * vision.hidden_size
    tower = blocks(vision.num_hidden_layers, vision.hidden_size, vision.intermediate_size, tokens, tokens * tokens)
    head = 2 * vision.hidden_size * model.config.projection_dim
    return _passes(model.vision_model) * (stem + tower) + _passes(model.visual_projection) * head


def _texts(model: ClipsModel, batch: Mapping[str, Any]) -> int:
    text = model.config.text_config
    forward = 0
    for length in (batch[f"{stream}_ids"].shape[1] for stream in STREAMS if f"{stream}_ids" in batch):
        forward += blocks(text.num_hidden_layers, text.hidden_size, text.intermediate_size, length, length * length)
        forward += 2 * text.hidden_size * model.config.projection_dim
    return _passes(model.text_model) * forward


def _captioner(model: ClipsModel, batch: Mapping[str, Any]) -> int:
    if model.captioner is None:
        return 0
    config = model.config
    width, queries = config.captioner_width, batch["labels"].shape[1]
    patches = _patches(model)
    words = 0 if config.teacher_forced else batch["web_ids"].shape[1]
    projected = queries if config.teacher_forced else words  # previous tokens (CoCa), or the prompt (CLIPS)
    prefix = patches + words
    # The prefix attends to itself; query t attends to the prefix and to queries <= t.
    attended = prefix * prefix + queries * prefix + queries * (queries + 1) // 2
    each = blocks(config.captioner_layers, width, config.captioner_mlp, prefix + queries, attended)
    each += 2 * width * (patches * config.vision_config.hidden_size + projected * config.text_config.hidden_size)
    targets = int((batch["labels"] != IGNORED).sum())
    head = 2 * targets * width * config.text_config.vocab_size
    return _passes(model.captioner) * (len(batch["pixel_values"]) * each + head)


def _patches(model: ClipsModel) -> int:
    vision = model.config.vision_config
    return int((vision.image_size // vision.patch_size) ** 2)


def _passes(part: torch.nn.Module) -> int:
    """Return 3 (forward, and backward at twice its cost) for a trained part, 1 (forward only) for a frozen one."""
    return 3 if any(parameter.requires_grad for parameter in part.parameters()) else 1
