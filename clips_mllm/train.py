"""`clips-mllm train`: stage 1 (align) and stage 2 (finetune) of LLaVA.

deepspeed --num_gpus 8 --module clips_mllm.train --config configs/mllm/vicuna_7b_align.yaml
"""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clips_mllm.data.recipe import InstructionRecipe, InstructionSource
from clips_mllm.data.row_source import require_file
from clips_mllm.model.recipe import MllmRecipe
from clips_mllm.training.recipe import TrainRecipe
from vision_tower.common.errors import UserError, run_command
from vision_tower.common.launcher import drop_launcher_arguments, is_main_process
from vision_tower.common.provenance import finish_provenance
from vision_tower.common.recipe import parse_recipe
from vision_tower.training.arguments import training_arguments
from vision_tower.training.model_tools import compile_blocks
from vision_tower.training.precision import computes_bf16, settle_precision
from vision_tower.training.process import set_up_process
from vision_tower.training.run_folder import (
    add_metrics_file,
    holds_run,
    latest_checkpoint,
    only_run_in,
    start_run_folder,
)

if TYPE_CHECKING:
    import torch

    from clips_mllm.data.dataset import Examples, InstructionCollator, InstructionDataset
    from clips_mllm.model.tiles import AnyModel, AnyProcessor
    from clips_mllm.training.trainer import MllmTrainer

PROJECTOR_SAMPLES = 128


def main(argv: list[str]) -> None:
    """Train one stage and leave a stock LLaVA checkpoint, or an adapter, in the run folder."""
    recipe = parse_recipe(TrainRecipe, drop_launcher_arguments(argv), command="train")
    recipe.check()
    recipe = dataclasses.replace(recipe, training=settle_precision(recipe.training, computes_bf16))
    for source in recipe.data.sources:
        require_file(source)
    if recipe.evaluation.every and recipe.evaluation.file is not None:
        require_file(InstructionSource(file=recipe.evaluation.file), "evaluation.file")
    evaluation = recipe.evaluation
    if not evaluation.every and (evaluation.file or evaluation.share or evaluation.tasks) and is_main_process():
        print("warning: evaluation.every=0, so nothing is measured or held out; set it", file=sys.stderr, flush=True)
    folder = Path(recipe.output_dir)
    checkpoint = latest_checkpoint(folder)

    from transformers import set_seed
    from transformers.integrations import is_deepspeed_zero3_enabled

    from clips_mllm.data.dataset import Examples
    from clips_mllm.provenance.training_inputs import compare_inputs, hash_parts, inputs_of, training_facts
    from clips_mllm.training.preflight import preflight, show_data
    from vision_tower.training.resume import end_if_stopped, refuse_other_recipe

    refuse_output(folder, recipe)
    if holds_run(folder):
        refuse_other_recipe(folder / "recipe.yaml", recipe, "train")
    # Before the model: ZeRO-3 shards it as it is built.
    values = training_arguments(recipe.training, folder, **further_arguments(recipe))
    arguments = set_up_process(values, recipe.training)
    set_seed(recipe.training.seed)
    examples = Examples(recipe.data)  # before the model too: bad rows are told of before minutes of loading
    model, processor = load_or_build(recipe, weight_dtype(recipe))
    parts = hash_parts(model) if is_main_process() or is_deepspeed_zero3_enabled() else {}
    if checkpoint is not None and is_main_process():
        compare_inputs(folder, recipe, parts)
    trainer, line = build_trainer(recipe, model, processor, examples, arguments)
    with only_run_in(folder):
        preflight(trainer, folder)
        show_data(trainer, recipe.data)
        if is_main_process():
            facts = training_facts(recipe, processor, parts, len(trainer.train_dataset))  # type: ignore[arg-type]
            start_run_folder(folder, recipe, "train", argv, inputs_of(recipe.model), **facts)
            samples = f"{len(trainer.train_dataset):,} samples in {recipe.training.precision}"  # type: ignore[arg-type]
            print(f"{samples}; {line}", file=sys.stderr, flush=True)
        add_metrics_file(trainer, folder / "metrics.jsonl")
        try:
            trainer.train(resume_from_checkpoint=checkpoint)
        finally:
            if trainer.tower is not None:
                trainer.tower.store.flush()
        end_if_stopped(trainer)
        trainer.save_model(str(folder))
        if is_main_process():
            finish_provenance(folder)
            print(f"checkpoint in {folder}", file=sys.stderr, flush=True)
            if trainer.tower is not None:
                print(trainer.tower.store.summary(), file=sys.stderr, flush=True)
        trainer.accelerator.wait_for_everyone()


def refuse_output(folder: Path, recipe: TrainRecipe) -> None:
    """Raise UserError where the run would overwrite what it begins from, or leave an adapter and a plain checkpoint in
    one folder, of which readers would take the adapter."""
    from clips_mllm.model.adapters import is_adapter
    from clips_mllm.model.stock import is_complete

    base, adapts = recipe.model.checkpoint, recipe.stage.adapter.kind != "none"
    if base is not None and Path(base).is_dir() and Path(base).resolve() == folder.resolve():
        raise UserError(
            "is model.checkpoint, which it would overwrite",
            key="output_dir",
            value=recipe.output_dir,
            remedy="take another",
        )
    if is_complete(folder) if adapts else is_adapter(folder):
        there = "a plain checkpoint" if adapts else "an adapter"
        raise UserError(
            f"holds {there} of another run, beside which this one's would be taken for a part of it",
            key="output_dir",
            value=recipe.output_dir,
            remedy="take another, or remove it",
        )


def build_trainer(
    recipe: TrainRecipe, model: AnyModel, processor: AnyProcessor, examples: Examples, arguments: Any
) -> tuple[MllmTrainer, str]:
    """Data, stage, and the engine over both; and the line that says what trains."""
    from transformers import EarlyStoppingCallback, TrainerCallback

    from clips_mllm.data.dataset import InstructionCollator, InstructionDataset, packing_for
    from clips_mllm.model.cached_tower import open_cached_tower
    from clips_mllm.model.processors import set_aspect_ratio
    from clips_mllm.planning.memory_check import memory_line
    from clips_mllm.prompts.chat_template import adopt_template
    from clips_mllm.training.kernels import choose_attention
    from clips_mllm.training.measuring import Measuring
    from clips_mllm.training.projector import fit_projector
    from clips_mllm.training.stages import apply_stage
    from clips_mllm.training.trainer import MllmTrainer
    from clips_mllm.training.word_start import start_by_words

    choose_attention(model, recipe.model.attention, recipe.training.precision == "bf16", arguments.device)
    adopt_template(processor, recipe.data.template, model)
    set_aspect_ratio(processor, recipe.data.image_aspect_ratio)
    dataset = InstructionDataset(recipe.data, processor, examples)
    check_ranks_agree(dataset)
    collator = InstructionCollator(processor, packing_for(recipe.data, model.config.text_config._attn_implementation))
    if recipe.model.checkpoint is None:
        fit_projector(model, device=arguments.device, **first_images(dataset, collator))
        if recipe.model.word_steps:
            start_by_words(model, dataset, collator, steps=recipe.model.word_steps, device=arguments.device)
    trained, line = apply_stage(model, recipe.stage)
    if recipe.training.deepspeed is None:
        masters_in_fp32(trained)
    if recipe.stage.llm and recipe.stage.adapter.kind == "none":
        leave_the_file(model)
    if recipe.training.compile:
        compile_blocks(model)
    if is_main_process():
        print(memory_line(recipe, model.config, dataset, arguments), file=sys.stderr, flush=True)
    tower = open_cached_tower(recipe.data.feature_cache, model, processor, arguments)
    if tower is not None:
        dataset.features = tower.store
        collator = dataclasses.replace(collator, features=tower.store)
    train, held = split(recipe, dataset, processor)
    evaluation = recipe.evaluation
    measuring = Measuring(evaluation, Path(recipe.output_dir), held, collator) if evaluation.every else None
    callbacks: list[TrainerCallback] = [measuring] if measuring is not None else []
    if evaluation.patience:
        callbacks.append(EarlyStoppingCallback(early_stopping_patience=evaluation.patience))
    trainer = MllmTrainer(
        model=trained,
        bare=model,
        args=arguments,
        train_dataset=train,
        eval_dataset=held if held is not None else train,  # asked for where tasks alone are measured
        data_collator=collator,
        stage=recipe.stage,
        processor=processor,
        group_by_length=recipe.data.group_by_length,
        text_first=recipe.data.text_first,
        measuring=measuring,
        tower=tower,
        callbacks=callbacks,
    )
    return trainer, line


def split(recipe: TrainRecipe, dataset: InstructionDataset, processor: AnyProcessor) -> tuple[Any, Any]:
    """(what is trained on, what is held out): another file, a share of the same one, or nothing."""
    from clips_mllm.data.dataset import InstructionDataset
    from clips_mllm.data.held_out import train_eval_split

    evaluation = recipe.evaluation
    if not evaluation.every or (evaluation.file is None and not evaluation.share):
        return dataset, None
    if evaluation.file is not None:
        other: InstructionRecipe = dataclasses.replace(
            recipe.data, file=evaluation.file, images=evaluation.images or recipe.data.images, mixture=()
        )
        held = InstructionDataset(other, processor)
        held.features = dataset.features
        return dataset, held
    return train_eval_split(dataset, evaluation.share, recipe.training.seed)


def further_arguments(recipe: TrainRecipe) -> dict[str, Any]:
    """What this stage says to transformers beyond the optimisation recipe."""
    from clips_mllm.training.kernels import liger_arguments

    evaluation, kept = recipe.evaluation, recipe.training.keep_checkpoints
    more: dict[str, Any] = liger_arguments(recipe.training.liger)
    if recipe.training.gradient_checkpointing:
        # The reentrant kind stops gradients where a block's input has none, as under a frozen embedding.
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
        "save_total_limit": max(kept, 2) if evaluation.keep_best else kept,  # the newest to go on from, and the best
    }


def masters_in_fp32(model: torch.nn.Module) -> None:
    """What trains is kept in fp32 beside a frozen bf16 model; DeepSpeed keeps such masters itself."""
    for weights in model.parameters():
        if weights.requires_grad:
            weights.data = weights.data.float()


def leave_the_file(model: AnyModel) -> None:
    """Copy what is frozen beside an LLM that trains: weights are mapped from their file, and the engine copies what
    trains, but for a small frozen tower the whole file would stay in memory."""
    for weights in model.parameters():
        if not weights.requires_grad:
            weights.data = weights.data.clone()


def load_or_build(whole: TrainRecipe, dtype: torch.dtype) -> tuple[AnyModel, AnyProcessor]:
    """An earlier stage's checkpoint, in 4 bits for QLoRA, or a tower and an LLM joined by a fresh projector."""
    from clips_mllm.model.adapters import is_adapter
    from clips_mllm.model.build import build_mllm
    from clips_mllm.model.checkpoint import load_parts

    recipe: MllmRecipe = whole.model
    if recipe.checkpoint is not None:
        kind = whole.stage.adapter.kind
        if kind != "none" and is_adapter(recipe.checkpoint):
            raise UserError(
                "an adapter, which cannot be the base of another",
                key="model.checkpoint",
                value=recipe.checkpoint,
                remedy="make a plain checkpoint of it by `clips-mllm merge`",
            )
        return load_parts(recipe.checkpoint, dtype=dtype, quantize="4bit" if kind == "qlora" else "none")
    assert recipe.tower is not None and recipe.llm is not None, "MllmRecipe.check has run"
    return build_mllm(
        recipe.tower,
        recipe.llm,
        feature_layer=recipe.feature_layer,
        feature_select=recipe.feature_select,
        image_size=recipe.image_size,
        tiles=recipe.tiles,
        dtype=dtype,
    )


def check_ranks_agree(dataset: InstructionDataset) -> None:
    """Raise UserError on all ranks where they read different rows: each draws its batches from its own table."""
    from vision_tower.common.hashes import value_hash
    from vision_tower.training.process import first_mismatch

    other = first_mismatch((len(dataset), value_hash([int(length) for length in dataset.lengths()])))
    if other is not None:
        rank, (first, _), (rows, _) = other
        raise UserError(
            f"rank 0 reads {first:,} rows and rank {rank} {rows:,}, or others",
            file=dataset.name,
            remedy="bring the same file and images to every machine",
        )


def first_images(dataset: InstructionDataset, collator: InstructionCollator) -> dict[str, torch.Tensor]:
    """Those of the first samples: a sample of what the tower will see, the same on every rank."""
    from clips_mllm.model.processors import IMAGE_INPUTS

    batch = collator([dataset[index] for index in range(min(len(dataset), PROJECTOR_SAMPLES))])
    return {name: batch[name] for name in IMAGE_INPUTS if name in batch}


def weight_dtype(recipe: TrainRecipe) -> torch.dtype:
    """DeepSpeed keeps fp32 master weights itself and wants one bf16 model; elsewhere what trains is its own master.

    A frozen LLM needs no more than bf16.
    """
    import torch

    frozen = recipe.stage.adapter.kind != "none" or not recipe.stage.llm
    half = frozen or recipe.training.deepspeed is not None
    return torch.bfloat16 if recipe.training.precision == "bf16" and half else torch.float32


if __name__ == "__main__":
    sys.exit(run_command(main))
