"""Initial weights of the projector in stage 1.

default        torch's initialization of nn.Linear, as in LLaVA; the same under every ZeRO stage
standardized   data-dependent (Mishkin and Matas, arXiv 1511.06422): a random map of standardized tower features, scaled
               so that image tokens are as long as the LLM's word embeddings. Hidden states of a pre-norm tower share a
               large mean, which the default has to unlearn first. Measured in docs/log.md
FILE           the weights of an earlier projector (LLaVA's --pretrain_mm_mlp_adapter)
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn

from clips_mllm.formats.original_weights import LINEAR
from clips_mllm.model.recipe import MllmRecipe
from clips_mllm.model.tiles import AnyModel
from vision_tower.checkpoints.weight_files import read_tensors
from vision_tower.common.errors import UserError
from vision_tower.common.randomness import untouched_randomness

IMAGE_NEWLINE = "image_newline"  # LLaVA-NeXT: the vector that ends a row of patches
Weights = dict[str, torch.Tensor]


def initialize_projector(
    model: AnyModel, recipe: MllmRecipe, *, seed: int, device: torch.device, images: Callable[[], Weights]
) -> None:
    """Set the projector's weights as the recipe says, identically on every rank.

    Args:
        device: device on which the tower reads the images of `standardized`.
        images: returns the image inputs of about a hundred samples; called for `standardized` only.
    """
    if recipe.projector is not None:
        set_weights(model, read_weights(Path(recipe.projector), model))
    elif recipe.projector_init == "standardized":
        standardize(model.to(device), **images())
    else:
        set_weights(model, default_weights(model, seed))


def default_weights(model: AnyModel, seed: int) -> Weights:
    """Draw torch's initial weights of every layer; the draws depend on the seed alone."""
    found: Weights = {}
    with untouched_randomness():
        torch.manual_seed(seed)
        for name, layer in model.model.multi_modal_projector.named_children():
            if isinstance(layer, nn.Linear):
                fresh = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None)
                found |= {f"{name}.{part}": value for part, value in fresh.state_dict().items()}
        if IMAGE_NEWLINE in _parameters(model):
            width = model.config.text_config.hidden_size
            found[IMAGE_NEWLINE] = torch.randn(width) / width**0.5  # as in LLaVA-NeXT
    return found


def read_weights(file: Path, model: AnyModel) -> Weights:
    """Read the projector from a safetensors file (`linear_1.weight`, with or without a prefix) or mm_projector.bin.

    Raises:
        UserError: the file is missing or damaged, or its names or shapes are not those of the model's projector.
    """
    remedy = "give the projector of this tower and LLM"
    if not file.is_file():
        raise UserError("no such file", file=file, key="model.projector", remedy=remedy)
    found: Weights = {}
    for name, value in read_tensors(file).items():
        short = name.rpartition("projector.")[2].removeprefix("model.")
        found[LINEAR.get(short, short)] = value
    # ZeRO-3 leaves an empty tensor in place of the weights and keeps their shape in ds_shape.
    wanted = {name: tuple(getattr(value, "ds_shape", value.shape)) for name, value in _parameters(model).items()}
    shapes = {name: tuple(value.shape) for name, value in found.items()}
    if shapes != wanted:
        raise UserError(
            f"holds {_listed(shapes)}, needed {_listed(wanted)}", file=file, key="model.projector", remedy=remedy
        )
    return found


def _listed(shapes: dict[str, tuple[int, ...]]) -> str:
    return ", ".join(f"{name} {'x'.join(map(str, shape))}" for name, shape in sorted(shapes.items())[:6])


@torch.no_grad()
def set_weights(model: AnyModel, weights: Weights) -> None:
    """Copy weights into the projector; under ZeRO-3 every rank gets its part of rank 0's."""
    parameters = _parameters(model)
    with gathered(parameters.values(), modifier_rank=0):
        for name, value in weights.items():
            parameters[name].copy_(value)


@contextmanager
def gathered(parameters: Iterable[nn.Parameter], modifier_rank: int | None = None) -> Iterator[None]:
    """Gather the parameters on every rank inside this context; no effect without ZeRO-3.

    Args:
        modifier_rank: rank whose changes are kept; None keeps none.
    """
    sharded = [parameter for parameter in parameters if hasattr(parameter, "ds_id")]
    if not sharded:
        yield
        return
    from deepspeed.runtime.zero import GatheredParameters

    with GatheredParameters(sharded, modifier_rank=modifier_rank):
        yield


def _parameters(model: AnyModel) -> dict[str, nn.Parameter]:
    """The projector's parameters by the names used in its files, with LLaVA-NeXT's `image_newline`."""
    end = getattr(model.model, IMAGE_NEWLINE, None)
    return dict(model.model.multi_modal_projector.named_parameters()) | ({} if end is None else {IMAGE_NEWLINE: end})


@torch.no_grad()
def standardize(model: AnyModel, pixel_values: torch.Tensor, **sizes: torch.Tensor) -> None:
    """Set data-dependent weights from a hundred images or so. Not for models that ZeRO-3 has sharded.

    Args:
        pixel_values: (n, 3, h, w), or (n, tiles, 3, h, w).
        sizes: `image_sizes` (n, 2) if images are in tiles.
    """
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
    """Return the features that the projector reads, (n x patches, w), of all tiles if images are in tiles."""
    inputs: list[torch.Tensor] = []
    handle = model.model.multi_modal_projector.register_forward_pre_hook(lambda _, given: inputs.append(given[0]))
    try:
        model.get_image_features(pixel_values.to(model.device, model.dtype), **sizes)
    finally:
        handle.remove()
    return inputs[0].flatten(0, 1)
