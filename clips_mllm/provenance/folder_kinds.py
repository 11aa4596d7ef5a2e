"""Recognize the content of a folder by its files and the fields they declare, without loading torch.

encoder, tower, llm, mllm, adapter   loadable checkpoints, also intermediate ones (`checkpoint-N`) of a run
run                                  an unfinished run, or a checkpoint without loadable weights
"""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from pathlib import Path
from typing import Any, Literal

from clips_mllm.formats.original_config import is_original
from clips_mllm.model.quantize import QUANTIZATION_FILE
from vision_tower.common.errors import UserError
from vision_tower.common.files import read_object
from vision_tower.common.provenance import read_provenance
from vision_tower.training.run_folder import checkpoint_steps

PARTS = {  # substrings of weight names
    "vision_tower.": "tower",
    "vision_model.": "tower",
    "multi_modal_projector.": "projector",
    "language_model.": "llm",
    "lm_head.": "llm",
    "text_model.": "text",
    "captioner.": "captioner",
}
STOCK = {"llava": "LLaVA", "llava_next": "LLaVA-NeXT"}  # by model type
TOWERS = ("siglip_vision_model", "clip_vision_model", "vit", "dinov2", "clip", "siglip")
ORIGINS = {
    "align": "stage 1 (align)",
    "finetune": "stage 2 (finetune)",
    "merge": "merged adapter",
    "convert": "converted",
}


@dataclasses.dataclass(frozen=True)
class Folder:
    """Content of a folder: its kind, a line for people, and facts for programs."""

    kind: Literal["encoder", "tower", "llm", "mllm", "adapter", "run"]
    line: str
    facts: dict[str, Any]


def find_kind(folder: Path) -> Folder:
    """Recognize a folder.

    Raises:
        UserError: no such folder, an unknown kind, or a damaged file.
    """
    if not folder.is_dir():
        raise UserError("no such folder", file=folder, remedy="check the path")
    if (found := known_kind(folder)) is not None:
        return found
    names = ", ".join(sorted(path.name for path in folder.iterdir())[:5]) or "nothing"
    remedy = "give a folder with an encoder, vision tower, LLM, multimodal LLM or adapter, or a run folder"
    raise UserError(f"unknown folder (contains {names})", file=folder, remedy=remedy)


def known_kind(folder: Path) -> Folder | None:
    """Recognize a folder; None if it is of no known kind. Raises UserError for a damaged file."""
    inner = _adapter(folder) or _original(folder) or _from_config(folder) or _open_clip(folder)
    state = folder / "trainer_state.json"
    if state.is_file():
        step, run = read_object(state)["global_step"], folder.resolve().parent
        facts = {"step": step, "run": str(run)}
        start = f"checkpoint of step {step} of {run}"
        if inner is None:
            return Folder("run", f"{start}, to resume from; no weights that load without the run", facts)
        return Folder(inner.kind, f"{start}: {inner.line}", inner.facts | facts)
    return inner or _unfinished_run(folder)


def _from_config(folder: Path) -> Folder | None:
    """Recognize a checkpoint of transformers by the model type in its config.json."""
    file = folder / "config.json"
    config = read_object(file) if file.is_file() else {}
    kind = config.get("model_type")
    if kind in STOCK:
        return _mllm(folder, config)
    if kind == "clips" or kind in TOWERS:
        vision = config.get("vision_config", config)
        sizes = _sizes(vision, "hidden_size")
        facts = {"vision": vision, "parameters": parameters(folder)}
        if kind == "clips":
            return Folder("encoder", f"CLIPS encoder: {sizes}", facts)
        return Folder("tower", f"stock vision tower ({kind}): {sizes}", facts)
    if any(str(name).endswith("ForCausalLM") for name in config.get("architectures") or ()):
        count = sum(parameters(folder).values())
        return Folder("llm", f"causal LM ({kind}): {count:,} parameters", {"parameters": count})
    return None


def _sizes(vision: dict[str, Any], width: str) -> str:
    return f"width {vision.get(width)}, patch {vision.get('patch_size')}, {vision.get('image_size')} pixels"


def _mllm(folder: Path, config: dict[str, Any]) -> Folder:
    about = read_provenance(folder)
    vision, text = config.get("vision_config", {}), config.get("text_config", {})
    facts = {
        "tower": vision.get("model_type"),
        "image_size": vision.get("image_size"),
        "llm": text.get("model_type"),
        "parameters": parameters(folder),
        "made_by": about.get("made_by"),
        "stage": about.get("stage"),
    }
    sizes = ", ".join(f"{name} {count:,}" for name, count in facts["parameters"].items())
    origin = ORIGINS.get(facts["stage"] or facts["made_by"], "origin not recorded")
    return Folder("mllm", f"stock {STOCK[config['model_type']]} checkpoint, {origin}: {sizes}", facts)


def _original(folder: Path) -> Folder | None:
    """Recognize a checkpoint of the original LLaVA code."""
    file = folder / "config.json"
    config = read_object(file) if file.is_file() else {}
    projector = (folder / "mm_projector.bin").is_file()
    if not is_original(config) and not projector:
        return None
    full = any(folder.glob("*.safetensors")) or any(folder.glob("pytorch_model*.bin"))
    content = "checkpoint" if full else "projector"
    tower = config.get("mm_vision_tower")
    line = f"{content} of the original LLaVA code, tower {tower}; `convert --to llava` converts it"
    return Folder("mllm", line, {"tower": tower, "original": True})


def _open_clip(folder: Path) -> Folder | None:
    file = folder / "open_clip_config.json"
    if not file.is_file():
        return None
    vision = read_object(file).get("model_cfg", {}).get("vision_cfg", {})
    sizes = _sizes(vision, "width")
    return Folder("encoder", f"open_clip model: {sizes}; `convert --to clips` converts it", {"vision": vision})


def _adapter(folder: Path) -> Folder | None:
    file = folder / "adapter_config.json"
    if not file.is_file():
        return None
    config = read_object(file)
    base, rank = config.get("base_model_name_or_path"), config.get("r")
    if (folder / "non_lora_trainables.bin").is_file():
        line = f"LoRA of the original LLaVA code on {base}; `convert --to llava` converts it"
        return Folder("adapter", line, {"base": base, "rank": rank, "original": True})
    four_bits = (folder / QUANTIZATION_FILE).is_file()
    method = "QLoRA" if four_bits else "DoRA" if config.get("use_dora") else str(config.get("peft_type", "PEFT"))
    line = f"{method} adapter of rank {rank} on {base}; `merge` makes a plain checkpoint of it"
    return Folder("adapter", line, {"base": base, "rank": rank, "method": method})


def _unfinished_run(folder: Path) -> Folder | None:
    if not (folder / "recipe.yaml").is_file():
        return None
    steps = checkpoint_steps(folder)
    last = f"last checkpoint at step {steps[-1]}" if steps else "no checkpoint yet"
    return Folder("run", f"unfinished run, {last}; the same command resumes it", {"checkpoints": steps})


def parameters(folder: Path) -> dict[str, int]:
    """Count parameters by part of the model, from the headers of the safetensors files."""
    from safetensors import SafetensorError, safe_open

    counts: Counter[str] = Counter()
    for file in sorted(folder.glob("model*.safetensors")):
        try:
            with safe_open(file, "np") as tensors:
                for name in tensors.keys():  # noqa: SIM118 (not a mapping)
                    part = next((part for mark, part in PARTS.items() if mark in name), "rest")
                    counts[part] += math.prod(tensors.get_slice(name).get_shape())
        except SafetensorError as error:
            raise UserError(f"not readable as safetensors ({error})", file=file, remedy="create it again") from error
    return dict(counts)
