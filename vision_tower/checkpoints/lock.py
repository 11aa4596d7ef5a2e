"""A tower that keeps a checkpoint's weights and does not train: LiT (arXiv 2111.07991), or the same for texts."""

from __future__ import annotations

from vision_tower.checkpoints.loading import load_model, recipe_words
from vision_tower.common.errors import UserError
from vision_tower.model.modeling import ClipsModel
from vision_tower.model.recipe import LockRecipe

# Each tower with its projection, and what a recipe says of it: its embeddings stay those of the checkpoint.
PARTS = {"image": ("vision_model", "visual_projection"), "text": ("text_model",)}
WORDS = {
    "image": ("class_token", "image", "patch_size", "positions", "embed_dim"),
    "text": ("text", "padding", "text_length", "vocabulary_size", "embed_dim"),
}


def lock_tower(model: ClipsModel, recipe: LockRecipe) -> None:
    """Put the tower of `recipe.checkpoint` in the place of the model's, and freeze it.

    Raises:
        UserError: the recipe describes another tower.
    """
    assert recipe.tower != "none" and recipe.checkpoint is not None, "LockRecipe.check has run"
    given = load_model(recipe.checkpoint, model.config.vision_config.image_size)
    wanted, found = recipe_words(model.config), recipe_words(given.config)
    for name in WORDS[recipe.tower]:
        if wanted[name] != found[name]:
            raise UserError(
                f"model.{name}: {wanted[name]} in the recipe, {found[name]} in {recipe.checkpoint}, "
                f"whose {recipe.tower} tower is locked",
                remedy="make them equal",
            )
    for name in PARTS[recipe.tower]:
        setattr(model, name, getattr(given, name).requires_grad_(False))
    stock = {"image": "vision_config", "text": "text_config"}[recipe.tower]
    setattr(model.config, stock, getattr(given.config, stock))  # what no recipe says, such as the norms' epsilon
