"""Inputs of a training run for its provenance.json: hashes of the model's parts and of the data, compared on resume."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clips_mllm.model.fingerprints import module_hash, shapes_hash
from vision_tower.common.errors import UserError
from vision_tower.common.hashes import ends_hash, file_hash, value_hash
from vision_tower.common.provenance import read_provenance

if TYPE_CHECKING:
    from transformers import LlavaForConditionalGeneration, LlavaProcessor

    from clips_mllm.model.recipe import MllmRecipe
    from clips_mllm.training.recipe import TrainRecipe

logger = logging.getLogger(__name__)


def inputs_of(model: MllmRecipe) -> dict[str, str | None]:
    """The files, folders or hub ids that a recipe's model is made of, by role."""
    return {"tower": model.tower, "llm": model.llm, "projector": model.projector, "checkpoint": model.checkpoint}


def hash_parts(model: LlavaForConditionalGeneration) -> dict[str, dict[str, Any]]:
    """Class, dtype and hashes of tower, projector and LLM before training; under ZeRO-3 all ranks must call it.

    An untied vocabulary layer is part of the LLM.
    """
    inner = model.model
    parts = {"tower": inner.vision_tower, "projector": inner.multi_modal_projector, "llm": inner.language_model}
    found = {
        name: {"class": type(part).__name__, "hash": module_hash(part), "shapes": shapes_hash(part)}
        | ({"dtype": str(part.dtype).removeprefix("torch.")} if name != "projector" else {})
        for name, part in parts.items()
    }
    if not model.config.tie_word_embeddings:
        found["llm"]["vocabulary_layer"] = module_hash(model.lm_head)
    return found


def training_facts(
    recipe: TrainRecipe, processor: LlavaProcessor, parts: dict[str, Any], samples: int
) -> dict[str, Any]:
    """The fields of provenance.json that only `train` writes; `parts` is what `hash_parts` returned."""
    data = recipe.data
    return {
        "stage": "finetune" if recipe.stage.llm or recipe.stage.tower else "align",
        "parts": parts,
        "tokenizer": value_hash(processor.tokenizer.backend_tokenizer.to_str()),
        "template": {"name": data.template, "hash": value_hash(processor.chat_template)},
        "image_processor": value_hash(processor.image_processor.to_dict()),
        "data": {"samples": samples, "sources": [_describe_source(each.file, each.images) for each in data.sources]},
    }


def compare_inputs(folder: Path, recipe: TrainRecipe, parts: dict[str, Any]) -> None:
    """Compare the inputs with those at the start of the run that is resumed; warn if data changed. Main process only.

    Raises:
        UserError: a part has other shapes than the checkpoints, or the base of an adapter has changed, whose weights
            the adapter's checkpoints do not contain.
    """
    before = read_provenance(folder)
    if not before:
        return
    adapter = recipe.stage.adapter.kind != "none"
    for name, part in parts.items():
        old, source = before["parts"][name], recipe.model.checkpoint or getattr(recipe.model, name, "the recipe")
        if any(old.get(key, part[key]) != part[key] for key in ("class", "shapes")):
            raise UserError(
                f"its checkpoints have a {name} with other shapes ({old['class']}) than {source} now has "
                f"({part['class']})",
                file=folder,
                key="output_dir",
                remedy=f"restore {source}, or choose another output_dir",
            )
        changed = any(old.get(key) != part.get(key) for key in ("hash", "vocabulary_layer"))
        if adapter and name != "projector" and changed:
            raise UserError(
                f"the {name} in {source} has changed since this run began; its adapter needs the old weights",
                file=folder,
                key="output_dir",
                remedy=f"restore {source}, or choose another output_dir",
            )
    known = {source["file"]: source for source in before["data"]["sources"]}
    for source in recipe.data.sources:
        if known.get(source.file) != _describe_source(source.file, source.images):
            logger.warning("%s has changed since this run began; it resumes with other samples", source.file)


def _describe_source(file: str, images: str | None) -> dict[str, Any]:
    """Size and hash of a data file; for a folder or a glob, one hash over all its files."""
    path = Path(file)
    found: dict[str, Any] = {"file": file, "images": images}
    if path.is_file():
        hash_of = ends_hash if path.suffix == ".parquet" else file_hash
        found |= {"bytes": path.stat().st_size, "hash": hash_of(path)}
    elif path.is_dir() or any(mark in file for mark in "*?["):
        files = sorted(path.rglob("*") if path.is_dir() else path.parent.glob(path.name))
        hashes = {str(each.relative_to(path.parent)): ends_hash(each) for each in files if each.is_file()}
        found |= {"files": len(hashes), "hash": value_hash(hashes)}
    return found
