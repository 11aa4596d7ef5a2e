"""Weights under the names of the original LLaVA code: read part by part, every name used or refused; and written.

model.mm_projector.{0,2}.{weight,bias}   <-->  multi_modal_projector.linear_{1,2}.{weight,bias}
model.vision_tower.vision_tower.*         -->  the tower
model.*, lm_head.*                        -->  the LLM
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from vision_tower.checkpoints.weight_files import read_tensors
from vision_tower.common.errors import UserError
from vision_tower.common.files import read_object

Weights = dict[str, torch.Tensor]

TOWER = "model.vision_tower.vision_tower."
PROJECTOR = "model.mm_projector."
LINEAR = {"0.weight": "linear_1.weight", "0.bias": "linear_1.bias", "2.weight": "linear_2.weight"}
LINEAR["2.bias"] = "linear_2.bias"
INDEXES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
SINGLE = ("model.safetensors", "pytorch_model.bin")


@dataclasses.dataclass(frozen=True)
class OriginalWeights:
    """The parts of a checkpoint: the projector and the tower under stock names, the LLM under its own."""

    projector: Weights
    tower: Weights
    llm: Weights


def weight_files(folder: Path) -> list[Path]:
    """The files of a whole checkpoint, none where there is none. Raises UserError for a file that is missing."""
    for name in INDEXES:
        if (folder / name).is_file():
            files = sorted(set(read_object(folder / name)["weight_map"].values()))
            for file in files:
                if not (folder / file).is_file():
                    raise UserError(f"missing, but named by {name}", file=folder / file, remedy="fetch it again")
            return [folder / file for file in files]
    return [folder / name for name in SINGLE if (folder / name).is_file()][:1]


def read_weights(files: list[Path], prefix: str = "") -> OriginalWeights:
    """All tensors of the files, sorted into parts.

    Args:
        prefix: what stands before every name (`base_model.model.` in a LoRA's files).
    Raises:
        UserError: a name without the prefix, twice the same name, a projector of another form, or what belongs to
            none of the parts.
    """
    state: Weights = {}
    for file in files:
        for name, value in read_tensors(file).items():
            if not name.startswith(prefix):
                raise UserError(
                    f"{name}: expected names that begin with {prefix}", file=file, remedy="give the original file"
                )
            if state.setdefault(name.removeprefix(prefix), value) is not value:
                raise UserError(f"{name}: in more than one file", file=file, remedy="fetch the checkpoint again")
    found = OriginalWeights({}, {}, {})
    for name, value in state.items():
        if name.startswith(PROJECTOR):
            found.projector[_stock_name(files[-1], name)] = value
        elif name.startswith(TOWER):
            found.tower[name.removeprefix(TOWER)] = value
        elif name.startswith(("model.vision", "model.image_newline", "model.mm_")):
            raise UserError(f"{name}: the stock LLaVA model has no place for it", file=files[-1].parent)
        else:
            found.llm[name] = value
    absent = sorted(set(LINEAR.values()) - set(found.projector))
    if absent:
        raise UserError(f"no {PROJECTOR}* for the projector's {absent[0]}", file=files[-1], remedy="it is not whole")
    return found


def _stock_name(file: Path, name: str) -> str:
    stock = LINEAR.get(name.removeprefix(PROJECTOR))
    if stock is None:
        raise UserError(f"{name}: not of an mlp2x_gelu projector, the only one that the stock model has", file=file)
    return stock


def without_rotary(folder: Path, state: Weights, theta: float) -> Weights:
    """Without the frequencies of rotary positions, which old checkpoints hold and transformers computes.

    Raises:
        UserError: frequencies other than `theta` ** (-2i / d), as computed (Su et al., arXiv 2104.09864).
    """
    kept: Weights = {}
    for name, value in state.items():
        if not name.endswith("rotary_emb.inv_freq"):
            kept[name] = value
            continue
        steps = torch.arange(0, 2 * len(value), 2, dtype=torch.float32) / (2 * len(value))
        if not torch.allclose(value.float(), theta**-steps, rtol=1e-2):  # they are kept in half precision
            raise UserError(
                f"{name}: not those of rope_theta={theta}", file=folder, remedy="its config is another model's"
            )
    return kept


# --- out


def write_projector(source: Path, folder: Path, tower: str | None) -> None:
    """mm_projector.bin and the config.json that belongs to it, from a stock checkpoint or an adapter.

    Args:
        tower: name that the original code shall find the vision tower by.
    Raises:
        UserError: no stock LLaVA checkpoint there, or one that reads its tower in a way the original code cannot.
    """
    from transformers import AutoConfig, LlavaConfig, LlavaNextConfig

    from clips_mllm.model.adapters import is_adapter, read_config
    from vision_tower.checkpoints.loading import read_pretrained

    adapter = is_adapter(source)
    base = Path(str(read_config(source).base_model_name_or_path)) if adapter else source
    config = read_pretrained(AutoConfig, base)
    if isinstance(config, LlavaNextConfig):
        raise UserError(
            "shows images in tiles (LLaVA-NeXT), and mm_projector.bin has no place for the end of their rows",
            file=source,
            remedy="give a run without model.tiles",
        )
    if not isinstance(config, LlavaConfig):
        raise UserError(
            f"a '{config.model_type}' checkpoint, not a stock LLaVA model", file=source, remedy="give a `train` run"
        )
    if not isinstance(config.vision_feature_layer, int):
        raise UserError(
            f"its projector reads the hidden states {config.vision_feature_layer} of the tower, the original code one",
            file=source,
            remedy="give a run with a single model.feature_layer",
        )
    names = {stock: f"{PROJECTOR}{original}" for original, stock in LINEAR.items()}
    own = dict(_stock_projector([source / "adapter_model.safetensors"])) if adapter else {}  # none where it was frozen
    found = {names[name]: value for name, value in (own or dict(_stock_projector(weight_files(base)))).items()}
    if set(found) != set(names.values()):
        raise UserError(f"its projector has {len(found)} of 4 weights", file=source, remedy="save the checkpoint again")
    torch.save(found, folder / "mm_projector.bin")
    _write_config(config, folder / "config.json", source, tower)


def _stock_projector(files: list[Path]) -> Iterator[tuple[str, torch.Tensor]]:
    """The projector's weights alone, without reading the LLM's."""
    from safetensors import safe_open

    for file in files:
        with safe_open(file, "pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 (not a mapping)
                _, found, part = name.rpartition("multi_modal_projector.")
                if found:
                    yield part, tensors.get_tensor(name)


def _write_config(config: Any, file: Path, source: Path, tower: str | None) -> None:
    import json

    from transformers import LlavaProcessor

    from clips_mllm.formats.original_config import FEATURES, LLMS
    from vision_tower.checkpoints.loading import read_pretrained
    from vision_tower.common.files import write_text

    classes = {llm: name for name, llm in LLMS.items() if name != "llava"}
    own = classes.get(config.text_config.model_type)
    if own is None:
        raise UserError(f"the original code has no class for the LLM '{config.text_config.model_type}'", file=source)
    selects = {ours: theirs for theirs, ours in FEATURES.items()}
    pads = getattr(read_pretrained(LlavaProcessor, source).image_processor, "do_pad", False)
    values = config.text_config.to_dict() | {
        "model_type": own,
        "mm_projector_type": "mlp2x_gelu",
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
