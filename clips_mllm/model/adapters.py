"""PEFT adapters: attach to a frozen base for training, save, load and merge.

    base checkpoint --add_adapter--> PeftModel --save_adapter--> adapter folder
    adapter folder  --load_adapter-> stock LLaVA model (merged, or unmerged on a 4- or 8-bit base)

An adapter folder contains `adapter_config.json` with the name of the base, `adapter_model.safetensors` with low-rank
matrices *and the complete projector* (including `image_newline`, with tiles), processor, template and generation
settings, and `quantization.json` if the base was in 4 bits during training.
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
from clips_mllm.model.tiles import (
    AnyModel,
    AnyProcessor,
    register_image_newline,
    unregister_image_newline,
    use_registered_image_newline,
)
from vision_tower.checkpoints.loading import read_pretrained
from vision_tower.common.errors import UserError

if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel

CONFIG = "adapter_config.json"
PROJECTOR = "multi_modal_projector"
IMAGE_NEWLINE = "image_newline"


def is_adapter(folder: str | Path) -> bool:
    """Return True if `folder` contains an adapter's configuration file."""
    return (Path(folder) / CONFIG).is_file()


def find_adapter(name: str) -> Path | None:
    """Return the folder of an adapter, downloaded if `name` is a hub id; None if `name` is not an adapter.

    Raises:
        UserError: the download failed.
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
        raise UserError(
            f"the adapter cannot be downloaded ({error})", file=name, remedy="check the connection, or name a folder"
        ) from error


def add_adapter(model: AnyModel, adapter: AdapterRecipe, modules: list[str], *, projector: bool) -> PeftModel:
    """Freeze the model and add trainable low-rank matrices to its linear layers `modules`.

    With `projector`, PEFT trains a copy of the projector and saves it with the adapter, including `image_newline`.
    """
    from peft import LoraConfig, get_peft_model

    name = model.name_or_path
    base = os.path.abspath(name) if Path(name).is_dir() else name  # works from any directory
    config = LoraConfig(
        r=adapter.rank,
        lora_alpha=adapter.alpha,
        lora_dropout=adapter.dropout,
        use_dora=adapter.kind == "dora",
        target_modules=modules,
        modules_to_save=[PROJECTOR] if projector else None,
    )
    if projector:
        register_image_newline(model)
    joined = get_peft_model(model, config, autocast_adapter_dtype=False)
    config.base_model_name_or_path = base  # after get_peft_model, which sets the name as given
    if projector:
        use_registered_image_newline(model)
    return joined  # type: ignore[return-value]


def save_adapter(model: PeftModel, processor: AnyProcessor, folder: Path, state: Any = None) -> None:
    """Write an adapter folder. `state` is the gathered state dict under ZeRO."""
    base: Any = model.get_base_model()
    # By default PEFT checks for resized embeddings, with a request to the hub at every save.
    model.save_pretrained(str(folder), state_dict=state, save_embedding_layers=False)
    processor.save_pretrained(folder)
    base.generation_config.save_pretrained(folder)
    quantization = getattr(base.config, "quantization_config", None)
    if quantization is not None:
        quantization.to_json_file(folder / QUANTIZATION_FILE)


def load_adapter(
    folder: str | Path, *, dtype: str | torch.dtype, quantize: Quantize, device: torch.device | None = None
) -> tuple[AnyModel, AnyProcessor]:
    """Load the base with the adapter applied, and the adapter's processor.

    Without quantization the adapter is merged, as in `clips-mllm merge`. An adapter trained on 4-bit weights is merged
    into their dequantized values, which it was trained to correct.

    Raises:
        UserError: the base is missing or has other shapes.
    """
    config = read_config(folder)
    base, trained = str(config.base_model_name_or_path), read_quantization(Path(folder))
    if quantize == "8bit" and getattr(config, "use_dora", False):  # not a field of other kinds of adapters
        raise UserError("PEFT has no DoRA on 8-bit weights", file=folder, remedy="use 4bit, or merge the adapter first")
    if quantize != "none":
        model, processor = load_stock(base, dtype=dtype, quantize=quantize, device=device)
    elif trained is not None:
        # On the CPU: a model that fits a GPU in 4 bits may be too large for it in 16.
        model, processor = load_stock(base, dtype=dtype, quantize=trained, device=torch.device("cpu"))
        model = model.dequantize(dtype=model.dtype)
    else:
        model, processor = load_stock(base, dtype=dtype)
    joined = _attach(model, folder)
    merged = joined.get_base_model() if quantize != "none" else joined.merge_and_unload()
    if quantize == "none" and _has_image_newline(folder):
        unregister_image_newline(merged)
    if (Path(folder) / "generation_config.json").is_file():
        merged.generation_config = GenerationConfig.from_pretrained(folder)
    processor = read_pretrained(type(processor), folder)  # the adapter's, in the class of the base's
    check_image_token(processor.tokenizer, folder)
    return merged, processor


def read_config(folder: str | Path) -> PeftConfig:
    """Read the adapter's configuration. Raises UserError if it, or the base that it names, is missing."""
    from peft import PeftConfig

    try:
        config = PeftConfig.from_pretrained(str(folder))
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UserError(f"cannot be read ({error})", file=Path(folder) / CONFIG, remedy="save it again") from error
    base = config.base_model_name_or_path
    if not base or (Path(base).is_absolute() and not Path(base).is_dir()):
        remedy = "restore the base, or enter its new path"
        raise UserError(
            "no such folder", file=Path(folder) / CONFIG, key="base_model_name_or_path", value=base, remedy=remedy
        )
    return config


def _attach(model: AnyModel, folder: str | Path) -> PeftModel:
    """Attach an adapter to the model, with every adapter weight from the file."""
    from peft import PeftConfig, PeftModel
    from safetensors import SafetensorError

    try:
        own_image_newline = _has_image_newline(folder)
        if own_image_newline:
            register_image_newline(model)
        joined = PeftModel(model, PeftConfig.from_pretrained(str(folder)))
        if own_image_newline:
            use_registered_image_newline(model)
        read_into(joined, folder)
    except (RuntimeError, ValueError, OSError, SafetensorError) as error:
        if isinstance(error, UserError):
            raise
        reason = " ".join(str(error).split())[:300]
        raise UserError(
            f"does not match its base ({reason}): the base has changed, or the file is damaged",
            file=folder,
            remedy=f"name the original base in {CONFIG}, or train the adapter again",
        ) from error
    return joined


def _keys(folder: str | Path) -> set[str]:
    """Return the names of an adapter's weights."""
    from safetensors import safe_open

    with safe_open(Path(folder) / "adapter_model.safetensors", "pt") as file:
        return set(file.keys())


def _has_image_newline(folder: str | Path) -> bool:
    """Return True if the adapter contains `image_newline`; those of other training code may not."""
    return any(key.endswith(f"{PROJECTOR}.{IMAGE_NEWLINE}") for key in _keys(folder))


def refuse_other_keys(model: PeftModel, folder: str | Path) -> None:
    """Raise UserError if the file in `folder` has other weights than the adapter in `model`."""
    from peft import get_peft_model_state_dict

    expected = set(get_peft_model_state_dict(model, save_embedding_layers=False))
    differing = sorted(_keys(folder) ^ expected)
    if differing:
        raise UserError(
            f"{len(differing)} weights are missing or unexpected (first: {differing[0]})",
            file=folder,
            remedy="save the adapter again from its run; it is incomplete or belongs to another base",
        )


def read_into(model: PeftModel, folder: str | Path) -> None:
    """Load the weights of a checkpoint into the adapter."""
    from peft import load_peft_weights, set_peft_model_state_dict

    refuse_other_keys(model, folder)
    set_peft_model_state_dict(model, load_peft_weights(str(folder), device="cpu"))
