"""`clips-mllm train`: stage 1 (align) and stage 2 (finetune) of LLaVA.

deepspeed --num_gpus 8 --module clips_mllm.train --config configs/mllm/vicuna_7b_align.yaml
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

from clips_mllm.train_recipe import MllmRecipe, TrainRecipe
from vision_tower.errors import run_command
from vision_tower.recipe import parse_recipe
from vision_tower.training import (
    add_metrics_file,
    drop_launcher_arguments,
    final_state,
    is_main_process,
    latest_checkpoint,
    start_run_folder,
    training_arguments,
)

if TYPE_CHECKING:
    import torch
    from transformers import LlavaForConditionalGeneration, LlavaProcessor

    from clips_mllm.data import InstructionCollator, InstructionDataset

PROJECTOR_SAMPLES = 128


def main(argv: list[str]) -> None:
    """Train one stage and leave a stock LLaVA checkpoint in the run folder."""
    recipe = parse_recipe(TrainRecipe, drop_launcher_arguments(argv), command="train")
    recipe.check()
    folder = Path(recipe.output_dir)

    from transformers import set_seed

    from clips_mllm.chat_template import adopt_template
    from clips_mllm.checkpoint import save_mllm
    from clips_mllm.data import InstructionCollator, InstructionDataset, make_square, packing_for
    from clips_mllm.projector import fit_projector
    from clips_mllm.stages import apply_stage
    from clips_mllm.trainer import MllmTrainer

    arguments = training_arguments(recipe.training, folder)  # before the model: ZeRO-3 shards it as it is built
    set_seed(recipe.training.seed)
    model, processor = load_or_build(recipe.model, weight_dtype(recipe))
    adopt_template(processor, recipe.data.template, model)
    make_square(processor, recipe.data.square)
    dataset = InstructionDataset(recipe.data, processor)
    collator = InstructionCollator(processor, packing_for(recipe.data, model.config.text_config._attn_implementation))
    if recipe.model.checkpoint is None:
        fit_projector(model, first_pixels(dataset, collator))
    line = apply_stage(model, recipe.stage)
    trainer = MllmTrainer(
        model=model,
        bare=model,
        args=arguments,
        train_dataset=dataset,
        data_collator=collator,
        stage=recipe.stage,
        processor=processor,
        group_by_length=recipe.data.group_by_length,
    )
    if is_main_process():
        start_run_folder(folder, recipe)
        print(f"{len(dataset):,} samples; {line}", file=sys.stderr, flush=True)
    add_metrics_file(trainer, folder / "metrics.jsonl")
    trainer.train(resume_from_checkpoint=latest_checkpoint(folder))
    state = final_state(trainer)
    if is_main_process():
        model.config.use_cache = True
        save_mllm(model, processor, folder, state)
        print(f"checkpoint in {folder}", file=sys.stderr, flush=True)
    trainer.accelerator.wait_for_everyone()


def load_or_build(recipe: MllmRecipe, dtype: torch.dtype) -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    """An earlier stage's checkpoint, or a tower and an LLM joined by a fresh projector."""
    from clips_mllm.checkpoint import build_mllm, load_parts

    if recipe.checkpoint is not None:
        return load_parts(recipe.checkpoint, dtype=dtype)
    assert recipe.tower is not None and recipe.llm is not None, "MllmRecipe.check has run"
    return build_mllm(
        recipe.tower,
        recipe.llm,
        feature_layer=recipe.feature_layer,
        feature_select=recipe.feature_select,
        image_size=recipe.image_size,
        dtype=dtype,
    )


def first_pixels(dataset: InstructionDataset, collator: InstructionCollator) -> torch.Tensor:
    """Pixels of the first samples: a sample of what the tower will see, the same on every rank."""
    return collator([dataset[index] for index in range(min(len(dataset), PROJECTOR_SAMPLES))])["pixel_values"]


def weight_dtype(recipe: TrainRecipe) -> torch.dtype:
    """DeepSpeed keeps fp32 master weights itself and wants one bf16 model; elsewhere the weights are the masters."""
    import torch

    both = recipe.training.precision == "bf16" and recipe.training.deepspeed is not None
    return torch.bfloat16 if both else torch.float32


if __name__ == "__main__":
    sys.exit(run_command(main))
