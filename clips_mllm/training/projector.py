"""Where the projector starts: from the features it will read, not from a guess about them.

The hidden states of a pre-norm tower are not normalised: they share a large mean, and their widths differ by channel.
A projector that starts from unit-scale noise first spends a good part of stage 1 on removing that mean. Here its first
layer starts as a random map of *standardised* features, and its second is scaled so that image tokens are as long as
the LLM's word embeddings. Measured in docs/log.md; the idea is that of data-dependent initialisation
(Mishkin and Matas, arXiv 1511.06422). Only the starting values differ: the classes stay stock.
"""

from __future__ import annotations

import torch
from torch import nn
from transformers.integrations import is_deepspeed_zero3_enabled

from clips_mllm.model.tiles import AnyModel


@torch.no_grad()
def fit_projector(
    model: AnyModel, pixel_values: torch.Tensor, *, device: torch.device | None = None, **sizes: torch.Tensor
) -> None:
    """Set the projector's starting values from images, a hundred or so.

    Args:
        pixel_values: (n, 3, h, w), or (n, tiles, 3, h, w).
        device: where to, before the tower reads them; where the model is by default.
        sizes: `image_sizes` (n, 2) where there are tiles.

    Under ZeRO-3 the weights are in pieces before training starts, and the values of transformers stay.
    """
    if is_deepspeed_zero3_enabled():
        return
    if device is not None:
        model.to(device)
    projector = model.model.multi_modal_projector
    first, second = projector.linear_1, projector.linear_2
    features = read_features(model, pixel_values, **sizes).to(first.weight.dtype)
    mean, deviation = features.float().mean(dim=0), features.float().std(dim=0) + 1e-6
    start = torch.randn(first.weight.shape).to(deviation) / first.in_features**0.5 / deviation
    first.weight.copy_(start)
    first.bias.copy_(-start @ mean)
    nn.init.normal_(second.weight, std=second.in_features**-0.5)
    second.bias.zero_()
    wanted = model.get_input_embeddings().weight.float().norm(dim=1).mean()
    second.weight.mul_(wanted / projector(features).float().norm(dim=1).mean())


def read_features(model: AnyModel, pixel_values: torch.Tensor, **sizes: torch.Tensor) -> torch.Tensor:
    """The patch features that the projector reads, (n x patches, w), of every tile where there are some."""
    seen: list[torch.Tensor] = []
    handle = model.model.multi_modal_projector.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    try:
        model.get_image_features(pixel_values.to(model.device, model.dtype), **sizes)
    finally:
        handle.remove()
    return seen[0].flatten(0, 1)
