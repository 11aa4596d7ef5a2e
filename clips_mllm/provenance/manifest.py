"""manifest.json of a run folder: what went into it and what came out, by hashes.

start    tower, projector, LLM, tokenizer, template, preprocessing, data, recipe, versions, and the folder it began from
end      the files of weights that were written
"""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clips_mllm.model.fingerprints import ends_hash, file_hash, module_hash, shapes_hash, value_hash
from vision_tower.common.errors import UserError
from vision_tower.common.files import read_object, write_text

if TYPE_CHECKING:
    from transformers import LlavaForConditionalGeneration, LlavaProcessor

    from clips_mllm.model.recipe import MllmRecipe
    from clips_mllm.training.recipe import TrainRecipe

FILE = "manifest.json"
WEIGHTS = ("*.safetensors", "*.bin")


def part_hashes(model: LlavaForConditionalGeneration) -> dict[str, dict[str, Any]]:
    """Of the three parts, before anything is trained; under ZeRO-3 all ranks must call it together.

    The vocabulary layer belongs to the LLM, also where it is a matrix of its own.
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


def write_manifest(
    folder: Path, recipe: TrainRecipe, processor: LlavaProcessor, parts: dict[str, Any], samples: int
) -> None:
    """Leave the manifest of a run that begins, or goes on; on the main process."""
    data = recipe.data
    manifest = {
        "made_by": "train",
        "stage": "finetune" if recipe.stage.llm or recipe.stage.tower else "align",
        "begun": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "parts": parts,
        "from": sources(recipe.model),
        "tokenizer": value_hash(processor.tokenizer.backend_tokenizer.to_str()),
        "template": {"name": data.template, "hash": value_hash(processor.chat_template)},
        "image_processor": value_hash(processor.image_processor.to_dict()),
        "data": {"samples": samples, "sources": [_source(source.file, source.images) for source in data.sources]},
        "environment": read_object(folder / "environment.json"),
        "recipe": dataclasses.asdict(recipe),
    }
    write_text(folder / FILE, json.dumps(manifest, indent=1, default=str))


def compare_manifest(folder: Path, recipe: TrainRecipe, parts: dict[str, Any]) -> None:
    """Before a run goes on, on the main process: warn where its data has changed since it began, as where a bad row was
    mended.

    Raises:
        UserError: a part has other shapes than the checkpoints, or the base of an adapter, which its checkpoints do not
            hold, has changed.
    """
    if not (folder / FILE).is_file():
        return
    before = read_object(folder / FILE)
    adapter = recipe.stage.adapter.kind != "none"
    for name, part in parts.items():
        old, source = before["parts"][name], recipe.model.checkpoint or getattr(recipe.model, name, "the recipe")
        if any(old.get(what, part[what]) != part[what] for what in ("class", "shapes")):
            raise UserError(
                f"holds checkpoints with a {name} of other shapes ({old['class']}) than that of {source} "
                f"({part['class']}), which has changed since",
                file=folder,
                remedy="put the old one back, or take another output_dir",
            )
        changed = any(old.get(what) != part.get(what) for what in ("hash", "vocabulary_layer"))
        if adapter and name != "projector" and changed:
            raise UserError(
                f"the {name} of {source} has changed since this run began, and its adapter belongs to the old one",
                file=folder,
                remedy="put that back, or take another output_dir",
            )
    known = {source["file"]: source for source in before["data"]["sources"]}
    for source in recipe.data.sources:
        if known.get(source.file) != _source(source.file, source.images):
            print(
                f"warning: {source.file} has changed since this run began; it goes on with other samples",
                file=sys.stderr,
                flush=True,
            )


def finish_manifest(folder: Path) -> None:
    """Add what the run wrote."""
    manifest = read_object(folder / FILE)
    manifest |= {"ended": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "written": written(folder)}
    write_text(folder / FILE, json.dumps(manifest, indent=1, default=str))


def note_origin(folder: Path, *, made_by: str, **given: str | None) -> None:
    """Leave the manifest of a folder that a command made of others at once (`convert`, `merge`)."""
    origin = {name: describe_source(value) for name, value in given.items() if value is not None}
    manifest = {"made_by": made_by, "ended": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "from": origin}
    write_text(folder / FILE, json.dumps(manifest | {"written": written(folder)}, indent=1))


def sources(model: MllmRecipe) -> dict[str, dict[str, Any]]:
    """The folders or hub ids that a recipe's model is made of."""
    given = {"tower": model.tower, "llm": model.llm, "checkpoint": model.checkpoint}
    return {name: describe_source(value) for name, value in given.items() if value is not None}


def describe_source(name: str) -> dict[str, Any]:
    """Where it is, and the hash of its manifest where it has one: a run that was repeated since is another."""
    file = Path(name) / FILE
    found: dict[str, Any] = {"name": name}
    if Path(name).exists():
        found["folder"] = str(Path(name).resolve())
    return found | ({"manifest": file_hash(file)} if file.is_file() else {})


def written(folder: Path) -> dict[str, str]:
    """Hashes of the files of weights in a folder."""
    files = sorted(file for pattern in WEIGHTS for file in folder.glob(pattern))
    return {file.name: file_hash(file) for file in files}


def _source(file: str, images: str | None) -> dict[str, Any]:
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
