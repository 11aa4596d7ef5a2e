"""MLLM checkpoints: stock classes only, built from a tower and an LLM, loaded strictly, saved whole."""

from __future__ import annotations

import dataclasses
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    CLIPVisionModel,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextProcessor,
    LlavaProcessor,
    PreTrainedModel,
    SiglipVisionModel,
)

from clips_mllm.prompts import IMAGE
from clips_mllm.quantize import Quantize, quantization
from clips_mllm.tiles import AnyModel, AnyProcessor, with_tiles
from clips_mllm.towers import (
    FeatureSelect,
    additional_tokens,
    at_size,
    check_tower,
    feature_selection,
    resize_processor,
)
from clips_mllm.train_recipe import check_feature_layer
from vision_tower.encoder import choose_device, make_readable
from vision_tower.errors import UserError
from vision_tower.files import check_model_exists
from vision_tower.loading import read_pretrained, refuse_partial_load

if TYPE_CHECKING:
    from transformers import BaseImageProcessor, PreTrainedTokenizerFast

# Checkpoints of two towers, of which the vision tower alone is read.
VISION_HALVES: dict[str, type[PreTrainedModel]] = {"clip": CLIPVisionModel, "siglip": SiglipVisionModel}
# Class of the configuration -> those of model and processor.
STOCK: dict[type, tuple[type[AnyModel], type[AnyProcessor]]] = {
    LlavaConfig: (LlavaForConditionalGeneration, LlavaProcessor),
    LlavaNextConfig: (LlavaNextForConditionalGeneration, LlavaNextProcessor),
}
# What some causal LMs (Gemma 2, Cohere, Granite) do to the logits, and LLaVA's class does not.
SCALED_LOGITS = ("final_logit_softcapping", "logit_scale", "logits_scaling")
SHARD_FILES = ("model.safetensors", "model.safetensors.index.json")
# Of towers and LLMs only, read as tensors only: Vicuna 1.5 and CLIP L/14 at 336 pixels are published in no other form.
PICKLES = ("pytorch_model.bin", "pytorch_model.bin.index.json")


@dataclasses.dataclass
class Mllm:
    """A model with its processor; `processor` pads on the left, as generation needs."""

    model: AnyModel
    processor: AnyProcessor
    device: torch.device

    @property
    def tokenizer(self) -> PreTrainedTokenizerFast:
        """The processor's tokenizer."""
        return self.processor.tokenizer


def build_mllm(
    tower: str,
    llm: str,
    *,
    feature_layer: int | list[int],
    feature_select: Literal["auto", "full", "default"],
    dtype: torch.dtype,
    image_size: int | None = None,
    tiles: int | None = None,
) -> tuple[AnyModel, AnyProcessor]:
    """Join a pretrained tower and LLM with a fresh projector; with `tiles` in LLaVA-NeXT's classes.

    Raises:
        UserError: a folder without a checkpoint, weights that do not fit their class, or tiles with a class token.
    """
    vision, image_processor = read_tower(tower, dtype)
    selection = feature_selection(tower, vision.config, feature_select)
    if tiles is not None and selection == "full" and additional_tokens(vision.config):
        raise UserError("model.tiles: tiles are joined by their patches alone; take model.feature_select=auto")
    if image_size is not None:
        vision = at_size(vision, image_size)
        resize_processor(image_processor, image_size)
    language, tokenizer = read_llm(llm, dtype)
    model, processor = join_parts(
        vision, image_processor, language, tokenizer, feature_layer=feature_layer, feature_select=selection
    )
    return (model, processor) if tiles is None else with_tiles(model, processor, tiles)


def read_tower(tower: str, dtype: str | torch.dtype) -> tuple[Any, BaseImageProcessor]:
    """A stock vision tower and its image processor. Raises UserError where either is missing or does not fit."""
    config = read_pretrained(AutoConfig, _existing(tower, "model.tower", SHARD_FILES + PICKLES))
    if config.model_type not in VISION_HALVES:
        check_tower(tower, config)
    if half := VISION_HALVES.get(config.model_type):
        vision, info = read_pretrained(half, tower, dtype=dtype, output_loading_info=True)
        refuse_partial_load(tower, info | {"unexpected_keys": ()})  # the text tower
    else:
        vision = _read_weights(AutoModel, tower, dtype)
    return vision, read_pretrained(AutoImageProcessor, tower)


def read_llm(llm: str, dtype: str | torch.dtype) -> tuple[Any, PreTrainedTokenizerFast]:
    """A causal LM and its tokenizer. Raises UserError where either is missing or does not fit."""
    config = read_pretrained(AutoConfig, _existing(llm, "model.llm", SHARD_FILES + PICKLES))
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise UserError(
            f"{llm}: a '{config.model_type}' checkpoint, not a causal LM; give one of the LLaMA family, or a stage's "
            "checkpoint as model.checkpoint"
        )
    language = _read_weights(AutoModelForCausalLM, llm, dtype)
    scaled = next((name for name in SCALED_LOGITS if getattr(config, name, None) not in (None, 1)), None)
    if scaled is not None or not hasattr(getattr(language, "model", None), "embed_tokens"):
        why = f"its '{scaled}' would be lost" if scaled is not None else "it is built in another way"
        raise UserError(
            f"{llm}: a '{config.model_type}' model does not fit into stock LLaVA ({why}); give an LLM of the LLaMA "
            "family: LLaMA, Mistral, Qwen2, Qwen3, SmolLM"
        )
    return language, read_pretrained(AutoTokenizer, llm)


def join_parts(
    vision: Any,
    image_processor: Any,
    language: Any,
    tokenizer: PreTrainedTokenizerFast,
    *,
    feature_layer: int | list[int],
    feature_select: FeatureSelect,
) -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    """The stock model around a tower and a causal LM, in the LLM's dtype, with a fresh projector; and its processor.

    Raises:
        UserError: the tower has no such layer.
    """
    check_feature_layer(feature_layer, vision.config.num_hidden_layers)
    if tokenizer.pad_token is None:  # LLaMA-3 has none; padded positions are masked and never learnt
        tokenizer.pad_token = tokenizer.eos_token
    image_id = add_image_token(tokenizer)
    if image_id >= language.get_input_embeddings().num_embeddings:
        language.resize_token_embeddings(len(tokenizer), pad_to_multiple_of=64, mean_resizing=False)
    patches = (vision.config.image_size // vision.config.patch_size) ** 2
    config = LlavaConfig(
        vision_config=vision.config,
        text_config=language.config,
        image_token_id=image_id,
        projector_hidden_act="gelu",
        vision_feature_layer=feature_layer,
        vision_feature_select_strategy=feature_select,
        image_seq_length=patches,
        tie_word_embeddings=language.config.tie_word_embeddings,
    )
    model = LlavaForConditionalGeneration._from_config(config, dtype=language.dtype)
    model.model.vision_tower = vision.to(language.dtype)
    model.model.language_model = language.model
    model.lm_head = language.lm_head
    model.tie_weights()
    model.generation_config = generation_config(language, tokenizer)
    processor = LlavaProcessor(
        image_processor=image_processor,
        tokenizer=tokenizer,
        patch_size=vision.config.patch_size,
        vision_feature_select_strategy=feature_select,
        num_additional_image_tokens=additional_tokens(vision.config),
        image_token=IMAGE,
    )
    return model, processor


def generation_config(language: Any, tokenizer: PreTrainedTokenizerFast) -> Any:
    """The LLM's own settings without sampling values: those beside `do_sample=False` make later saves fail."""
    from transformers import GenerationConfig

    own = language.generation_config
    return GenerationConfig(
        bos_token_id=own.bos_token_id,
        eos_token_id=own.eos_token_id if own.eos_token_id is not None else tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def add_image_token(tokenizer: PreTrainedTokenizerFast) -> int:
    """Make `<image>` one special piece. Without it transformers silently takes the id of `<`."""
    from tokenizers import AddedToken

    tokenizer.add_tokens([AddedToken(IMAGE, special=True, normalized=False)], special_tokens=True)
    check_image_token(tokenizer, tokenizer.name_or_path)
    return int(tokenizer.convert_tokens_to_ids(IMAGE))


def check_image_token(tokenizer: PreTrainedTokenizerFast, place: str | Path) -> None:
    """Raise UserError unless `<image>` is a single piece."""
    if len(tokenizer.encode(IMAGE, add_special_tokens=False)) != 1:
        raise UserError(
            f"{place}: its tokenizer has no {IMAGE} piece, so pictures would be read as text; "
            "build the checkpoint with `clips-mllm train`, or add the piece to the tokenizer"
        )


def load_mllm(folder: str | Path, *, device: str = "auto", dtype: str = "auto", quantize: Quantize = "none") -> Mllm:
    """Load a stock LLaVA or LLaVA-NeXT checkpoint, or an adapter with its base, for use.

    Args:
        folder: folder or hub id.
        device: auto, cpu, cuda or mps.
        dtype: auto (as saved), float32, bfloat16 or float16.
        quantize: none, or the LLM in 4bit (nf4) or 8bit, for less memory.
    Raises:
        UserError: no checkpoint there, another kind of model, missing or unexpected weights, no `<image>` piece, an
            adapter without its base.
    """
    place = choose_device(device)
    model, processor = load_parts(folder, dtype=dtype, quantize=quantize, place=place)
    processor.tokenizer.padding_side = "left"  # not saved with the tokenizer
    return Mllm(model.to(place).eval(), processor, place)


def load_parts(
    folder: str | Path,
    *,
    dtype: str | torch.dtype,
    quantize: Quantize | BitsAndBytesConfig = "none",
    place: torch.device | None = None,
) -> tuple[AnyModel, AnyProcessor]:
    """Model and processor as saved, for training or for use; an adapter comes merged into its base (`adapters.py`).

    Args:
        place: where weights in 4 or 8 bits go as they are read; by default the GPU that is current, if there is one.
    """
    from clips_mllm.adapters import find_adapter, is_adapter, load_adapter  # it reads bases with this function

    name = str(folder) if is_adapter(folder) else _existing(str(folder), "model")
    if (adapter := find_adapter(name)) is not None:
        assert not isinstance(quantize, BitsAndBytesConfig), "only the base of an adapter brings its own quantisation"
        return load_adapter(adapter, dtype=dtype, quantize=quantize, place=place)
    _refuse_encoder(Path(name))
    config = read_pretrained(AutoConfig, name)
    if type(config) not in STOCK:
        raise UserError(f"{folder}: a '{config.model_type}' checkpoint, not a LLaVA model; point to a `train` run")
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


def save_mllm(model: Any, processor: AnyProcessor, folder: Path, state: Any = None) -> None:
    """Leave a complete stock checkpoint in `folder`, or a complete adapter where `model` is one.

    The file that makes it one, `config.json` or `adapter_config.json`, comes last.
    """
    from peft import PeftModel

    from clips_mllm.adapters import CONFIG, save_adapter

    work = folder / "partial"
    shutil.rmtree(work, ignore_errors=True)
    try:
        if isinstance(model, PeftModel):
            save_adapter(model, processor, work, state)
        else:
            model.save_pretrained(work, state_dict=None if state is None else _tied(model, state))
            processor.save_pretrained(work)
    except BaseException:
        shutil.rmtree(work, ignore_errors=True)  # a full disk, Ctrl-C: nothing half-written stays
        raise
    make_readable(work)
    for path in sorted(work.iterdir(), key=lambda path: path.name in ("config.json", CONFIG)):
        os.replace(path, folder / path.name)
    work.rmdir()


def _tied(model: Any, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The gathered state with tied weights as one tensor again: accelerate clones them, and both would be written."""
    first: dict[int, str] = {}
    for name, weights in model.named_parameters(remove_duplicate=False):
        if name in state:
            state[name] = state[first.setdefault(id(weights), name)]
    return state


def is_complete(folder: Path, files: tuple[str, ...] = SHARD_FILES) -> bool:
    """Whether `folder` itself holds a whole checkpoint, with its weights in one of `files`."""
    return (folder / "config.json").is_file() and any((folder / name).is_file() for name in files)


def _existing(name: str, key: str, files: tuple[str, ...] = SHARD_FILES) -> str:
    """A folder with a checkpoint, or a hub id. Anything that looks like a path must exist."""
    path = Path(name)
    if path.is_dir() and not is_complete(path, files):
        raise UserError(
            f"{name}: no finished checkpoint here (config.json and safetensors); run the stage before first"
        )
    check_model_exists(name, key)
    return name


def _refuse_encoder(folder: Path) -> None:
    """transformers does not know the kind of a pretraining checkpoint, and would advise an upgrade at length."""
    file = folder / "config.json"
    if file.is_file() and '"model_type": "clips"' in file.read_text(encoding="utf-8", errors="replace"):
        raise UserError(f"{folder}: a CLIPS encoder, not a multimodal LLM; give the folder of a `clips-mllm train` run")


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
