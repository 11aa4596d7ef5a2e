"""Load weights into models strictly, at another resolution, or as the start of a pretraining run.

folder --load_model--> ClipsModel --at_resolution--> ClipsModel for another image size
                            \\------continued-------> model of a recipe with `model.start_from`
                             \\-----lock_tower------> one tower of a recipe's model, frozen
"""

from __future__ import annotations

import contextlib
import copy
import logging
import pickle
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from vision_tower.common.errors import UserError
from vision_tower.common.files import read_object
from vision_tower.model.config import ClipsConfig
from vision_tower.model.modeling import ClipsModel
from vision_tower.model.positions import resized_positions
from vision_tower.model.recipe import LockRecipe, ModelRecipe, TowerRecipe
from vision_tower.model.towers import has_class_token, tower_parts

# Fields of ClipsConfig that describe the captioner.
CAPTIONER = (
    "captioner_width",
    "captioner_layers",
    "captioner_heads",
    "captioner_mlp",
    "captioner_queries",
    "teacher_forced",
)
# Modules of a lockable tower, with its projection, and the recipe fields that must equal the checkpoint's.
LOCKED_MODULES = {"image": ("vision_model", "visual_projection"), "text": ("text_model",)}
LOCKED_FIELDS = {
    "image": ("class_token", "image", "patch_size", "positions", "embed_dim"),
    "text": ("text", "padding", "text_length", "vocabulary_size", "embed_dim"),
}


def load_model(folder: str | Path, image_size: int | None = None) -> ClipsModel:
    """Load the model that `save_encoder` wrote, in fp32.

    Args:
        folder: a `pretrain` run, or one of its checkpoints.
        image_size: side of the images in pixels; None keeps the checkpoint's size.
    Raises:
        UserError: a file is missing, or weights are missing, unexpected or of another shape.
    """
    for name in ("config.json", "model.safetensors"):
        if not (Path(folder) / name).is_file():
            raise UserError("no such file", file=Path(folder) / name, remedy="give a finished `pretrain` run")
    kind = read_object(Path(folder) / "config.json").get("model_type")
    if kind != ClipsConfig.model_type:
        raise UserError("no CLIPS encoder", file=folder, key="model_type", value=kind, remedy="give a `pretrain` run")
    model, info = read_pretrained(
        ClipsModel, folder, dtype=torch.float32, output_loading_info=True, ignore_mismatched_sizes=True
    )
    refuse_partial_load(folder, info)  # mismatched sizes are refused here: transformers would raise a table of them
    return model if image_size is None else at_resolution(model, image_size)


def read_pretrained(kind: Any, name: str | Path, **options: Any) -> Any:
    """Call `kind.from_pretrained`, with a UserError for a missing or damaged file.

    With `output_loading_info` transformers' own warning about missing weights is silenced: the caller checks them.
    """
    from safetensors import SafetensorError

    try:
        with no_load_report() if options.get("output_loading_info") else contextlib.nullcontext():
            return kind.from_pretrained(name, **options)
    except pickle.UnpicklingError as error:
        raise UserError(
            "the weights are damaged, or contain objects other than tensors, which could run code when loaded",
            file=name,
            remedy="download it again, or convert its weights to safetensors first",
        ) from error
    except (OSError, ValueError, SafetensorError) as error:
        raise UserError(
            f"cannot be read as {kind.__name__} ({error})", file=name, remedy="save or download the checkpoint again"
        ) from error


@contextlib.contextmanager
def no_load_report() -> Iterator[None]:
    """Silence transformers' warning that missing weights were newly initialized: `refuse_partial_load` refuses them."""
    logger = logging.getLogger("transformers.modeling_utils")

    def keep(record: logging.LogRecord) -> bool:
        return "LOAD REPORT" not in record.getMessage()

    logger.addFilter(keep)
    try:
        yield
    finally:
        logger.removeFilter(keep)


def refuse_partial_load(folder: str | Path, info: Mapping[str, Any], fresh: tuple[str, ...] = ()) -> None:
    """Raise UserError if weights were missing, unexpected or mismatched.

    Args:
        folder: named in the error.
        info: what `from_pretrained(output_loading_info=True)` returned.
        fresh: top-level modules whose weights may be missing.
    """
    for kind in ("missing", "unexpected", "mismatched"):
        keys = sorted(map(str, info.get(f"{kind}_keys") or ()))
        keys = [key for key in keys if key.partition(".")[0] not in fresh]
        if keys:
            raise UserError(
                f"{len(keys)} {kind} {'key' if len(keys) == 1 else 'keys'} (first: {keys[0]})",
                file=folder,
                remedy="the checkpoint is incomplete or belongs to another model: save or download it again",
            )


def with_weights(
    kind: Any,
    config: Any,
    state: dict[str, torch.Tensor],
    source: str | Path,
    *,
    dtype: torch.dtype = torch.float32,
    fresh: tuple[str, ...] = (),
) -> Any:
    """Build a model of the class `kind` with exactly the weights `state`.

    Args:
        source: file or folder of the weights, named in errors.
        fresh: top-level modules that `state` may lack; they are initialized.
    Raises:
        UserError: missing, unexpected or mismatched weights.
    """
    with no_load_report():
        model, info = kind.from_pretrained(
            None,
            config=config,
            state_dict=state,
            dtype=dtype,
            ignore_mismatched_sizes=True,  # reported in `info`, and refused like the rest
            output_loading_info=True,
        )
    refuse_partial_load(source, info, fresh)
    return model


def at_resolution(model: ClipsModel, image_size: int) -> ClipsModel:
    """Return the model for square images of `image_size` pixels: sin-cos positions are recomputed, learned ones
    interpolated.

    Raises:
        UserError: an image smaller than one patch.
    """
    vision = model.config.vision_config
    if image_size == vision.image_size:
        return model
    if image_size < vision.patch_size:
        raise UserError(
            f"below the patch size {vision.patch_size}", key="image_size", value=image_size, remedy="give a larger one"
        )
    config = copy.deepcopy(model.config)
    config.vision_config.image_size = image_size
    side, class_token = image_size // vision.patch_size, has_class_token(vision)
    positions = tower_parts(model.vision_model).positions
    table = resized_positions(positions, side, class_token, sincos=config.positions == "sincos")
    name = next(name for name, value in model.named_parameters() if value is positions)
    state = model.state_dict() | {name: table}
    return with_weights(ClipsModel, config, state, "the model at its old resolution")


def continued(folder: str | Path, recipe: ModelRecipe, config: ClipsConfig) -> ClipsModel:
    """Load the encoder in `folder` as the start of a run.

    The image size may differ from the checkpoint's. The captioner is initialized if the checkpoint has none (such as a
    converted encoder) or one for another objective, and dropped if the objective has no captions.

    Args:
        recipe: the run's model.
        config: the same as a config.
    Raises:
        UserError: no encoder in the folder, or another size than in the recipe.
    """
    model = load_model(folder, config.vision_config.image_size)
    found = recipe_fields(model.config)
    same = bool(model.config.captioner_layers) == bool(config.captioner_layers)
    same = same and model.config.teacher_forced == config.teacher_forced
    replaced = () if same and config.captioner_layers else ("captioner", "target_length")
    wanted = {name: getattr(recipe, name) for name in found}
    refuse_other_fields(wanted, found, [name for name in found if name not in replaced], folder)
    if same:
        return model
    # Start from the checkpoint's config: it has fields that no recipe sets, such as the epsilon of the norms.
    towers = copy.deepcopy(model.config)
    towers.update({name: getattr(config, name) for name in CAPTIONER})
    state = {name: value for name, value in model.state_dict().items() if not name.startswith("captioner.")}
    return with_weights(ClipsModel, towers, state, folder, fresh=("captioner",))


def lock_tower(model: ClipsModel, recipe: LockRecipe) -> None:
    """Replace a tower of the model by the one in `recipe.checkpoint` and freeze it, as in LiT (arXiv 2111.07991).

    Raises:
        UserError: no encoder in the folder, or a tower of another size than in the recipe.
    """
    assert recipe.tower != "none" and recipe.checkpoint is not None, "LockRecipe.check has run"
    source = load_model(recipe.checkpoint, model.config.vision_config.image_size)
    wanted, found = recipe_fields(model.config), recipe_fields(source.config)
    refuse_other_fields(wanted, found, LOCKED_FIELDS[recipe.tower], recipe.checkpoint)
    for name in LOCKED_MODULES[recipe.tower]:
        setattr(model, name, getattr(source, name).requires_grad_(False))
    # The config has fields that no recipe sets, such as the epsilon of the norms.
    section = {"image": "vision_config", "text": "text_config"}[recipe.tower]
    setattr(model.config, section, getattr(source.config, section))


def recipe_fields(config: ClipsConfig) -> dict[str, object]:
    """The fields of a ModelRecipe that describe this config, except image size and vocabulary file."""
    image, text = config.vision_config, config.text_config
    return {
        "image": _tower_recipe(image),
        "text": _tower_recipe(text),
        "captioner": TowerRecipe(
            width=config.captioner_width,
            layers=config.captioner_layers,
            mlp=config.captioner_mlp,
            heads=config.captioner_heads,
        ),
        "embed_dim": config.projection_dim,
        "patch_size": image.patch_size,
        "class_token": has_class_token(image),
        "positions": config.positions,
        "padding": config.padding,
        "text_length": text.max_position_embeddings,
        "target_length": config.captioner_queries,
        "vocabulary_size": text.vocab_size,
    }


def refuse_other_fields(
    wanted: Mapping[str, object], found: Mapping[str, object], names: Iterable[str], folder: str | Path
) -> None:
    """Raise UserError if a field of the recipe differs from the checkpoint in `folder`."""
    for name in names:
        if wanted[name] != found[name]:
            remedy = "set it to the checkpoint's value (only image_size may differ)"
            raise UserError(
                f"the checkpoint in {folder} has {found[name]}", key=f"model.{name}", value=wanted[name], remedy=remedy
            )


def _tower_recipe(config: Any) -> TowerRecipe:
    return TowerRecipe(
        width=config.hidden_size,
        layers=config.num_hidden_layers,
        mlp=config.intermediate_size,
        heads=config.num_attention_heads,
    )
