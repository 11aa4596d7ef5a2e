"""Strict loading of stock LLaVA checkpoints: every weight comes from the file."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import (
    AutoConfig,
    BitsAndBytesConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextProcessor,
    LlavaProcessor,
)

from clips_mllm.model.quantize import Quantize, quantization
from clips_mllm.model.tiles import AnyModel, AnyProcessor
from clips_mllm.prompts.conversation import IMAGE
from vision_tower.checkpoints.loading import read_pretrained, refuse_partial_load
from vision_tower.common.errors import UserError
from vision_tower.common.files import check_model_exists

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


# Config class -> model class, processor class.
STOCK: dict[type, tuple[type[AnyModel], type[AnyProcessor]]] = {
    LlavaConfig: (LlavaForConditionalGeneration, LlavaProcessor),
    LlavaNextConfig: (LlavaNextForConditionalGeneration, LlavaNextProcessor),
}


SHARD_FILES = ("model.safetensors", "model.safetensors.index.json")


# For towers and LLMs only, and tensors only: Vicuna 1.5 and CLIP L/14 at 336 pixels are published only in this form.
PICKLES = ("pytorch_model.bin", "pytorch_model.bin.index.json")


def check_image_token(tokenizer: PreTrainedTokenizerFast, source: str | Path) -> None:
    """Raise UserError unless `<image>` is a single token."""
    if len(tokenizer.encode(IMAGE, add_special_tokens=False)) != 1:
        remedy = "build the checkpoint with `clips-mllm train`, or add the token to the tokenizer"
        raise UserError(f"its tokenizer has no {IMAGE} token", file=source, remedy=remedy)


def load_stock(
    folder: str | Path,
    *,
    dtype: str | torch.dtype,
    quantize: Quantize | BitsAndBytesConfig = "none",
    device: torch.device | None = None,
) -> tuple[AnyModel, AnyProcessor]:
    """Load model and processor of a folder or hub id that is not an adapter. Arguments as in `load_parts`."""
    name = _existing(str(folder), "model")
    _refuse_encoder(Path(name))
    config = read_pretrained(AutoConfig, name)
    if type(config) not in STOCK:
        raise UserError(
            "not a LLaVA model", file=folder, key="model_type", value=config.model_type, remedy="name a `train` run"
        )
    model_class, processor_class = STOCK[type(config)]
    processor = read_pretrained(processor_class, name)
    check_image_token(processor.tokenizer, folder)
    options: dict[str, Any] = {"use_safetensors": True}  # also on the hub: pickles are slow and can contain code
    if quantize != "none":
        own = dtype if isinstance(dtype, torch.dtype) else config.dtype if dtype == "auto" else getattr(torch, dtype)
        options["quantization_config"] = (
            quantize if isinstance(quantize, BitsAndBytesConfig) else quantization(quantize, own)
        )
        if device is not None:
            options["device_map"] = {"": device}
    return _read_weights(model_class, name, dtype, **options), processor


def is_complete(folder: Path, files: tuple[str, ...] = SHARD_FILES) -> bool:
    """Return True if `folder` contains a complete checkpoint, with weights in one of `files`."""
    return (folder / "config.json").is_file() and any((folder / name).is_file() for name in files)


def _existing(name: str, key: str, files: tuple[str, ...] = SHARD_FILES) -> str:
    """Return `name`, a hub id or a folder with a complete checkpoint. Raises UserError for anything else."""
    path = Path(name)
    if path.is_dir() and not is_complete(path, files):
        raise UserError(
            "no complete checkpoint (config.json and safetensors)", file=name, remedy="finish the previous stage first"
        )
    check_model_exists(name, key)
    return name


def _refuse_encoder(folder: Path) -> None:
    """Raise UserError for a pretraining checkpoint, for which transformers would advise an upgrade."""
    file = folder / "config.json"
    if file.is_file() and '"model_type": "clips"' in file.read_text(encoding="utf-8", errors="replace"):
        raise UserError("a CLIPS encoder, not a multimodal LLM", file=folder, remedy="name a `train` run")


def _read_weights(kind: Any, name: str, dtype: str | torch.dtype, **options: Any) -> Any:
    """Load a model; raise UserError unless every weight is in the checkpoint, in the shape of the config."""
    # With `ignore_mismatched_sizes`, other shapes are reported in `info` and refused with the rest.
    options |= {"dtype": dtype, "output_loading_info": True, "ignore_mismatched_sizes": True}
    model, info = read_pretrained(kind, name, **options)
    refuse_partial_load(name, info)
    # transformers 5.23 keeps the key renamings of the load for the next save. Under ZeRO-3 it also keeps those that the
    # file did not need, and the saved keys would be `language_model.model.model.…`, which other readers do not accept.
    if hasattr(model, "_weight_conversions"):
        model._weight_conversions = [renaming for renaming in model._weight_conversions if renaming.was_used()]
    return model
