"""From a recipe to the numbers that the estimate needs."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from clips_mllm.planning.lengths import Lengths
from clips_mllm.planning.memory import Setup
from clips_mllm.planning.shapes import Shape
from clips_mllm.training.recipe import TrainRecipe
from vision_tower.common.files import read_object


def setup_of(
    recipe: TrainRecipe, shape: Shape, lengths: Lengths, *, devices: int, kind: Literal["cpu", "gpu"]
) -> Setup:
    """What a recipe asks of each device. Raises UserError for a DeepSpeed file that is damaged."""
    training, attention = recipe.training, recipe.model.attention
    options = {} if training.deepspeed is None else read_object(Path(training.deepspeed)).get("zero_optimization", {})
    bucket = options.get("reduce_bucket_size", 5e8)
    return Setup(
        shape=shape,
        train_projector=recipe.stage.projector,
        train_llm=recipe.stage.llm,
        train_tower=recipe.stage.tower,
        adapter=recipe.stage.adapter.kind,
        rank=recipe.stage.adapter.rank,
        zero=options.get("stage", 0),
        offload_optimizer="offload_optimizer" in options,
        offload_weights="offload_param" in options,
        bucket=shape.llm.width**2 if bucket == "auto" else float(bucket),  # as transformers fills "auto" in
        mixed=training.precision == "bf16",
        checkpointing=training.gradient_checkpointing,
        # As `kernels.choose_attention` decides, which needs torch.
        eager=attention == "eager" or (attention == "auto" and kind == "cpu" and training.precision == "bf16"),
        compiled=training.compile,
        devices=devices,
        batch=training.device_batch_size,
        tokens=lengths.longest,
        supervised=round(lengths.supervised),
        images=lengths.images,
        kind=kind,
    )
