"""Memory estimate of `clips-mllm train` before step 1, from its real model and its longest samples."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import psutil
import torch

from clips_mllm.model.tiles import views
from clips_mllm.planning.catalog import GB, Kind, default_device
from clips_mllm.planning.estimate import peak_memory
from clips_mllm.planning.lengths import Lengths
from clips_mllm.planning.setup import setup_of
from clips_mllm.planning.shapes import Shape, llm_shape, tower_shape
from clips_mllm.prompts.conversation import IGNORED, Unsupervised
from vision_tower.common.errors import UserError
from vision_tower.data.images import BadImage

if TYPE_CHECKING:
    from transformers import LlavaConfig, TrainingArguments

    from clips_mllm.data.dataset import InstructionDataset
    from clips_mllm.training.recipe import TrainRecipe

MEASURED = 8  # of the longest samples
MAX_TRIED = 64
TOLERANCE = 1.1  # the estimate can be too high by this factor


def memory_line(
    recipe: TrainRecipe, config: LlavaConfig, dataset: InstructionDataset, arguments: TrainingArguments
) -> str:
    """Return the estimate as a line for the log.

    The line only warns if the estimate is uncertain by more than the missing memory, if the optimizer is not AdamW, or
    on a CPU, where other processes can free memory.

    Raises:
        UserError: the peak does not fit into the GPU.
    """
    kind: Kind = "gpu" if arguments.device.type == "cuda" else "cpu"
    shape = Shape(
        tower=tower_shape(config.vision_config.to_dict(), "vision_config"),
        llm=llm_shape(config.text_config.to_dict(), "text_config"),
    )
    lengths = longest_samples(dataset)
    if lengths is None:
        return f"memory estimate: not possible, because none of the {MAX_TRIED} longest samples can be used"
    setup = setup_of(recipe, shape, lengths, devices=arguments.world_size, device=default_device(kind))
    needed, available = peak_memory(setup).total, available_bytes(arguments)
    line = f"memory estimate: peak of {needed / GB:.1f} GB on each {kind}, {available / GB:.1f} GB are available"
    if needed <= available:
        return line
    remedy = (
        "lower training.device_batch_size, set training.gradient_checkpointing=true, or use "
        "configs/deepspeed/zero3_offload.json; `clips-mllm plan` compares them"
    )
    certain = needed > TOLERANCE * available and "optim" not in recipe.training.extra
    if kind == "gpu" and certain:
        raise UserError(line, key="training.device_batch_size", value=recipe.training.device_batch_size, remedy=remedy)
    return f"{line}; out of memory is likely: {remedy}"


def longest_samples(dataset: InstructionDataset) -> Lengths | None:
    """Render and decode the longest samples as in training; None if none of them can be used."""
    loaded = []
    for index in np.argsort(-np.abs(np.asarray(dataset.lengths())))[:MAX_TRIED]:
        try:
            loaded.append(dataset.load(int(index)))
        except (BadImage, OSError, Unsupervised):
            continue  # training reports and counts it
        if len(loaded) == MEASURED:
            break
    if not loaded:
        return None
    images = [sum(views(dataset.processor, image) for image in sample["images"]) for sample, _ in loaded]
    supervised = [sum(label != IGNORED for label in rendered.labels) for _, rendered in loaded]
    lengths = [len(rendered.ids) for _, rendered in loaded]
    return Lengths(
        samples=len(dataset),
        longest=max(lengths),
        mean=float(np.mean(lengths)),
        supervised=float(np.mean(supervised)),
        images=float(np.mean(images)),
    )


def available_bytes(arguments: TrainingArguments) -> float:
    """Return all memory of a GPU, or the memory of a CPU machine that is free or used by this process."""
    if arguments.device.type == "cuda":
        return float(torch.cuda.get_device_properties(arguments.device).total_memory)
    return float(psutil.virtual_memory().available + psutil.Process().memory_info().rss)
