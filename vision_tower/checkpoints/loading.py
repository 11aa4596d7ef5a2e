"""Weights into models, whole or not at all, and at another resolution where asked.

folder --from_pretrained--> ClipsModel --at_resolution--> ClipsModel for larger images
                                       \\--continued------> the model of a recipe that starts from it
"""

from __future__ import annotations

import contextlib
import copy
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from vision_tower.common.errors import UserError
from vision_tower.common.files import read_object
from vision_tower.model.config import ClipsConfig
from vision_tower.model.modeling import ClipsModel
from vision_tower.model.positions import resized_positions
from vision_tower.model.recipe import ModelRecipe, TowerRecipe
from vision_tower.model.towers import has_class_token, tower_parts

# The captioner's fields of ClipsConfig.
CAPTIONER = (
    "captioner_width",
    "captioner_layers",
    "captioner_heads",
    "captioner_mlp",
    "captioner_queries",
    "teacher_forced",
)


def load_model(folder: str | Path, image_size: int | None = None) -> ClipsModel:
    """The model that `save_encoder` wrote, in fp32, for images of `image_size` where that is given.

    Raises:
        UserError: a missing file, or missing or unexpected weights.
    """
    for name in ("config.json", "model.safetensors"):
        if not (Path(folder) / name).is_file():
            raise UserError(
                "missing", file=Path(folder) / name, remedy=f"{folder} is not a finished `clips-mllm pretrain` run"
            )
    kind = read_object(Path(folder) / "config.json").get("model_type")
    if kind != ClipsConfig.model_type:
        raise UserError(
            f"a '{kind}' checkpoint, not a CLIPS encoder", file=folder, remedy="give the folder of a `pretrain` run"
        )
    model, info = read_pretrained(
        ClipsModel, folder, dtype=torch.float32, output_loading_info=True, ignore_mismatched_sizes=True
    )
    refuse_partial_load(folder, info)  # other sizes too: transformers would raise a table of them
    return model if image_size is None else at_resolution(model, image_size)


def read_pretrained(kind: Any, name: str | Path, **options: Any) -> Any:
    """`kind.from_pretrained`; a file that is missing or damaged becomes a UserError.

    With `output_loading_info` the caller judges missing weights, and transformers does not tell of them too.
    """
    from safetensors import SafetensorError

    try:
        with without_load_report() if options.get("output_loading_info") else contextlib.nullcontext():
            return kind.from_pretrained(name, **options)
    except pickle.UnpicklingError as error:
        raise UserError(
            "its weights are damaged, or hold more than plain tensors, and loading that could run code",
            file=name,
            remedy="fetch it again, or save its weights as safetensors first",
        ) from error
    except (OSError, ValueError, SafetensorError) as error:
        raise UserError(
            f"cannot be read as {kind.__name__} ({error})", file=name, remedy="save or fetch the checkpoint again"
        ) from error


@contextlib.contextmanager
def without_load_report() -> Iterator[None]:
    """transformers tells that missing weights were "newly initialized"; here `refuse_partial_load` refuses them."""
    from transformers.utils import logging

    level = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)


def refuse_partial_load(folder: str | Path, info: dict[str, object], fresh: tuple[str, ...] = ()) -> None:
    """Raise UserError where a checkpoint has other weights than the model; modules named in `fresh` may be missing."""
    for what in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        keys = sorted(map(str, info.get(what) or ()))  # type: ignore[call-overload]
        keys = [key for key in keys if key.partition(".")[0] not in fresh]
        if keys:
            kind = what.removesuffix("_keys") + (" key" if len(keys) == 1 else " keys")
            raise UserError(
                f"{len(keys)} {kind} (first: {keys[0]})",
                file=folder,
                remedy="the checkpoint is incomplete or belongs to another model, save it again from its run",
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
    """A model of the class `kind` with exactly the weights `state`; modules named in `fresh` may be missing there.

    Raises:
        UserError: naming `source`.
    """
    with without_load_report():
        model, info = kind.from_pretrained(
            None,
            config=config,
            state_dict=state,
            dtype=dtype,
            ignore_mismatched_sizes=True,  # they are reported, and refused, like the rest
            output_loading_info=True,
        )
    refuse_partial_load(source, info, fresh)
    return model


def at_resolution(model: ClipsModel, image_size: int) -> ClipsModel:
    """The same weights for square images of another side, in pixels.

    Sin-cos positions are computed anew; learned ones are interpolated.
    """
    vision = model.config.vision_config
    if image_size == vision.image_size:
        return model
    if image_size < vision.patch_size:
        raise UserError(
            f"image size {image_size}: smaller than one patch of {vision.patch_size} pixels", remedy="take a larger"
        )
    config = copy.deepcopy(model.config)
    config.vision_config.image_size = image_size
    side, classed = image_size // vision.patch_size, has_class_token(vision)
    positions = tower_parts(model.vision_model).positions
    table = resized_positions(positions, side, classed, sincos=config.positions == "sincos")
    name = next(name for name, value in model.named_parameters() if value is positions)
    state = model.state_dict() | {name: table}
    return with_weights(ClipsModel, config, state, "the model at its old resolution")


def continued(folder: str | Path, recipe: ModelRecipe, config: ClipsConfig) -> ClipsModel:
    """The encoder in `folder` as the model of `recipe`, whose stock words are `config`.

    Only the image size and the captioner may differ: a checkpoint without one, such as a converted encoder, or with
    another objective's gets a fresh one, and an objective without captions gets none.

    Raises:
        UserError: no encoder there, or a size that differs.
    """
    model = load_model(folder, config.vision_config.image_size)
    found = recipe_words(model.config)
    same = bool(model.config.captioner_layers) == bool(config.captioner_layers)
    same = same and model.config.teacher_forced == config.teacher_forced
    if not same or not config.captioner_layers:
        found.pop("captioner")
        found.pop("target_length")
    for name, value in found.items():
        wanted = getattr(recipe, name)
        if wanted != value:
            raise UserError(
                f"model.{name}: {wanted} in the recipe, {value} in {folder}, where the run starts from",
                remedy="make them equal (only image_size may differ)",
            )
    if same:
        return model
    towers = copy.deepcopy(model.config)  # what a recipe does not say of them, such as the norms' epsilon, stays
    towers.update({name: getattr(config, name) for name in CAPTIONER})
    state = {name: value for name, value in model.state_dict().items() if not name.startswith("captioner.")}
    return with_weights(ClipsModel, towers, state, folder, fresh=("captioner",))


def recipe_words(config: ClipsConfig) -> dict[str, object]:
    """What a recipe would say of a model, but for its image size and vocabulary file."""
    image, text = config.vision_config, config.text_config
    return {
        "image": _tower_words(image),
        "text": _tower_words(text),
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


def _tower_words(config: Any) -> TowerRecipe:
    return TowerRecipe(
        width=config.hidden_size,
        layers=config.num_hidden_layers,
        mlp=config.intermediate_size,
        heads=config.num_attention_heads,
    )
