"""Model FLOPs of a training step, and what share of the device's peak they are.

    MFU = model FLOPs / (seconds x devices x peak FLOPs per second of one device)

Counted is what the objective needs, not what the implementation does: matrix products of the forward pass, and twice
as many again for the backward pass of what trains. Recomputation (gradient checkpointing, gradient caching), padding of
targets, norms, activations and the optimiser are not. Source: PaLM (arXiv 2204.02311), appendix B; a product
(m, k) x (k, n) is 2mkn FLOPs, and attention adds 4 x width for each pair of positions that may meet.
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

# Dense bf16 TFLOP/s by the name that CUDA reports; vendors' data sheets, sparsity not counted. Untested on GPU.
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
    """bf16 FLOP/s of this machine's GPU where the table knows it, else none."""
    if not torch.cuda.is_available():
        return None
    tflops = PEAK_TFLOPS.get(torch.cuda.get_device_name())  # untested on GPU
    return None if tflops is None else tflops * 1e12


def blocks(layers: int, width: int, mlp: int, tokens: int, meetings: int) -> int:
    """Forward FLOPs of pre-norm blocks over `tokens` positions, of which `meetings` ordered pairs attend."""
    return layers * (2 * tokens * (4 * width * width + 2 * width * mlp) + 4 * meetings * width)


def training_flops(model: ClipsModel, batch: Mapping[str, Any]) -> int:
    """Model FLOPs of one forward and backward pass over a batch.

    The similarities of InfoNCE are left out: below one percent at any size here.
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
    projected = queries if config.teacher_forced else words  # token embeddings, or the prompt
    prefix = patches + words
    # The prefix meets itself; query t meets the prefix and the queries up to t.
    meetings = prefix * prefix + queries * prefix + queries * (queries + 1) // 2
    each = blocks(config.captioner_layers, width, config.captioner_mlp, prefix + queries, meetings)
    each += 2 * width * (patches * config.vision_config.hidden_size + projected * config.text_config.hidden_size)
    targets = int((batch["labels"] != IGNORED).sum())
    head = 2 * targets * width * config.text_config.vocab_size
    return _passes(model.captioner) * (len(batch["pixel_values"]) * each + head)


def _patches(model: ClipsModel) -> int:
    vision = model.config.vision_config
    return int((vision.image_size // vision.patch_size) ** 2)


def _passes(part: torch.nn.Module) -> int:
    """Forward and backward (twice the forward pass) of what trains; forward alone of what is locked."""
    return 3 if any(parameter.requires_grad for parameter in part.parameters()) else 1
