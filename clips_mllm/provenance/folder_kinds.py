"""What a folder is, by the files in it and the fields they declare. No torch.

Every kind is one function that answers None where the folder is something else; the first that answers is right.
"""

from __future__ import annotations

import dataclasses
import json
import struct
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from clips_mllm.formats.original_config import is_original
from clips_mllm.model.quantize import QUANTIZATION_FILE
from vision_tower.common.errors import UserError
from vision_tower.common.files import read_object, read_text
from vision_tower.training.run_folder import checkpoint_steps

PARTS = {  # marks in the names of weights
    "vision_tower.": "tower",
    "vision_model.": "tower",
    "multi_modal_projector.": "projector",
    "language_model.": "llm",
    "lm_head.": "llm",
    "text_model.": "text",
    "captioner.": "captioner",
}
STOCK = {"llava": "LLaVA", "llava_next": "LLaVA-NeXT"}  # by model type; the second shows images in tiles
TOWERS = ("siglip_vision_model", "clip_vision_model", "vit", "dinov2", "clip", "siglip")


@dataclasses.dataclass(frozen=True)
class Kind:
    """What a folder is: one word for scripts, a line for people, and what was read."""

    kind: str
    line: str
    facts: dict[str, Any]


def find_kind(folder: Path) -> Kind:
    """The kind of a folder. Raises UserError where it is none that this project knows, or a file in it is damaged."""
    if not folder.is_dir():
        raise UserError("no such folder", file=folder, remedy="check the path")
    if (found := known_kind(folder)) is not None:
        return found
    inside = ", ".join(sorted(path.name for path in folder.iterdir())[:5]) or "nothing"
    raise UserError(
        f"no folder of a kind that is known here (inside: {inside})", file=folder, remedy="see docs/planning.md"
    )


def known_kind(folder: Path) -> Kind | None:
    """The kind of a folder; None where it is none that this project knows."""
    return next((found for ask in ASKED if (found := ask(folder)) is not None), None)


def _config(folder: Path) -> dict[str, Any]:
    file = folder / "config.json"
    return read_object(file) if file.is_file() else {}


def _checkpoint(folder: Path) -> Kind | None:
    """One of a run's intermediate checkpoints; it is complete by itself, so it is of another kind too."""
    state = folder / "trainer_state.json"
    if not state.is_file():
        return None
    step = read_object(state)["global_step"]
    inner = _stock(folder) or _adapter(folder) or _encoder(folder)
    facts = {"step": step, "run": str(folder.resolve().parent), "holds": inner.kind if inner else None}
    what = inner.line if inner else "no weights that load by themselves"
    return Kind("checkpoint", f"checkpoint of step {step} of {folder.resolve().parent}: {what}", facts)


def _sample_world(folder: Path) -> Kind | None:
    stages = [folder / "llava" / f"stage{number}.json" for number in (1, 2)]
    if not all(file.is_file() for file in stages):
        return None
    counts = {file.stem: len(json.loads(read_text(file))) for file in stages}
    shards = len(list((folder / "pretrain").glob("*.tar")))
    told = f"{shards} pretraining shards, {counts['stage1']:,} captions, {counts['stage2']:,} conversations"
    return Kind("sample_world", f"sample world (`data sample`): {told}", counts | {"shards": shards})


def _open_clip(folder: Path) -> Kind | None:
    file = folder / "open_clip_config.json"
    if not file.is_file():
        return None
    vision = read_object(file).get("model_cfg", {}).get("vision_cfg", {})
    told = f"width {vision.get('width')}, {vision.get('layers')} layers, patch {vision.get('patch_size')}"
    return Kind("open_clip", f"open_clip model: {told}; `convert --to clips` reads it", {"vision": vision})


def _original(folder: Path) -> Kind | None:
    config = _config(folder)
    if (folder / "non_lora_trainables.bin").is_file():
        base = read_object(folder / "adapter_config.json").get("base_model_name_or_path")
        return Kind("original_llava_lora", f"LoRA of the original LLaVA code on {base}", {"base": base})
    if is_original(config):
        whole = any(folder.glob("*.safetensors")) or any(folder.glob("pytorch_model*.bin"))
        kind, what = ("original_llava", "whole checkpoint") if whole else ("original_llava_projector", "projector")
        facts = {"tower": config.get("mm_vision_tower"), "model_type": config["model_type"]}
        return Kind(kind, f"{what} of the original LLaVA code, tower {facts['tower']}; see `convert --to llava`", facts)
    if (folder / "mm_projector.bin").is_file():
        return Kind("original_llava_projector", "projector of the original LLaVA code; see `convert --to llava`", {})
    return None


def _adapter(folder: Path) -> Kind | None:
    file = folder / "adapter_config.json"
    if not file.is_file():
        return None
    config = read_object(file)
    base, rank = config.get("base_model_name_or_path"), config.get("r")
    four_bits = (folder / QUANTIZATION_FILE).is_file()
    method = "QLoRA" if four_bits else "DoRA" if config.get("use_dora") else str(config.get("peft_type", "PEFT"))
    facts = {"base": base, "rank": rank, "method": method}
    return Kind("adapter", f"{method} adapter of rank {rank} on {base}; `merge` makes a plain checkpoint of it", facts)


def _stock(folder: Path) -> Kind | None:
    config = _config(folder)
    if config.get("model_type") not in STOCK or is_original(config):
        return None
    made_by = manifest(folder).get("made_by")
    stage = manifest(folder).get("stage")
    vision, text = config.get("vision_config", {}), config.get("text_config", {})
    facts = {
        "tower": vision.get("model_type"),
        "image_size": vision.get("image_size"),
        "llm": text.get("model_type"),
        "parameters": parameters(folder),
    }
    kind = {"train": stage, "merge": "merged", "convert": "converted"}.get(made_by or "", "llava")
    names = {"align": "stage 1 (align)", "finetune": "stage 2 (finetune)"}
    told = names.get(kind or "", kind or "llava")
    sizes = ", ".join(f"{name} {count:,}" for name, count in facts["parameters"].items())
    return Kind(kind or "llava", f"stock {STOCK[config['model_type']]} checkpoint, {told}: {sizes}", facts)


def _encoder(folder: Path) -> Kind | None:
    config = _config(folder)
    if config.get("model_type") != "clips":
        return None
    vision = config["vision_config"]
    told = f"width {vision['hidden_size']}, patch {vision['patch_size']}, {vision['image_size']} pixels"
    facts = {"vision": vision, "tower": (folder / "tower" / "config.json").is_file(), "parameters": parameters(folder)}
    return Kind("encoder", f"CLIPS encoder (`pretrain`): {told}{', with tower/' if facts['tower'] else ''}", facts)


def _tower(folder: Path) -> Kind | None:
    config = _config(folder)
    if config.get("model_type") not in TOWERS:
        return None
    vision = config.get("vision_config", config)
    told = f"width {vision.get('hidden_size')}, patch {vision.get('patch_size')}, {vision.get('image_size')} pixels"
    return Kind("tower", f"stock vision tower ({config['model_type']}): {told}", {"parameters": parameters(folder)})


def _llm(folder: Path) -> Kind | None:
    config = _config(folder)
    if not any(str(name).endswith("ForCausalLM") for name in config.get("architectures") or ()):
        return None
    count = sum(parameters(folder).values())
    return Kind("llm", f"causal LM ({config.get('model_type')}), {count:,} parameters", {"parameters": count})


def _unfinished(folder: Path) -> Kind | None:
    if not (folder / "recipe.yaml").is_file():
        return None
    steps = checkpoint_steps(folder)
    last = f"its last checkpoint is of step {steps[-1]}" if steps else "it has no checkpoint yet"
    line = f"unfinished run; {last}; the same command goes on from there"
    return Kind("unfinished_run", line, {"checkpoints": steps})


def _feature_cache(folder: Path) -> Kind | None:
    inside = [path.parent for path in (*folder.glob("about.json"), *folder.glob("*/about.json"))]
    chunks = [file for each in inside for file in each.glob("*.safetensors")]
    if not chunks:
        return None
    from safetensors import safe_open

    entries = 0
    for chunk in chunks:
        with safe_open(chunk, "pt") as tensors:
            entries += len(tensors.keys())
    size = sum(chunk.stat().st_size for chunk in chunks)
    facts = {"towers": len(inside), "images": entries, "bytes": size}
    return Kind("feature_cache", f"feature cache: {entries:,} images, {size / 1e9:.2f} GB", facts)


def _road(folder: Path) -> Kind | None:
    """What `make quickstart` and `make smoke` leave."""
    records = sorted((folder / "steps").glob("*.json"))
    if not records:
        return None
    steps = {record.stem: read_object(record) for record in records}
    minutes = sum(step["seconds"] for step in steps.values()) / 60
    report = "; see report.html" if (folder / "report.html").is_file() else ""
    line = f"whole road; steps done: {len(steps)}, in {minutes:.0f} minutes, the last {records[-1].stem}{report}"
    return Kind("road", line, {"steps": {name: step["command"] for name, step in steps.items()}})


def _grid(folder: Path) -> Kind | None:
    for kind, name in (("ablation", "ablation"), ("comparison", "compare")):
        file = folder / f"{name}.json"
        if file.is_file():
            return Kind(kind, f"{kind} of several runs; see {file.with_suffix('.md').name}", {})
    return None


ASKED: tuple[Callable[[Path], Kind | None], ...] = (
    _checkpoint,
    _sample_world,
    _open_clip,
    _original,
    _adapter,
    _stock,
    _encoder,
    _tower,
    _llm,
    _feature_cache,
    _unfinished,
    _road,
    _grid,
)


def manifest(folder: Path) -> dict[str, Any]:
    """manifest.json of a folder; empty where there is none."""
    file = folder / "manifest.json"
    return read_object(file) if file.is_file() else {}


def parameters(folder: Path) -> dict[str, int]:
    """Parameters by part, from the headers of the safetensors files, which hold names and shapes."""
    counts: Counter[str] = Counter()
    for file in sorted(folder.glob("model*.safetensors")):
        for name, value in _header(file).items():
            if name != "__metadata__":
                size = 1
                for side in value["shape"]:
                    size *= side
                counts[_part(name)] += size
    return dict(counts)


def _part(name: str) -> str:
    for mark, part in PARTS.items():
        if mark in name:
            return part
    return "rest"


def _header(file: Path) -> dict[str, Any]:
    with file.open("rb") as stream:
        start = stream.read(8)
        size = struct.unpack("<Q", start)[0] if len(start) == 8 else 0
        text = stream.read(size) if 0 < size < 1 << 28 else b""
    try:
        return dict(json.loads(text))
    except ValueError as error:
        raise UserError("cannot be read as safetensors", file=file, remedy="fetch or save it again") from error
