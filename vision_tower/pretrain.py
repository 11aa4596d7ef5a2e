"""`clips-mllm pretrain`: pretrain a CLIPS encoder.

deepspeed --num_gpus 8 --module vision_tower.pretrain --config configs/vision/s16_112.yaml
"""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from vision_tower.common.errors import UserError, run_command
from vision_tower.common.launcher import drop_launcher_arguments, is_main_process
from vision_tower.common.provenance import finish_provenance
from vision_tower.common.recipe import parse_recipe
from vision_tower.model.recipe import ModelRecipe
from vision_tower.pretraining.recipe import PretrainRecipe
from vision_tower.text.objectives import OBJECTIVES, Objective, choose_objective
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
    from vision_tower.model.config import ClipsConfig
    from vision_tower.model.modeling import ClipsModel
    from vision_tower.pretraining.trainer import PretrainTrainer
    from vision_tower.text.tokenizer import ClipsTokenizer

VOCABULARY_SAMPLES = 20_000


def main(argv: list[str]) -> None:
    """Train, then leave the model and the stock tower in the run folder."""
    recipe = parse_recipe(PretrainRecipe, drop_launcher_arguments(argv), command="pretrain")
    recipe.check()
    recipe = dataclasses.replace(recipe, training=settle_precision(recipe.training, computes_bf16))
    folder = Path(recipe.output_dir)
    checkpoint = latest_checkpoint(folder)

    import torch
    from transformers import set_seed

    from vision_tower.checkpoints.loading import lock_tower
    from vision_tower.data.pairs import PairCollator, PairStream
    from vision_tower.model.attention import choose_attention
    from vision_tower.model.step_loss import StepLoss
    from vision_tower.pretraining.stream_trainer import report_skipped
    from vision_tower.pretraining.trainer import PretrainTrainer
    from vision_tower.text.text_streams import CaptionSampler
    from vision_tower.training.resume import end_if_stopped, refuse_other_recipe

    if holds_run(folder):
        refuse_other_recipe(folder / "recipe.yaml", recipe, "pretrain")
    objective = choose_objective(recipe.objective, recipe.loss)
    tokenizer = load_tokenizer(recipe, checkpoint)
    set_seed(recipe.training.seed)
    # Whole on every rank, so before the arguments: once they name ZeRO-3, transformers would divide parts of it here.
    model = starting_model(recipe.model, tokenizer, objective)
    if recipe.lock.tower != "none":
        lock_tower(model, recipe.lock)
    if recipe.training.compile:
        compile_blocks(model)
    arguments = set_up_process(training_arguments(recipe.training, folder), recipe.training)
    choose_attention(model, arguments.device, torch.bfloat16 if arguments.bf16 else torch.float32)
    stream = PairStream(
        recipe.data,
        recipe.model.image_size,
        recipe.training.seed,
        arguments.process_index,
        arguments.world_size,
        CaptionSampler(tokenizer, objective, recipe.captions, recipe.model.text_room),
    )
    check_vocabulary(tokenizer)
    trainer = PretrainTrainer(
        model=model,
        args=arguments,
        train_dataset=stream,
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
    with only_run_in(folder):
        if is_main_process():
            inputs = {
                "start_from": recipe.model.start_from,
                "lock": recipe.lock.checkpoint,
                "vocabulary": recipe.model.vocabulary,
                "shards": recipe.data.shards,
            }
            data = {"shards": len(stream.shards), "hash": stream.fingerprint()}
            start_run_folder(folder, recipe, "pretrain", argv, inputs, data=data)
        add_metrics_file(trainer, folder / "metrics.jsonl")
        if recipe.evaluation.every:
            from vision_tower.pretraining.eval_callback import Scoring

            trainer.add_callback(Scoring(recipe.evaluation, trainer, tokenizer))
        trainer.train(resume_from_checkpoint=checkpoint)
        report_skipped(trainer)
        end_if_stopped(trainer)
        save_weights(trainer, tokenizer, folder)
        if is_main_process():
            finish_provenance(folder)


def save_weights(trainer: PretrainTrainer, tokenizer: ClipsTokenizer, folder: Path) -> None:
    """The encoder, the average of its weights in `ema/` where there is one, and the tower of the better known of both.

    Called on all ranks, since ZeRO-3 gathers the weights from them; rank 0 writes.
    """
    from vision_tower.checkpoints.encoder import save_encoder

    own, averaged = trainer.whole_weights(), trainer.averaged_weights()
    if is_main_process():
        if averaged is not None:
            save_encoder(trainer.model, tokenizer, folder / "ema", averaged)
        save_encoder(trainer.model, tokenizer, folder, own, exported=averaged)
    trainer.accelerator.wait_for_everyone()


def load_tokenizer(recipe: PretrainRecipe, checkpoint: str | None = None) -> ClipsTokenizer:
    """That of the checkpoint to go on from, of a locked text tower, the vocabulary the recipe names, or one trained on
    the captions."""
    from vision_tower.data.pairs import read_texts
    from vision_tower.text.tokenizer import ClipsTokenizer

    if checkpoint is not None:
        return ClipsTokenizer.from_pretrained(checkpoint)
    if recipe.lock.tower == "text" and recipe.lock.checkpoint is not None:
        return ClipsTokenizer.from_pretrained(recipe.lock.checkpoint)
    if recipe.model.start_from is not None:
        tokenizer = ClipsTokenizer.from_pretrained(recipe.model.start_from)
    elif recipe.model.vocabulary is None:
        tokenizer = ClipsTokenizer.train(read_texts(recipe.data, VOCABULARY_SAMPLES), recipe.model.vocabulary_size)
    else:
        tokenizer = ClipsTokenizer.from_vocabulary(recipe.model.vocabulary)
    if len(tokenizer) > recipe.model.vocabulary_size:
        source = recipe.model.start_from or recipe.model.vocabulary or "data"
        raise UserError(
            f"the vocabulary needs {len(tokenizer)} pieces, more than "
            f"model.vocabulary_size={recipe.model.vocabulary_size}",
            file=source,
            remedy="raise it",
        )
    return tokenizer


def check_vocabulary(tokenizer: ClipsTokenizer) -> None:
    """Raise UserError where ranks read other captions, for want of a shard, and so have another vocabulary."""
    from accelerate.utils import gather_object

    everyone = gather_object([tokenizer.fast.get_vocab()])
    if any(vocabulary != everyone[0] for vocabulary in everyone):
        raise UserError(
            "the ranks could not read the same shards to train one on",
            key="model.vocabulary",
            remedy="give a vocab.txt",
        )


def starting_model(
    recipe: ModelRecipe, tokenizer: ClipsTokenizer, objective: Objective = OBJECTIVES["clips"]
) -> ClipsModel:
    """A fresh model, or the one that `start_from` names at this recipe's image size."""
    from vision_tower.checkpoints.loading import continued
    from vision_tower.model.modeling import ClipsModel

    config = model_config(recipe, tokenizer, objective)
    return (
        ClipsModel.from_scratch(config) if recipe.start_from is None else continued(recipe.start_from, recipe, config)
    )


def model_config(
    recipe: ModelRecipe, tokenizer: ClipsTokenizer, objective: Objective = OBJECTIVES["clips"]
) -> ClipsConfig:
    """The recipe in the words of the stock tower configs; an objective without captions gets no captioner."""
    from vision_tower.model.config import ClipsConfig

    image, text, captioner = recipe.image, recipe.text, recipe.captioner
    vision = {
        "hidden_size": image.width,
        "num_hidden_layers": image.layers,
        "intermediate_size": image.mlp,
        "num_attention_heads": image.heads,
        "image_size": recipe.image_size,
        "patch_size": recipe.patch_size,
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-6,
    }
    stock = {"model_type": "vit"} if recipe.class_token else {"vision_use_head": False}
    return ClipsConfig(
        vision_config=vision | stock,
        text_config={
            "hidden_size": text.width,
            "num_hidden_layers": text.layers,
            "intermediate_size": text.mlp,
            "num_attention_heads": text.heads,
            "max_position_embeddings": recipe.text_length,
            "vocab_size": recipe.vocabulary_size,
            "projection_size": recipe.embed_dim,
            "hidden_act": "gelu_pytorch_tanh",
            "layer_norm_eps": 1e-6,
            "pad_token_id": tokenizer.pad,
            "bos_token_id": tokenizer.bos,
            "eos_token_id": tokenizer.eos,
        },
        positions=recipe.positions,
        padding=recipe.padding,
        captioner_width=captioner.width,
        captioner_layers=captioner.layers if objective.captioned else 0,
        captioner_heads=captioner.heads,
        captioner_mlp=captioner.mlp,
        captioner_queries=recipe.target_length,
        teacher_forced=objective.teacher_forced,
        projection_dim=recipe.embed_dim,
    )


if __name__ == "__main__":
    sys.exit(run_command(main))
