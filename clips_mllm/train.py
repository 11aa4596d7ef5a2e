"""`clips-mllm train`: stage 1 (align) and stage 2 (finetune) of LLaVA.

deepspeed --num_gpus 8 --module clips_mllm.train --config configs/mllm/vicuna_7b_align.yaml
"""

from __future__ import annotations

import dataclasses
import logging
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clips_mllm.data.recipe import InstructionSource
from clips_mllm.data.row_source import require_file
from clips_mllm.training.recipe import TrainRecipe
from vision_tower.common.errors import UserError, run_command
from vision_tower.common.launcher import drop_launcher_arguments, is_main_process
from vision_tower.common.recipe import parse_recipe

if TYPE_CHECKING:
    from transformers import TrainingArguments

    from clips_mllm.data.dataset import Examples
    from clips_mllm.model.tiles import AnyModel, AnyProcessor
    from clips_mllm.training.trainer import MllmTrainer

logger = logging.getLogger(__name__)


def main(argv: list[str]) -> None:
    """Train one stage. The run folder gets a stock LLaVA checkpoint or a PEFT adapter."""
    recipe = read_recipe(argv)

    from transformers import set_seed

    from clips_mllm.data.dataset import Examples
    from clips_mllm.training.setup import check_output, load_or_build, with_precision
    from vision_tower.training.run_folder import check_same_recipe, holds_run

    recipe, folder = with_precision(recipe), Path(recipe.output_dir)
    check_output(folder, recipe)
    if holds_run(folder):
        check_same_recipe(folder / "recipe.yaml", recipe, "train")
    arguments = set_up(recipe, folder)  # before the model: ZeRO-3 shards it while it is built
    set_seed(recipe.training.seed)
    examples = Examples(recipe.data)  # before the model, which takes minutes to load: it reports bad rows
    model, processor = load_or_build(recipe)
    parts = check_parts(model, recipe, folder)
    trainer = build_trainer(recipe, model, processor, examples, arguments)
    run(trainer, recipe, argv, parts)


def read_recipe(argv: list[str]) -> TrainRecipe:
    """Parse and check the recipe and the presence of its data files, without importing torch."""
    recipe = parse_recipe(TrainRecipe, drop_launcher_arguments(argv), command="train")
    recipe.check()
    for source in recipe.data.sources:
        require_file(source)
    if recipe.evaluation.file is not None:
        require_file(InstructionSource(file=recipe.evaluation.file), "evaluation.file")
    projector = recipe.model.projector
    if projector is not None and not Path(projector).is_file():
        raise UserError("no such file", file=projector, key="model.projector", remedy="write it, or correct the path")
    return recipe


def set_up(recipe: TrainRecipe, folder: Path) -> TrainingArguments:
    """Return transformers' arguments; joins the ranks and chooses this process's device."""
    from clips_mllm.training.setup import further_arguments
    from vision_tower.training.arguments import training_arguments
    from vision_tower.training.process import set_up_process

    return set_up_process(training_arguments(recipe.training, folder, **further_arguments(recipe)), recipe.training)


def check_parts(model: AnyModel, recipe: TrainRecipe, folder: Path) -> dict[str, Any]:
    """Return the hashes of tower, projector and LLM on the main process; on resume, compare them with the run's."""
    from transformers.integrations import is_deepspeed_zero3_enabled

    from clips_mllm.provenance.training_inputs import compare_inputs, hash_parts
    from vision_tower.training.run_folder import latest_checkpoint

    # All ranks take part under ZeRO-3, which shards the weights over them.
    parts = hash_parts(model) if is_main_process() or is_deepspeed_zero3_enabled() else {}
    if latest_checkpoint(folder) is not None and is_main_process():
        compare_inputs(folder, recipe, parts)
    return parts


def build_trainer(
    recipe: TrainRecipe, model: AnyModel, processor: AnyProcessor, examples: Examples, arguments: TrainingArguments
) -> MllmTrainer:
    """Open the data, initialize the projector, freeze what does not train, and build the trainer."""
    from functools import partial

    from transformers import EarlyStoppingCallback, TrainerCallback

    from clips_mllm.model.cached_tower import open_cached_tower
    from clips_mllm.planning.memory_check import memory_line
    from clips_mllm.training.eval_callback import EvalCallback
    from clips_mllm.training.projector import initialize_projector
    from clips_mllm.training.setup import first_images, open_data, prepare, train_eval_datasets
    from clips_mllm.training.stages import apply_stage
    from clips_mllm.training.trainer import MllmTrainer
    from vision_tower.training.model_tools import compile_blocks

    prepare(model, processor, recipe, arguments.device)
    dataset, collator = open_data(recipe, model, processor, examples)
    if recipe.model.checkpoint is None:
        images = partial(first_images, dataset, collator)
        seed = recipe.training.seed
        initialize_projector(model, recipe.model, seed=seed, device=arguments.device, images=images)
    trained = apply_stage(model, recipe.stage, master_weights=recipe.training.deepspeed is None)
    if recipe.training.compile:
        compile_blocks(model)
    if is_main_process():
        logger.info(memory_line(recipe, model.config, dataset, arguments))
    tower = open_cached_tower(recipe.data.feature_cache, model, processor, arguments)
    if tower is not None:
        dataset.features = tower.store
        collator = dataclasses.replace(collator, features=tower.store)
    train, held_out = train_eval_datasets(recipe, dataset, processor)
    evaluation = recipe.evaluation
    evaluator = EvalCallback(evaluation, Path(recipe.output_dir), held_out, collator) if evaluation.every else None
    callbacks: list[TrainerCallback] = [evaluator] if evaluator is not None else []
    if evaluation.patience:
        callbacks.append(EarlyStoppingCallback(early_stopping_patience=evaluation.patience))
    return MllmTrainer(
        model=trained,
        bare=model,
        args=arguments,
        train_dataset=train,
        eval_dataset=train if held_out is None else held_out,  # transformers wants one even if only tasks are run
        data_collator=collator,
        stage=recipe.stage,
        processor=processor,
        group_by_length=recipe.data.group_by_length,
        text_first=recipe.data.text_first,
        evaluator=evaluator,
        tower=tower,
        callbacks=callbacks,
    )


def run(trainer: MllmTrainer, recipe: TrainRecipe, argv: list[str], parts: dict[str, Any]) -> None:
    """Check before step 1 what would fail later, train from the newest checkpoint, save."""
    from clips_mllm.provenance.training_inputs import inputs_of, training_facts
    from clips_mllm.training.preflight import preflight, show_data
    from clips_mllm.training.stages import trained_line
    from vision_tower.common.provenance import finish_provenance
    from vision_tower.training.resume import raise_if_stopped
    from vision_tower.training.run_folder import add_metrics_file, latest_checkpoint, only_run_in, start_run_folder

    folder = Path(recipe.output_dir)
    checkpoint = latest_checkpoint(folder)
    with only_run_in(folder):
        preflight(trainer, folder)
        show_data(trainer)
        if is_main_process():
            samples = len(trainer.train_dataset)  # type: ignore[arg-type]
            facts = training_facts(recipe, trainer.processor, parts, samples)
            start_run_folder(folder, recipe, "train", argv, inputs_of(recipe.model), **facts)
            line = trained_line(trainer.bare, recipe.stage)
            logger.info("%s samples in %s; %s", f"{samples:,}", recipe.training.precision, line)
        add_metrics_file(trainer, folder / "metrics.jsonl")
        try:
            trainer.train(resume_from_checkpoint=checkpoint)
        finally:
            if trainer.tower is not None:
                trainer.tower.store.flush()
        raise_if_stopped(trainer)
        trainer.save_model(str(folder))
        if is_main_process():
            finish_provenance(folder)
            logger.info("checkpoint in %s", folder)
            if trainer.tower is not None:
                logger.info(trainer.tower.store.summary())
        trainer.accelerator.wait_for_everyone()


if __name__ == "__main__":
    sys.exit(run_command(main))
