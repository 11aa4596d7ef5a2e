"""Numbers that the estimates need, derived from a recipe of `train`. No torch."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Literal

from clips_mllm.planning.catalog import Device, default_device
from clips_mllm.planning.lengths import Lengths
from clips_mllm.planning.shapes import Shape
from clips_mllm.training.recipe import TrainRecipe
from vision_tower.common.files import read_object

Adapter = Literal["none", "lora", "dora", "qlora"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Setup:
    """A training step: model, method, and device.

    Attributes:
        adapter, rank: how LLM and tower train; "none" trains their own weights.
        zero: DeepSpeed's ZeRO stage; 0 without DeepSpeed.
        offload_optimizer, offload_weights: kept in the host's memory by ZeRO.
        bucket: elements of ZeRO's communication buffer.
        mixed: bf16 with fp32 master weights; otherwise fp32 throughout.
        checkpointing: activations are recomputed in the backward pass.
        eager: attention is computed by plain matrix products, and its scores are kept.
        compiled: torch.compile recomputes elementwise operations in the backward pass.
        devices: ranks, each with one device.
        batch: samples per forward pass of one device.
        tokens: length of the longest sequence in a batch, to which the others are padded.
        supervised: tokens of a sample that have a label.
        images: images of a sample.
    """

    shape: Shape
    train_projector: bool = True
    train_llm: bool = False
    train_tower: bool = False
    adapter: Adapter = "none"
    rank: int = 0
    zero: int = 0
    offload_optimizer: bool = False
    offload_weights: bool = False
    bucket: float = 5e8
    mixed: bool = True
    checkpointing: bool = False
    eager: bool = False
    compiled: bool = False
    devices: int = 1
    batch: int = 1
    tokens: int = 2048
    supervised: int = 1024
    images: float = 1.0
    device: Device = dataclasses.field(default_factory=lambda: default_device("gpu"))

    @property
    def trainable(self) -> int:
        """Number of trainable parameters."""
        llm, tower = self.shape.llm, self.shape.tower
        full = self.adapter == "none"
        return (
            self.shape.projector_parameters * self.train_projector
            + (llm.parameters if full else llm.lora_parameters(self.rank)) * self.train_llm
            + (tower.parameters if full else tower.lora_parameters(self.rank)) * self.train_tower
        )

    @property
    def value_bytes(self) -> int:
        """Bytes of a value in the forward pass."""
        return 2 if self.mixed else 4


def setup_of(recipe: TrainRecipe, shape: Shape, lengths: Lengths, *, devices: int, device: Device) -> Setup:
    """Derive the setup from a recipe with settled precision. Raises UserError if the DeepSpeed file is damaged."""
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
        bucket=shape.llm.width**2 if bucket == "auto" else float(bucket),  # the value that transformers fills in
        mixed=training.precision == "bf16",
        checkpointing=training.gradient_checkpointing,
        # The same choice as `kernels.choose_attention`, which needs torch.
        eager=attention == "eager" or (attention == "auto" and device.kind == "cpu" and training.precision == "bf16"),
        compiled=training.compile,
        devices=devices,
        batch=training.device_batch_size,
        tokens=lengths.longest,
        supervised=round(lengths.supervised),
        images=lengths.images,
        device=device,
    )
