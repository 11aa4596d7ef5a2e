"""Tokenizer and initial model of a pretraining run."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vision_tower.common.errors import UserError
from vision_tower.model.recipe import ModelRecipe
from vision_tower.pretraining.recipe import PretrainRecipe
from vision_tower.text.objectives import OBJECTIVES, Objective

if TYPE_CHECKING:
    from vision_tower.model.config import ClipsConfig
    from vision_tower.model.modeling import ClipsModel
    from vision_tower.text.tokenizer import ClipsTokenizer

VOCABULARY_SAMPLES = 20_000  # captions that a new vocabulary is trained on


def load_tokenizer(recipe: PretrainRecipe, checkpoint: str | None = None) -> ClipsTokenizer:
    """Load the tokenizer: from the checkpoint, the locked text tower, the configured vocabulary, or train one."""
    from vision_tower.data.pairs import read_texts
    from vision_tower.text.tokenizer import ClipsTokenizer

    if checkpoint is not None:
        return ClipsTokenizer.from_pretrained(checkpoint)
    if recipe.lock.tower == "text" and recipe.lock.checkpoint is not None:
        return ClipsTokenizer.from_pretrained(recipe.lock.checkpoint)
    size = recipe.model.vocabulary_size
    if recipe.model.start_from is not None:
        tokenizer = ClipsTokenizer.from_pretrained(recipe.model.start_from)
    elif recipe.model.vocabulary is None:
        tokenizer = ClipsTokenizer.train(read_texts(recipe.data, VOCABULARY_SAMPLES), size)
    else:
        tokenizer = ClipsTokenizer.from_vocabulary(recipe.model.vocabulary)
    if len(tokenizer) > size:
        raise UserError(
            f"too small for the {len(tokenizer)} pieces of the vocabulary",
            file=recipe.model.start_from or recipe.model.vocabulary,
            key="model.vocabulary_size",
            value=size,
            remedy=f"set at least {len(tokenizer)}",
        )
    return tokenizer


def check_same_vocabulary(tokenizer: ClipsTokenizer) -> None:
    """Raise UserError if ranks trained different vocabularies because some could not read a shard."""
    from vision_tower.training.process import first_mismatch

    mismatch = first_mismatch(tokenizer.fast.get_vocab())
    if mismatch is not None:
        raise UserError(
            f"ranks 0 and {mismatch[0]} read different shards", key="model.vocabulary", remedy="set it to a vocab.txt"
        )


def initial_model(
    recipe: ModelRecipe, tokenizer: ClipsTokenizer, objective: Objective = OBJECTIVES["clips"]
) -> ClipsModel:
    """Build a freshly initialized model, or load `start_from` and resize it to the recipe's image size."""
    from vision_tower.checkpoints.loading import continued
    from vision_tower.model.modeling import ClipsModel

    config = model_config(recipe, tokenizer, objective)
    if recipe.start_from is None:
        return ClipsModel.from_scratch(config)
    return continued(recipe.start_from, recipe, config)


def model_config(
    recipe: ModelRecipe, tokenizer: ClipsTokenizer, objective: Objective = OBJECTIVES["clips"]
) -> ClipsConfig:
    """Map a recipe to the config. Objectives without caption loss get no captioner."""
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
    tower_class = {"model_type": "vit"} if recipe.class_token else {"vision_use_head": False}
    return ClipsConfig(
        vision_config=vision | tower_class,
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
