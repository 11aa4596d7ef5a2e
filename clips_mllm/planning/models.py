"""Looks up the sizes of the models that a recipe names, without their weights. No torch.

Sizes of a model come from the first of these that exists:

    folder/config.json -> catalog.yaml -> recipe whose output_dir is the folder -> config.json on the Hugging Face hub
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from clips_mllm.model.recipe import MllmRecipe
from clips_mllm.planning.catalog import read_catalog
from clips_mllm.planning.shapes import LlmShape, Shape, TowerShape, Values, llm_shape, missing_field, tower_shape
from vision_tower.common.errors import UserError
from vision_tower.common.files import read_object

MAX_STAGES = 8  # stages that continue each other; ends the search if recipes form a circle


def catalog_llm(name: str) -> LlmShape:
    """Sizes of an LLM in catalog.yaml."""
    return llm_shape(read_catalog()["models"][name], name)


def catalog_tower(name: str) -> TowerShape:
    """Sizes of a tower in catalog.yaml."""
    return tower_shape(read_catalog()["models"][name], name)


def resolve_model(model: MllmRecipe, recipes: Path) -> MllmRecipe:
    """Replace a checkpoint that does not exist yet by the model section of the recipe that makes it.

    An adapter becomes its base checkpoint, since training merges it into that.

    Args:
        recipes: folder of YAML files to search, with its sub-folders.
    """
    for _ in range(MAX_STAGES):
        if model.checkpoint is None:
            break
        folder = Path(model.checkpoint)
        adapter = folder / "adapter_config.json"
        if adapter.is_file():
            model = dataclasses.replace(model, checkpoint=str(read_object(adapter).get("base_model_name_or_path")))
        elif (section := _model_section(folder, recipes)) is not None:
            names = ("tower", "llm", "checkpoint", "image_size", "tiles")
            values: Values = {name: section.get(name) for name in names}
            model = dataclasses.replace(model, **values)
        else:
            break
    return model


def _model_section(folder: Path, recipes: Path) -> Values | None:
    """Return the model section of the training recipe that makes a folder; None if it exists, or no recipe does."""
    for tree in () if folder.exists() else _recipes_for(folder, recipes):
        match tree:
            case {"model": ({"llm": _} | {"checkpoint": _}) as section}:
                return dict(section)
    return None


def read_shape(model: MllmRecipe, recipes: Path) -> Shape:
    """Return the sizes of a model that `resolve_model` returned.

    Raises:
        UserError: no config is found, it is of another kind of model, or images are split into tiles.
    """
    if model.tiles is not None:
        raise _tiles_error(key="model.tiles", value=model.tiles)
    if model.checkpoint is not None:
        values = _config(model.checkpoint, "model.checkpoint", recipes)
        if values.get("model_type") == "llava_next":
            raise _tiles_error(file=model.checkpoint)
        for name in ("vision_config", "text_config"):
            if not isinstance(values.get(name), dict):
                raise missing_field(KeyError(name), model.checkpoint, "a LLaVA checkpoint")
        return Shape(
            tower=tower_shape(values["vision_config"], model.checkpoint),
            llm=llm_shape(values["text_config"], model.checkpoint),
        )
    assert model.tower is not None and model.llm is not None, "MllmRecipe.check has run"
    tower = tower_shape(_config(model.tower, "model.tower", recipes), model.tower)
    if model.image_size is not None:
        tower = dataclasses.replace(tower, image_size=model.image_size)
    return Shape(tower=tower, llm=llm_shape(_config(model.llm, "model.llm", recipes), model.llm))


def _tiles_error(**fields: Any) -> UserError:
    return UserError(
        "plan does not support tiles: their number depends on the shape of each image",
        **fields,
        remedy="read the memory estimate that `clips-mllm train` logs before step 1",
    )


def _config(name: str, key: str, recipes: Path) -> Values:
    """Return the fields of a model's config.json, or the same fields from another source. Raises UserError."""
    folder = Path(name)
    if (folder / "config.json").is_file():
        return read_object(folder / "config.json")
    known = read_catalog()["models"]
    if name in known:
        return dict(known[name])
    if not folder.exists():
        for tree in _recipes_for(folder, recipes):
            match tree:
                case {"model": {"image": {}} as model}:
                    return _pretraining_fields(model)
                case {"llm": str(llm)} if llm in known:
                    return dict(known[llm])
        if name.count("/") == 1 and (values := _from_hub(name)) is not None:
            return values
    raise UserError(
        "found neither its config.json nor a recipe that makes it",
        file=name,
        key=key,
        remedy="give a folder or hub id with config.json, the output_dir of a recipe in --recipes, or a model of "
        "clips_mllm/planning/catalog.yaml",
    )


def _recipes_for(folder: Path, recipes: Path) -> Iterator[Values]:
    """Yield the recipes that write to the folder or to its parent."""
    for file in sorted(recipes.rglob("*.yaml")):
        with contextlib.suppress(yaml.YAMLError, OSError, UnicodeDecodeError):
            tree = yaml.safe_load(file.read_text(encoding="utf-8"))
            output = tree.get("output_dir") if isinstance(tree, dict) else None
            if isinstance(output, str) and Path(output) in (folder, folder.parent):
                yield tree


def _pretraining_fields(model: Values) -> Values:
    """Return the model section of a pretraining recipe in the fields of config.json."""
    image = model["image"]
    return {
        "model_type": "vit" if model.get("class_token") else "siglip_vision_model",
        "hidden_size": image["width"],
        "num_hidden_layers": image["layers"],
        "intermediate_size": image["mlp"],
        "num_attention_heads": image["heads"],
        "image_size": model["image_size"],
        "patch_size": model["patch_size"],
    }


def _from_hub(name: str) -> Values | None:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return read_object(Path(hf_hub_download(name, "config.json")))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError):
        return None
