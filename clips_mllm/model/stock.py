"""Stock LLaVA checkpoints: loaded strictly, every weight from the file."""

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


# Class of the configuration -> those of model and processor.
STOCK: dict[type, tuple[type[AnyModel], type[AnyProcessor]]] = {
    LlavaConfig: (LlavaForConditionalGeneration, LlavaProcessor),
    LlavaNextConfig: (LlavaNextForConditionalGeneration, LlavaNextProcessor),
}


SHARD_FILES = ("model.safetensors", "model.safetensors.index.json")


# Of towers and LLMs only, read as tensors only: Vicuna 1.5 and CLIP L/14 at 336 pixels are published in no other form.
PICKLES = ("pytorch_model.bin", "pytorch_model.bin.index.json")


def check_image_token(tokenizer: PreTrainedTokenizerFast, place: str | Path) -> None:
    """Raise UserError unless `<image>` is a single piece."""
    if len(tokenizer.encode(IMAGE, add_special_tokens=False)) != 1:
        raise UserError(
            f"its tokenizer has no {IMAGE} piece, so images would be read as text",
            file=place,
            remedy="build the checkpoint with `clips-mllm train`, or add the piece to the tokenizer",
        )


def load_stock(
    folder: str | Path,
    *,
    dtype: str | torch.dtype,
    quantize: Quantize | BitsAndBytesConfig = "none",
    place: torch.device | None = None,
) -> tuple[AnyModel, AnyProcessor]:
    """Model and processor of a plain checkpoint, folder or hub id. Arguments as `load_parts`."""
    name = _existing(str(folder), "model")
    _refuse_encoder(Path(name))
    config = read_pretrained(AutoConfig, name)
    if type(config) not in STOCK:
        raise UserError(
            f"a '{config.model_type}' checkpoint, not a LLaVA model", file=folder, remedy="point to a `train` run"
        )
    model_class, processor_class = STOCK[type(config)]
    processor = read_pretrained(processor_class, name)
    check_image_token(processor.tokenizer, folder)
    options: dict[str, Any] = {"use_safetensors": True}  # of a hub's repository, too: pickles are slow and can be code
    if quantize != "none":
        own = dtype if isinstance(dtype, torch.dtype) else config.dtype if dtype == "auto" else getattr(torch, dtype)
        options["quantization_config"] = (
            quantize if isinstance(quantize, BitsAndBytesConfig) else quantization(quantize, own)
        )
        if place is not None:
            options["device_map"] = {"": place}
    return _read_weights(model_class, name, dtype, **options), processor


def is_complete(folder: Path, files: tuple[str, ...] = SHARD_FILES) -> bool:
    """Whether `folder` itself holds a whole checkpoint, with its weights in one of `files`."""
    return (folder / "config.json").is_file() and any((folder / name).is_file() for name in files)


def _existing(name: str, key: str, files: tuple[str, ...] = SHARD_FILES) -> str:
    """A folder with a checkpoint, or a hub id. Anything that looks like a path must exist."""
    path = Path(name)
    if path.is_dir() and not is_complete(path, files):
        raise UserError(
            "no finished checkpoint here (config.json and safetensors)", file=name, remedy="run the stage before first"
        )
    check_model_exists(name, key)
    return name


def _refuse_encoder(folder: Path) -> None:
    """transformers does not know the kind of a pretraining checkpoint, and would advise an upgrade at length."""
    file = folder / "config.json"
    if file.is_file() and '"model_type": "clips"' in file.read_text(encoding="utf-8", errors="replace"):
        raise UserError(
            "a CLIPS encoder, not a multimodal LLM", file=folder, remedy="give the folder of a `clips-mllm train` run"
        )


def _read_weights(kind: Any, name: str, dtype: str | torch.dtype, **options: Any) -> Any:
    """A model, every weight of which came from the checkpoint, in the shape that its config gives."""
    # Other shapes are reported, and refused like the rest; transformers would raise a table of them.
    options |= {"dtype": dtype, "output_loading_info": True, "ignore_mismatched_sizes": True}
    model, info = read_pretrained(kind, name, **options)
    refuse_partial_load(name, info)
    # Under ZeRO-3 transformers also keeps the renamings that this file did not need, and would undo them in the next:
    # `language_model.model.model.…`, which it reads itself, and nobody else.
    if hasattr(model, "_weight_conversions"):
        model._weight_conversions = [renaming for renaming in model._weight_conversions if renaming.was_used()]
    return model
