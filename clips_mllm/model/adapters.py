"""PEFT adapters: put beside frozen weights for training, saved whole, joined with their base again.

    base checkpoint --add_adapter--> PeftModel --save_adapter--> adapter folder
    adapter folder  --load_adapter-> stock LLaVA model (merged; beside its weights where these are in 4 or 8 bits)

An adapter folder holds `adapter_config.json`, which names the base, `adapter_model.safetensors` with the low-rank
matrices *and the whole projector* (in it, with tiles, the vector that ends a row), processor, template and generation
settings, and, where the base was in 4 bits while the adapter trained, `quantization.json`.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import GenerationConfig

from clips_mllm.model.quantize import QUANTIZATION_FILE, Quantize, read_quantization
from clips_mllm.model.recipe import AdapterRecipe
from clips_mllm.model.stock import check_image_token, load_stock
from clips_mllm.model.tiles import AnyModel, AnyProcessor, follow_row_end, lend_row_end, take_row_end_back
from vision_tower.checkpoints.loading import read_pretrained
from vision_tower.common.errors import UserError

if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel

CONFIG = "adapter_config.json"
PROJECTOR = "multi_modal_projector"
ROW_END = "image_newline"


def is_adapter(folder: str | Path) -> bool:
    """Whether `folder` holds an adapter, by the file that makes it one."""
    return (Path(folder) / CONFIG).is_file()


def find_adapter(name: str) -> Path | None:
    """The folder of the adapter at `name`, fetched where that is a hub id; None where something else is there.

    Raises:
        UserError: an adapter that the hub does not hand out.
    """
    from huggingface_hub import snapshot_download
    from transformers.utils.peft_utils import find_adapter_config_file

    if Path(name).is_dir():
        return Path(name) if is_adapter(name) else None
    if find_adapter_config_file(name) is None:
        return None
    try:
        return Path(snapshot_download(name))
    except (OSError, ValueError) as error:
        raise UserError(f"the adapter cannot be fetched ({error})", file=name, remedy="give its folder") from error


def add_adapter(model: AnyModel, adapter: AdapterRecipe, modules: list[str], *, projector: bool) -> PeftModel:
    """Freeze the model, and put trainable low-rank matrices beside its linear layers `modules`.

    The projector, where it trains, does so by a copy of its weights, which is saved with the adapter; so does the end
    of a row of patches where images are in tiles.
    """
    from peft import LoraConfig, get_peft_model

    name = model.name_or_path
    base = os.path.abspath(name) if Path(name).is_dir() else name  # an adapter is read from any working directory
    config = LoraConfig(
        r=adapter.rank,
        lora_alpha=adapter.alpha,
        lora_dropout=adapter.dropout,
        use_dora=adapter.kind == "dora",
        target_modules=modules,
        modules_to_save=[PROJECTOR] if projector else None,
    )
    if projector:
        lend_row_end(model)
    joined = get_peft_model(model, config, autocast_adapter_dtype=False)
    config.base_model_name_or_path = base  # only now: PEFT puts the model's own name there, as it was given
    if projector:
        follow_row_end(model)
    return joined  # type: ignore[return-value]


def save_adapter(model: PeftModel, processor: AnyProcessor, folder: Path, state: Any = None) -> None:
    """Everything an adapter folder holds but for the base; `state` is the gathered state dict where ZeRO divides it."""
    base: Any = model.get_base_model()
    # Told not to look for resized embeddings: it would ask the hub about the base at every save.
    model.save_pretrained(str(folder), state_dict=state, save_embedding_layers=False)
    processor.save_pretrained(folder)
    base.generation_config.save_pretrained(folder)
    quantization = getattr(base.config, "quantization_config", None)
    if quantization is not None:
        quantization.to_json_file(folder / QUANTIZATION_FILE)


def load_adapter(
    folder: str | Path, *, dtype: str | torch.dtype, quantize: Quantize, place: torch.device | None = None
) -> tuple[AnyModel, AnyProcessor]:
    """The base with the adapter in it, and the adapter's processor.

    Without quantisation the adapter is merged, as `clips-mllm merge` does it: into the base's own weights, or, where it
    trained beside 4-bit weights, into what those stand for, since that is what it learnt to correct.

    Raises:
        UserError: no base where the adapter says it is, or one of other shapes.
    """
    config = read_config(folder)
    base, trained = str(config.base_model_name_or_path), read_quantization(Path(folder))
    if quantize == "8bit" and getattr(config, "use_dora", False):  # other kinds of adapter have no such field
        raise UserError(
            "PEFT cannot put a DoRA adapter beside 8-bit weights", file=folder, remedy="take 4bit, or merge it first"
        )
    if quantize != "none":
        model, processor = load_stock(base, dtype=dtype, quantize=quantize, place=place)
    elif trained is not None:
        # What fitted a GPU in 4 bits need not fit it in 16.
        model, processor = load_stock(base, dtype=dtype, quantize=trained, place=torch.device("cpu"))
        model = model.dequantize(dtype=model.dtype)
    else:
        model, processor = load_stock(base, dtype=dtype)
    joined = _attach(model, folder)
    merged = joined.get_base_model() if quantize != "none" else joined.merge_and_unload()
    if quantize == "none" and _has_row_end(folder):
        take_row_end_back(merged)
    if (Path(folder) / "generation_config.json").is_file():
        merged.generation_config = GenerationConfig.from_pretrained(folder)
    processor = read_pretrained(type(processor), folder)  # its own, of the base's class
    check_image_token(processor.tokenizer, folder)
    return merged, processor


def read_config(folder: str | Path) -> PeftConfig:
    """The adapter's configuration, which names its base. Raises UserError where that is not there."""
    from peft import PeftConfig

    try:
        config = PeftConfig.from_pretrained(str(folder))
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UserError(
            f"cannot be read ({error})", file=Path(folder) / CONFIG, remedy="save the adapter again"
        ) from error
    base = config.base_model_name_or_path
    if not base or (Path(base).is_absolute() and not Path(base).is_dir()):
        raise UserError(
            f"its base {base} is not there",
            file=Path(folder) / CONFIG,
            remedy="put it back, or write where it is now into base_model_name_or_path",
        )
    return config


def _attach(model: AnyModel, folder: str | Path) -> PeftModel:
    """The adapter beside the model's weights, every one of its own read from the file."""
    from peft import PeftConfig, PeftModel
    from safetensors import SafetensorError

    try:
        own_row_end = _has_row_end(folder)
        if own_row_end:
            lend_row_end(model)
        joined = PeftModel(model, PeftConfig.from_pretrained(str(folder)))
        if own_row_end:
            follow_row_end(model)
        read_into(joined, folder)
    except (RuntimeError, ValueError, OSError, SafetensorError) as error:
        if isinstance(error, UserError):
            raise
        said = " ".join(str(error).split())[:300]
        raise UserError(
            f"does not fit its base ({said})",
            file=folder,
            remedy="the base has changed since, or the file is damaged: train it again on this base, or "
            "name the old one in adapter_config.json",
        ) from error
    return joined


def _keys(folder: str | Path) -> set[str]:
    """Names of the weights of an adapter."""
    from safetensors import safe_open

    with safe_open(Path(folder) / "adapter_model.safetensors", "pt") as file:
        return set(file.keys())


def _has_row_end(folder: str | Path) -> bool:
    """Whether it trained one; adapters of other training code may not."""
    return any(key.endswith(f"{PROJECTOR}.{ROW_END}") for key in _keys(folder))


def refuse_other_keys(model: PeftModel, folder: str | Path) -> None:
    """Raise UserError where the file in `folder` has other weights than the adapter in `model`."""
    from peft import get_peft_model_state_dict

    there = _keys(folder)
    wanted = set(get_peft_model_state_dict(model, save_embedding_layers=False))
    if there != wanted:
        odd = sorted(there ^ wanted)
        raise UserError(
            f"{len(odd)} weights are missing or unexpected (first: {odd[0]})",
            file=folder,
            remedy="the adapter is incomplete or belongs to another base, save it again from its run",
        )


def read_into(model: PeftModel, folder: str | Path) -> None:
    """The weights of a checkpoint into the adapter that trains."""
    from peft import load_peft_weights, set_peft_model_state_dict

    refuse_other_keys(model, folder)
    set_peft_model_state_dict(model, load_peft_weights(str(folder), device="cpu"))
