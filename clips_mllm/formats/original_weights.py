"""Read and write weights under the names of the original LLaVA code; unknown names are refused.

model.mm_projector.{0,2}.{weight,bias}   <-->  multi_modal_projector.linear_{1,2}.{weight,bias}
model.vision_tower.vision_tower.*         -->  the tower
model.*, lm_head.*                        -->  the LLM
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from clips_mllm.formats.original_config import FEATURES, LLMS, PROJECTOR_TYPE
from vision_tower.checkpoints.weight_files import read_tensors
from vision_tower.common.errors import UserError
from vision_tower.common.files import read_object, write_text

Weights = dict[str, torch.Tensor]

TOWER = "model.vision_tower.vision_tower."
PROJECTOR = "model.mm_projector."
LINEAR = {"0.weight": "linear_1.weight", "0.bias": "linear_1.bias", "2.weight": "linear_2.weight"}
LINEAR["2.bias"] = "linear_2.bias"
INDEXES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
SINGLE = ("model.safetensors", "pytorch_model.bin")
NO_WAY = "this checkpoint cannot be converted"


@dataclasses.dataclass(frozen=True)
class OriginalWeights:
    """Weights of a checkpoint by part: projector and tower under stock names, the LLM under its own."""

    projector: Weights
    tower: Weights
    llm: Weights


def weight_files(folder: Path) -> list[Path]:
    """List the weight files of a full checkpoint; empty if there are none. Raises UserError for a missing shard."""
    for name in INDEXES:
        if (folder / name).is_file():
            files = sorted(set(read_object(folder / name)["weight_map"].values()))
            for file in files:
                if not (folder / file).is_file():
                    raise UserError(f"no such file, but {name} names it", file=folder / file, remedy="download it")
            return [folder / file for file in files]
    return [folder / name for name in SINGLE if (folder / name).is_file()][:1]


def read_weights(files: list[Path], prefix: str = "") -> OriginalWeights:
    """Read all tensors of the files, sorted into parts.

    Args:
        prefix: removed from every name, such as `base_model.model.` in a LoRA's files.
    Raises:
        UserError: a name without the prefix or in two files, a projector of another type, or a weight that the stock
            LLaVA model does not have.
    """
    state: Weights = {}
    for file in files:
        for name, value in read_tensors(file).items():
            if not name.startswith(prefix):
                raise UserError(f"names must begin with {prefix}", file=file, key=name, remedy="give the original file")
            if state.setdefault(name.removeprefix(prefix), value) is not value:
                raise UserError("in more than one file", file=file, key=name, remedy="download the checkpoint again")
    found = OriginalWeights({}, {}, {})
    for name, value in state.items():
        if name.startswith(PROJECTOR):
            found.projector[_stock_name(files[-1], name)] = value
        elif name.startswith(TOWER):
            found.tower[name.removeprefix(TOWER)] = value
        elif name.startswith(("model.vision", "model.image_newline", "model.mm_")):
            raise UserError("the stock LLaVA model has no such weight", file=files[-1].parent, key=name, remedy=NO_WAY)
        else:
            found.llm[name] = value
    absent = sorted(set(LINEAR.values()) - set(found.projector))
    if absent:
        raise UserError(
            f"no such weight of the projector under {PROJECTOR}*",
            file=files[-1],
            key=f"projector.{absent[0]}",
            remedy="the file is incomplete: download it again",
        )
    return found


def _stock_name(file: Path, name: str) -> str:
    stock = LINEAR.get(name.removeprefix(PROJECTOR))
    if stock is None:
        raise UserError("the stock LLaVA model supports only mlp2x_gelu projectors", file=file, key=name, remedy=NO_WAY)
    return stock


def without_rotary(folder: Path, state: Weights, theta: float) -> Weights:
    """Remove the rotary frequencies, which old checkpoints contain and transformers computes.

    Raises:
        UserError: frequencies other than `theta` ** (-2i / d) (Su et al., arXiv 2104.09864).
    """
    kept: Weights = {}
    for name, value in state.items():
        if not name.endswith("rotary_emb.inv_freq"):
            kept[name] = value
            continue
        steps = torch.arange(0, 2 * len(value), 2, dtype=torch.float32) / (2 * len(value))
        if not torch.allclose(value.float(), theta**-steps, rtol=1e-2):  # stored in half precision
            remedy = "config.json belongs to another model: download both again"
            raise UserError(f"not the frequencies of rope_theta={theta}", file=folder, key=name, remedy=remedy)
    return kept


# --- writing


def write_projector(source: Path, folder: Path, tower: str | None) -> None:
    """Write the projector of a stock checkpoint or adapter as mm_projector.bin, with a config.json.

    Args:
        tower: path or hub id of the vision tower, for the config.
    Raises:
        UserError: not a stock LLaVA checkpoint, or one with features that the original code lacks.
    """
    from transformers import AutoConfig, LlavaConfig, LlavaNextConfig

    from clips_mllm.model.adapters import is_adapter, read_config
    from vision_tower.checkpoints.loading import read_pretrained

    adapter = is_adapter(source)
    base = Path(str(read_config(source).base_model_name_or_path)) if adapter else source
    config = read_pretrained(AutoConfig, base)
    if isinstance(config, LlavaNextConfig):
        raise UserError(
            "a LLaVA-NeXT model with tiles; mm_projector.bin cannot store its newline embedding",
            file=source,
            key="model_type",
            value=config.model_type,
            remedy="give a run without model.tiles",
        )
    if not isinstance(config, LlavaConfig):
        raise UserError(
            "not stock LLaVA", file=source, key="model_type", value=config.model_type, remedy="give a `train` run"
        )
    if not isinstance(config.vision_feature_layer, int):
        raise UserError(
            "the original code reads one hidden state of the tower",
            file=source,
            key="vision_feature_layer",
            value=config.vision_feature_layer,
            remedy="give a run with a single model.feature_layer",
        )
    names = {stock: f"{PROJECTOR}{original}" for original, stock in LINEAR.items()}
    # An adapter folder has no projector weights if the projector was frozen: then those of the base are used.
    own = dict(_stock_projector([source / "adapter_model.safetensors"])) if adapter else {}
    found = {names[name]: value for name, value in (own or dict(_stock_projector(weight_files(base)))).items()}
    if set(found) != set(names.values()):
        raise UserError(f"its projector has {len(found)} of {len(names)} weights", file=source, remedy="save it again")
    torch.save(found, folder / "mm_projector.bin")
    _write_config(config, folder / "config.json", source, tower)


def _stock_projector(files: list[Path]) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the weights of the projector; the LLM's are not read."""
    from safetensors import safe_open

    for file in files:
        with safe_open(file, "pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 (not a mapping)
                _, found, part = name.rpartition("multi_modal_projector.")
                if found:
                    yield part, tensors.get_tensor(name)


def _write_config(config: Any, file: Path, source: Path, tower: str | None) -> None:
    from transformers import LlavaProcessor

    from vision_tower.checkpoints.loading import read_pretrained

    classes = {llm: name for name, llm in LLMS.items() if name != "llava"}
    own = classes.get(config.text_config.model_type)
    if own is None:
        raise UserError(
            "the original LLaVA code has no class for this LLM",
            file=source,
            key="text_config.model_type",
            value=config.text_config.model_type,
            remedy=f"the LLM must be one of {', '.join(classes)}",
        )
    selects = {ours: theirs for theirs, ours in FEATURES.items()}
    pads = getattr(read_pretrained(LlavaProcessor, source).image_processor, "do_pad", False)
    values = config.text_config.to_dict() | {
        "model_type": own,
        "mm_projector_type": PROJECTOR_TYPE,
        "mm_hidden_size": config.vision_config.hidden_size,
        "mm_vision_select_layer": config.vision_feature_layer,
        "mm_vision_select_feature": selects[config.vision_feature_select_strategy],
        "image_aspect_ratio": "pad" if pads else "square",
        "mm_use_im_start_end": False,
        "mm_use_im_patch_token": False,
        "use_mm_proj": True,
    }
    if tower is not None:
        values["mm_vision_tower"] = tower
    write_text(file, json.dumps(values, indent=2) + "\n")
