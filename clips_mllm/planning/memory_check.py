"""The estimate of `clips-mllm plan` before step 1: from the model and the samples that the run really has."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import numpy as np
import psutil
import torch

from clips_mllm.model.tiles import views
from clips_mllm.planning.lengths import Lengths
from clips_mllm.planning.memory import estimate
from clips_mllm.planning.setup import setup_of
from clips_mllm.planning.shapes import Shape, llm_shape, tower_shape
from clips_mllm.prompts.conversation import IGNORED, Unsupervised
from vision_tower.common.errors import UserError
from vision_tower.data.images import BadImage

if TYPE_CHECKING:
    from transformers import LlavaConfig, TrainingArguments

    from clips_mllm.data.dataset import InstructionDataset
    from clips_mllm.training.recipe import TrainRecipe

LOOKED_AT = 8  # of the longest samples
MAX_TRIED = 64
MARGIN = 1.1  # by this much the estimate may be too high
GB = 1e9


def memory_line(
    recipe: TrainRecipe, config: LlavaConfig, dataset: InstructionDataset, arguments: TrainingArguments
) -> str:
    """The estimate, as a line for the log.

    Raises:
        UserError: on a GPU, where the peak will not fit. The line warns where the estimate may be wrong by more than is
            missing, as with an optimiser other than AdamW, and on a CPU, which may get memory back from others.
    """
    kind: Literal["cpu", "gpu"] = "gpu" if arguments.device.type == "cuda" else "cpu"
    shape = Shape(
        tower=tower_shape(config.vision_config.to_dict(), "the tower"),
        llm=llm_shape(config.text_config.to_dict(), "the LLM"),
    )
    lengths = longest(dataset)
    if lengths is None:
        return f"memory estimate: none, for not one of the {MAX_TRIED} longest samples can be used"
    memory = estimate(setup_of(recipe, shape, lengths, devices=arguments.world_size, kind=kind))
    available = available_bytes(arguments)
    told = f"memory estimate: {memory.total / GB:.1f} GB of {available / GB:.1f} GB on each {kind} at the peak"
    if memory.total <= available:
        return told
    remedy = (
        "take a smaller training.device_batch_size, training.gradient_checkpointing=true or "
        "configs/deepspeed/zero3_offload.json; `clips-mllm plan` tells more"
    )
    sure = memory.total > MARGIN * available and "optim" not in recipe.training.extra
    if kind == "gpu" and sure:
        raise UserError(
            f"{told}", key="training.device_batch_size", value=recipe.training.device_batch_size, remedy=f"{remedy}"
        )
    return f"{told}, which {'may not do' if kind == 'gpu' else 'is not free now'}; {remedy}"


def longest(dataset: InstructionDataset) -> Lengths | None:
    """Lengths of the longest samples, rendered as they will be trained on; None where none of them can be used."""
    loaded = []
    for place in np.argsort(-np.abs(np.asarray(dataset.lengths())))[:MAX_TRIED]:
        try:
            loaded.append(dataset.load(int(place)))
        except (BadImage, OSError, Unsupervised):
            continue  # named and counted when its turn comes in training
        if len(loaded) == LOOKED_AT:
            break
    if not loaded:
        return None
    seen = [sum(views(dataset.processor, image) for image in sample["images"]) for sample, _ in loaded]
    supervised = [sum(label != IGNORED for label in rendered.labels) for _, rendered in loaded]
    return Lengths(
        samples=len(dataset),
        longest=max(len(rendered.ids) for _, rendered in loaded),
        mean=float(np.mean([len(rendered.ids) for _, rendered in loaded])),
        supervised=float(np.mean(supervised)),
        images=float(np.mean(seen)),
        measured=True,
    )


def available_bytes(arguments: TrainingArguments) -> float:
    """Of this rank's device: all of a GPU, and what is free of a CPU's memory or used by this process already."""
    if arguments.device.type == "cuda":
        return float(torch.cuda.get_device_properties(arguments.device).total_memory)
    return float(psutil.virtual_memory().available + psutil.Process().memory_info().rss)
