"""Checkpoints of the original LLaVA code as stock models.

mm_projector.bin         + tower + LLM                    ->  projector into a fresh join
LoRA folder              + tower + LLM it was trained on  ->  adapter merged, projector from non_lora_trainables.bin
whole folder             + tower (weights may be inside)  ->  everything from its files
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from clips_mllm.formats.original_config import OriginalConfig, read_original_config
from clips_mllm.formats.original_weights import OriginalWeights, Weights, read_weights, weight_files, without_rotary
from clips_mllm.model.build import join_parts, read_llm, read_tower
from clips_mllm.model.processors import set_aspect_ratio
from clips_mllm.model.towers import check_tower, feature_selection
from vision_tower.checkpoints.loading import read_pretrained, with_weights
from vision_tower.common.errors import UserError

if TYPE_CHECKING:
    from transformers import LlavaForConditionalGeneration, LlavaProcessor, PreTrainedTokenizerFast

PROJECTOR_FILE = "mm_projector.bin"
LORA_FILE = "non_lora_trainables.bin"
ADAPTERS = ("adapter_model.safetensors", "adapter_model.bin")


def read_original(
    source: Path, *, tower: str | None, llm: str | None
) -> tuple[LlavaForConditionalGeneration, LlavaProcessor, str]:
    """The stock model, its processor and a line that says what was read.

    Args:
        source: a whole folder, a LoRA folder, a folder with mm_projector.bin, or that file.
        tower: instead of the one that the config names.
        llm: of a projector or LoRA; a LoRA's config names one.
    Raises:
        UserError: none of these, a part that is missing or does not fit, or a weight without a place.
    """
    folder = source.parent if source.is_file() else source
    projector = source if source.is_file() else folder / PROJECTOR_FILE
    if source.is_dir() and (folder / "adapter_config.json").is_file():
        config = read_original_config(folder / "config.json")
        weights = read_weights([_lora_file(folder)], "base_model.model.")
        language, tokenizer = _with_adapter(folder, llm)
        line = f"LoRA on {llm or _base(folder)}, merged"
    elif source.is_dir() and (files := weight_files(folder)):
        if llm is not None:
            raise UserError(f"{folder} is a whole checkpoint, its LLM is inside", key="--llm", remedy="leave it out")
        config = read_original_config(folder / "config.json")
        weights = read_weights(files)
        language, tokenizer = _whole_llm(folder, config, weights)
        line = "whole checkpoint"
    elif projector.is_file():
        file = folder / "config.json"
        config = read_original_config(file) if file.is_file() else OriginalConfig()
        if llm is None:
            raise UserError(f"{projector}: a projector alone", remedy="say with --llm which LLM it was trained with")
        weights = read_weights([projector])
        language, tokenizer = read_llm(llm, "auto")
        line = f"projector for {llm}"
    else:
        raise UserError(
            "no original LLaVA checkpoint",
            file=source,
            remedy=f"give a folder with its weights, with adapter_config.json or with {PROJECTOR_FILE}, or that file",
        )
    if weights.llm:
        raise UserError(
            f"{sorted(weights.llm)[0]}: a weight of the LLM beside it, which has no place here", file=source
        )
    model, processor = _join(source, config, weights, tower, language, tokenizer)
    return model, processor, f"{line}; {'its own tower' if weights.tower else 'tower from its folder'}"


def _join(
    source: Path,
    config: OriginalConfig,
    weights: OriginalWeights,
    tower: str | None,
    language: Any,
    tokenizer: PreTrainedTokenizerFast,
) -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    name = tower or config.tower
    if name is None:
        raise UserError("nothing names its vision tower", file=source, remedy="give --tower")
    vision, image_processor = _tower(source, name, weights.tower)
    # A tower without a class token has none to drop, whatever the file says of "patch".
    select = feature_selection(name, vision.config, "auto" if config.feature_select == "default" else "full")
    model, processor = join_parts(
        vision, image_processor, language, tokenizer, feature_layer=config.feature_layer, feature_select=select
    )
    if config.square == "pad":
        set_aspect_ratio(processor, "pad")
    _fill_projector(source, model.model.multi_modal_projector, weights.projector)
    return model, processor


def _fill_projector(source: Path, projector: torch.nn.Module, state: Weights) -> None:
    wanted = projector.state_dict()
    for name, value in state.items():
        if value.shape != wanted[name].shape:
            raise UserError(
                f"the projector's {name} is {tuple(value.shape)}, this tower and LLM need {tuple(wanted[name].shape)}",
                file=source,
                remedy="give the tower and the LLM that it was trained with",
            )
    projector.load_state_dict(state)


def _tower(source: Path, name: str, state: Weights) -> tuple[Any, Any]:
    """The named tower, or where the checkpoint holds its weights the named tower's shape with those."""
    from transformers import AutoConfig, AutoImageProcessor, CLIPVisionModel

    if not state:
        return read_tower(name, "auto")
    config = read_pretrained(AutoConfig, name)
    if config.model_type == "clip":
        config = config.vision_config
    check_tower(name, config)
    if config.model_type != "clip_vision_model":
        raise UserError(
            f"a '{config.model_type}'", file=name, remedy=f"the weights in {source} are of a CLIP vision tower"
        )
    weights = _without_position_ids(state)
    model = with_weights(CLIPVisionModel, config, weights, source, dtype=_dtype(weights))
    return model, read_pretrained(AutoImageProcessor, name)


def _without_position_ids(state: Weights) -> Weights:
    """Old checkpoints hold 0, 1, 2, …, which transformers computes."""
    return {name: value for name, value in state.items() if not name.endswith("embeddings.position_ids")}


def _whole_llm(folder: Path, config: OriginalConfig, weights: OriginalWeights) -> tuple[Any, PreTrainedTokenizerFast]:
    """The LLM that lies in a whole checkpoint; its weights are taken out of `weights`."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, AutoTokenizer

    own = AutoConfig.for_model(config.llm_type, **config.llm)
    state = without_rotary(folder, weights.llm, own.rope_parameters["rope_theta"])
    weights.llm.clear()
    kind = MODEL_FOR_CAUSAL_LM_MAPPING[type(own)]
    language = with_weights(kind, own, state, folder, dtype=_dtype(state))
    return language, read_pretrained(AutoTokenizer, folder, config=own)


def _dtype(state: Weights) -> torch.dtype:
    return next(value.dtype for value in state.values() if value.is_floating_point())


# --- LoRA


def _lora_file(folder: Path) -> Path:
    if not (folder / LORA_FILE).is_file():
        raise UserError(
            "missing", file=folder / LORA_FILE, remedy="the projector of an original LoRA is there, fetch it"
        )
    return folder / LORA_FILE


def _base(folder: Path) -> str:
    from vision_tower.common.files import read_object

    base = read_object(folder / "adapter_config.json").get("base_model_name_or_path")
    if not base:
        raise UserError(
            "its adapter_config.json names no base model", file=folder, remedy="say with --llm which it was trained on"
        )
    return str(base)


def _with_adapter(folder: Path, llm: str | None) -> tuple[Any, PreTrainedTokenizerFast]:
    """The base LLM with the adapter merged into it; every weight of the adapter has its place."""
    from peft import PeftConfig, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict

    from vision_tower.checkpoints.weight_files import read_tensors

    file = next((folder / name for name in ADAPTERS if (folder / name).is_file()), None)
    if file is None:
        raise UserError(f"no {ADAPTERS[0]} beside adapter_config.json", file=folder, remedy="fetch it")
    language, tokenizer = read_llm(llm or _base(folder), "auto")
    state = read_tensors(file)
    try:
        adapted = get_peft_model(language, PeftConfig.from_pretrained(str(folder)))
    except (ValueError, TypeError, json.JSONDecodeError) as error:
        raise UserError(
            f"adapter_config.json does not fit the LLM ({error})", file=folder, remedy="give its own with --llm"
        ) from error
    wanted = {name: value.shape for name, value in get_peft_model_state_dict(adapted).items()}
    found = {name: value.shape for name, value in state.items()}
    if wrong := sorted(name for name in wanted.keys() | found.keys() if wanted.get(name) != found.get(name)):
        raise UserError(
            f"{len(wrong)} weights do not fit the LLM (first: {wrong[0]}, "
            f"{found.get(wrong[0], 'missing')} for {wanted.get(wrong[0], 'no place')})",
            file=file,
            remedy="give the LLM that it was trained on with --llm",
        )
    set_peft_model_state_dict(adapted, state)
    return adapted.merge_and_unload(), tokenizer
