"""`clips-mllm pretrain`: pretrain a CLIPS encoder.

deepspeed --num_gpus 8 --module vision_tower.pretrain --config configs/vision/s16_112.yaml
"""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from vision_tower.common.errors import run_command
from vision_tower.common.launcher import drop_launcher_arguments, is_main_process
from vision_tower.common.provenance import finish_provenance
from vision_tower.common.recipe import parse_recipe
from vision_tower.pretraining.recipe import PretrainRecipe
from vision_tower.text.objectives import choose_objective
from vision_tower.training.precision import computes_bf16, settle_precision
from vision_tower.training.run_folder import (
    add_metrics_file,
    check_same_recipe,
    holds_run,
    latest_checkpoint,
    only_run_in,
    start_run_folder,
)

if TYPE_CHECKING:
    from transformers import TrainingArguments

    from vision_tower.data.pairs import PairStream
    from vision_tower.model.modeling import ClipsModel
    from vision_tower.pretraining.trainer import PretrainTrainer
    from vision_tower.text.tokenizer import ClipsTokenizer


def main(argv: list[str]) -> None:
    """Pretrain, then save the encoder and its stock vision tower in the run folder."""
    recipe = read_recipe(argv)
    folder = Path(recipe.output_dir)
    checkpoint = latest_checkpoint(folder)

    from vision_tower.pretraining.setup import check_same_vocabulary, load_tokenizer
    from vision_tower.training.arguments import training_arguments
    from vision_tower.training.process import set_up_process

    tokenizer = load_tokenizer(recipe, checkpoint)
    # Before set_up_process: once it has registered a ZeRO-3 config, transformers would shard the model while building.
    model = build_model(recipe, tokenizer)
    arguments = set_up_process(training_arguments(recipe.training, folder), recipe.training)
    check_same_vocabulary(tokenizer)
    trainer = build_trainer(recipe, model, tokenizer, arguments, checkpoint)
    with only_run_in(folder):
        if is_main_process():
            record_inputs(recipe, argv, trainer.train_dataset)
        train(trainer, checkpoint)
        save_weights(trainer, tokenizer, folder)
        if is_main_process():
            finish_provenance(folder)


def read_recipe(argv: list[str]) -> PretrainRecipe:
    """Parse and check the recipe, resolve its precision, and refuse an output_dir with another run."""
    recipe = parse_recipe(PretrainRecipe, drop_launcher_arguments(argv), command="pretrain")
    recipe.check()
    recipe = dataclasses.replace(recipe, training=settle_precision(recipe.training, computes_bf16))
    folder = Path(recipe.output_dir)
    if holds_run(folder):
        check_same_recipe(folder / "recipe.yaml", recipe, "pretrain")
    return recipe


def build_model(recipe: PretrainRecipe, tokenizer: ClipsTokenizer) -> ClipsModel:
    """Build or load the model, lock a tower, and compile the blocks."""
    from transformers import set_seed

    from vision_tower.checkpoints.loading import lock_tower
    from vision_tower.pretraining.setup import initial_model
    from vision_tower.training.model_tools import compile_blocks

    set_seed(recipe.training.seed)
    model = initial_model(recipe.model, tokenizer, choose_objective(recipe.objective, recipe.loss))
    if recipe.lock.tower != "none":
        lock_tower(model, recipe.lock)
    if recipe.training.compile:
        compile_blocks(model)
    return model


def build_trainer(
    recipe: PretrainRecipe,
    model: ClipsModel,
    tokenizer: ClipsTokenizer,
    arguments: TrainingArguments,
    checkpoint: str | None,
) -> PretrainTrainer:
    """Build the trainer with its data stream, log file, and evaluation."""
    import torch

    from vision_tower.data.pairs import PairCollator, PairStream
    from vision_tower.model.attention import choose_attention
    from vision_tower.model.step_loss import StepLoss
    from vision_tower.pretraining.trainer import PretrainTrainer
    from vision_tower.text.text_streams import CaptionSampler

    objective = choose_objective(recipe.objective, recipe.loss)
    choose_attention(model, arguments.device, torch.bfloat16 if arguments.bf16 else torch.float32)
    trainer = PretrainTrainer(
        model=model,
        args=arguments,
        train_dataset=PairStream(
            recipe.data,
            recipe.model.image_size,
            recipe.training.seed,
            arguments.process_index,
            arguments.world_size,
            CaptionSampler(tokenizer, objective, recipe.captions, recipe.model.text_room),
        ),
        data_collator=PairCollator(
            tokenizer=tokenizer,
            text_length=recipe.model.text_length,
            target_length=recipe.model.target_length,
            trim=recipe.model.padding == "masked",
        ),
        step_loss=StepLoss(objective.weights),
        training=recipe.training,
        checkpoint=checkpoint,
    )
    add_metrics_file(trainer, Path(recipe.output_dir) / "metrics.jsonl")
    if recipe.evaluation.every:
        from vision_tower.pretraining.eval_callback import EvalCallback

        trainer.add_callback(EvalCallback(recipe.evaluation, trainer, tokenizer))
    return trainer


def record_inputs(recipe: PretrainRecipe, argv: list[str], stream: PairStream) -> None:
    """Write the recipe and the provenance of the inputs into the run folder."""
    inputs = {
        "start_from": recipe.model.start_from,
        "lock": recipe.lock.checkpoint,
        "vocabulary": recipe.model.vocabulary,
        "shards": recipe.data.shards,
    }
    data = {"shards": len(stream.shards), "hash": stream.fingerprint()}
    start_run_folder(Path(recipe.output_dir), recipe, "pretrain", argv, inputs, data=data)


def train(trainer: PretrainTrainer, checkpoint: str | None) -> None:
    """Train to the last step. Raise Stopped if SIGTERM ends training early."""
    from vision_tower.pretraining.stream_trainer import log_skipped
    from vision_tower.training.resume import raise_if_stopped

    trainer.train(resume_from_checkpoint=checkpoint)
    log_skipped(trainer)
    raise_if_stopped(trainer)


def save_weights(trainer: PretrainTrainer, tokenizer: ClipsTokenizer, folder: Path) -> None:
    """Save the encoder and its tower; with a weight average, also `ema/`, and export the average's tower.

    Every rank must call this, because ZeRO-3 gathers the weights; rank 0 writes.
    """
    from vision_tower.checkpoints.encoder import save_encoder

    weights, average = trainer.full_weights(), trainer.averaged_weights()
    if is_main_process():
        if average is not None:
            save_encoder(trainer.model, tokenizer, folder / "ema", average)
        save_encoder(trainer.model, tokenizer, folder, weights, exported=average)
    trainer.accelerator.wait_for_everyone()


if __name__ == "__main__":
    sys.exit(run_command(main))
