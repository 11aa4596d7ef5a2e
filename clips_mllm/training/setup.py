"""Model, data and transformers' arguments of a run.

recipe --> load_or_build --> prepare --> open_data --> train_eval_datasets
                               attention, template, image aspect ratio
"""

from __future__ import annotations

import dataclasses
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeVar

import torch

from clips_mllm.data.collator import InstructionCollator, packing_for
from clips_mllm.data.dataset import Examples, InstructionDataset, train_eval_split
from clips_mllm.model.adapters import is_adapter
from clips_mllm.model.build import build_mllm
from clips_mllm.model.checkpoint import load_parts
from clips_mllm.model.processors import IMAGE_INPUTS, set_aspect_ratio
from clips_mllm.model.stock import is_complete
from clips_mllm.model.tiles import AnyModel, AnyProcessor
from clips_mllm.prompts.chat_template import adopt_template
from clips_mllm.training.recipe import TrainRecipe
from vision_tower.common.errors import UserError
from vision_tower.common.hashes import value_hash
from vision_tower.model.attention import choose_attention as choose_fastest_attention
from vision_tower.training.precision import computes_bf16, settle_precision
from vision_tower.training.process import first_mismatch

PROJECTOR_SAMPLES = 128
Recipe = TypeVar("Recipe", bound=TrainRecipe)


def with_precision(recipe: Recipe) -> Recipe:
    """Return the recipe with bf16 or fp32 in place of `training.precision: auto`."""
    return dataclasses.replace(recipe, training=settle_precision(recipe.training, computes_bf16))


def check_output(folder: Path, recipe: TrainRecipe) -> None:
    """Raise UserError if the run would overwrite its own base, or mix an adapter and a plain checkpoint in a folder."""
    base, adapts = recipe.model.checkpoint, recipe.stage.adapter.kind != "none"
    if base is not None and Path(base).is_dir() and Path(base).resolve() == folder.resolve():
        raise UserError(
            "would overwrite model.checkpoint", key="output_dir", value=recipe.output_dir, remedy="choose another"
        )
    if is_complete(folder) if adapts else is_adapter(folder):
        raise UserError(
            f"holds {'a plain checkpoint' if adapts else 'an adapter'} of another run",
            key="output_dir",
            value=recipe.output_dir,
            remedy="choose another output_dir, or delete it",
        )


def further_arguments(recipe: TrainRecipe) -> dict[str, Any]:
    """Return the TrainingArguments fields of these stages that `training_arguments` does not set."""
    evaluation, kept = recipe.evaluation, recipe.training.keep_checkpoints
    more: dict[str, Any] = _liger_arguments() if recipe.training.liger else {}
    if recipe.training.gradient_checkpointing:
        # The reentrant variant stops gradients if a block's input needs none, as after a frozen embedding.
        more["gradient_checkpointing_kwargs"] = {"use_reentrant": False}
    if not evaluation.every:
        return more
    return more | {
        "eval_strategy": "steps",
        "eval_steps": evaluation.every,
        "metric_for_best_model": f"eval_{evaluation.best_by}" if evaluation.keep_best or evaluation.patience else None,
        "greater_is_better": evaluation.best_by != "loss",
        "load_best_model_at_end": evaluation.keep_best,
        "restore_callback_states_from_checkpoint": bool(evaluation.patience),
        "save_total_limit": max(kept, 2) if evaluation.keep_best else kept,  # the newest, for resuming, and the best
    }


def _liger_arguments() -> dict[str, Any]:
    """Liger's fused loss stays off: `supervised_loss` runs the vocabulary layer at supervised positions only."""
    if not torch.cuda.is_available():
        raise UserError("its Triton kernels need a GPU", key="training.liger", remedy="leave it out")
    if find_spec("liger_kernel") is None:
        raise UserError("not installed", key="training.liger", remedy="pip install liger-kernel")
    own_loss = {"cross_entropy": False, "fused_linear_cross_entropy": False}
    return {"use_liger_kernel": True, "liger_kernel_config": own_loss}


def load_or_build(recipe: TrainRecipe) -> tuple[AnyModel, AnyProcessor]:
    """Load an earlier stage's checkpoint (in 4 bits for QLoRA), or join tower and LLM by a new projector."""
    model, dtype, kind = recipe.model, weight_dtype(recipe), recipe.stage.adapter.kind
    if model.checkpoint is not None:
        if kind != "none" and is_adapter(model.checkpoint):
            raise UserError(
                "is an adapter and cannot be the base of another adapter",
                key="model.checkpoint",
                value=model.checkpoint,
                remedy="merge it with `clips-mllm merge` first",
            )
        return load_parts(model.checkpoint, dtype=dtype, quantize="4bit" if kind == "qlora" else "none")
    assert model.tower is not None and model.llm is not None, "MllmRecipe.check has run"
    return build_mllm(
        model.tower,
        model.llm,
        feature_layer=model.feature_layer,
        feature_select=model.feature_select,
        image_size=model.image_size,
        tiles=model.tiles,
        dtype=dtype,
    )


def weight_dtype(recipe: TrainRecipe) -> torch.dtype:
    """Return the dtype to load weights in.

    bf16 if the LLM is frozen, and under DeepSpeed, which keeps fp32 master weights itself. fp32 otherwise: then the
    trained weights are their own master copy.
    """
    frozen = recipe.stage.adapter.kind != "none" or not recipe.stage.llm
    half = frozen or recipe.training.deepspeed is not None
    return torch.bfloat16 if recipe.training.precision == "bf16" and half else torch.float32


def prepare(model: AnyModel, processor: AnyProcessor, recipe: TrainRecipe, device: torch.device) -> None:
    """Set attention, chat template and image aspect ratio."""
    choose_attention(model, recipe, device)
    adopt_template(processor, recipe.data.template, model)
    set_aspect_ratio(processor, recipe.data.image_aspect_ratio)


def choose_attention(model: AnyModel, recipe: TrainRecipe, device: torch.device) -> None:
    """Set the attention of tower and LLM. Raise UserError if device, package or precision do not support it."""
    attention, bf16 = recipe.model.attention, recipe.training.precision == "bf16"
    if attention == "auto":
        choose_fastest_attention(model, device, torch.bfloat16 if bf16 else torch.float32)
        return
    if attention == "flash_attention_2":
        for missing, problem, remedy in (
            (not torch.cuda.is_available(), "needs a GPU", "use sdpa"),
            (find_spec("flash_attn") is None, "not installed", "pip install flash-attn, or use sdpa"),
            (not bf16, "needs 16 bits", "set training.precision=bf16, or use sdpa"),
        ):
            if missing:
                raise UserError(problem, key="model.attention", value=attention, remedy=remedy)
    try:
        model.set_attn_implementation(attention)
    except (ImportError, ValueError) as error:
        problem = " ".join(str(error).split())[:300]
        raise UserError(problem, key="model.attention", value=attention, remedy="use eager") from error


def open_data(
    recipe: TrainRecipe, model: AnyModel, processor: AnyProcessor, examples: Examples
) -> tuple[InstructionDataset, InstructionCollator]:
    """Return data set and collator. Raise UserError on all ranks if they read different rows."""
    dataset = InstructionDataset(recipe.data, processor, examples)
    other = first_mismatch((len(dataset), value_hash([int(length) for length in dataset.lengths()])))
    if other is not None:
        rank, (rows, _), (other_rows, _) = other
        raise UserError(
            f"its contents differ between ranks: {rows:,} rows on rank 0, {other_rows:,} on rank {rank}",
            file=dataset.name,
            remedy="copy the same file and images to every machine",
        )
    attention = model.config.text_config._attn_implementation
    return dataset, InstructionCollator(processor, packing_for(recipe.data, attention))


def first_images(dataset: InstructionDataset, collator: InstructionCollator) -> dict[str, torch.Tensor]:
    """Return the image inputs of the first samples, the same on every rank."""
    batch = collator([dataset[index] for index in range(min(len(dataset), PROJECTOR_SAMPLES))])
    return {name: batch[name] for name in IMAGE_INPUTS if name in batch}


def train_eval_datasets(recipe: TrainRecipe, dataset: InstructionDataset, processor: AnyProcessor) -> tuple[Any, Any]:
    """Return (training set, held-out set or None): a file of its own, or a share of the training file."""
    evaluation = recipe.evaluation
    if evaluation.file is not None:
        held_out = InstructionDataset(
            dataclasses.replace(
                recipe.data, file=evaluation.file, images=evaluation.images or recipe.data.images, mixture=()
            ),
            processor,
        )
        held_out.features = dataset.features
        return dataset, held_out
    return train_eval_split(dataset, evaluation.share, recipe.training.seed) if evaluation.share else (dataset, None)
