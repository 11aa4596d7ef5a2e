"""A tower that keeps a checkpoint's weights and does not train: LiT (arXiv 2111.07991), or the same for texts."""

from __future__ import annotations

from vision_tower.errors import UserError
from vision_tower.loading import load_model
from vision_tower.modeling import ClipsModel
from vision_tower.pretrain_recipe import LockRecipe

# Each tower with its projection: its embeddings stay those of the checkpoint.
PARTS = {"image": ("vision_model", "visual_projection"), "text": ("text_model",)}


def lock_tower(model: ClipsModel, recipe: LockRecipe) -> None:
    """Copy the tower's weights from `recipe.checkpoint` and freeze them. Raises UserError where shapes differ."""
    assert recipe.tower != "none" and recipe.checkpoint is not None, "LockRecipe.check has run"
    given = load_model(recipe.checkpoint, model.config.vision_config.image_size)
    for name in PARTS[recipe.tower]:
        part = model.get_submodule(name)
        try:
            part.load_state_dict(given.get_submodule(name).state_dict())
        except RuntimeError as error:
            first = str(error).splitlines()[1].strip()
            raise UserError(
                f"{recipe.checkpoint}: its {recipe.tower} tower is of another shape than model.{recipe.tower} "
                f"({first}); give model the sizes of the checkpoint's config.json"
            ) from error
        part.requires_grad_(False)
