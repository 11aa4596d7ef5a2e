"""Convert checkpoints of the original LLaVA code to stock models.

mm_projector.bin  + tower + LLM                    ->  stock model with this projector
LoRA folder       + tower + LLM it was trained on  ->  adapter merged, projector from non_lora_trainables.bin
full folder       + tower (weights may be inside)  ->  projector, LLM and perhaps tower from its files
"""

from __future__ import annotations

import json
import logging
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

logger = logging.getLogger(__name__)

PROJECTOR_FILE = "mm_projector.bin"
LORA_FILE = "non_lora_trainables.bin"
ADAPTERS = ("adapter_model.safetensors", "adapter_model.bin")


def read_original(
    source: Path, *, tower: str | None, llm: str | None
) -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    """Return the stock model and its processor.

    Args:
        source: a full folder, a LoRA folder, a folder with mm_projector.bin, or this file.
        tower: folder or hub id; default is the one that the config names.
        llm: folder or hub id of the LLM of a projector or LoRA; a LoRA's config names one.
    Raises:
        UserError: not an original checkpoint, a part that is missing or does not fit, or a weight that the stock model
            does not have.
    """
    folder = source.parent if source.is_file() else source
    projector = source if source.is_file() else folder / PROJECTOR_FILE
    if source.is_dir() and (folder / "adapter_config.json").is_file():
        config = read_original_config(folder / "config.json")
        weights = read_weights([_lora_file(folder)], "base_model.model.")
        language, tokenizer = _with_adapter(folder, llm)
    elif source.is_dir() and (files := weight_files(folder)):
        if llm is not None:
            raise UserError(f"{folder} has its own LLM", key="--llm", value=llm, remedy="leave it out")
        config = read_original_config(folder / "config.json")
        weights = read_weights(files)
        language, tokenizer = _full_llm(folder, config, weights)
    elif projector.is_file():
        file = folder / "config.json"
        config = read_original_config(file) if file.is_file() else OriginalConfig()
        if llm is None:
            raise UserError("has no LLM", file=projector, key="--llm", remedy="give the LLM that it was trained with")
        weights = read_weights([projector])
        language, tokenizer = read_llm(llm, "auto")
    else:
        remedy = f"give a folder with weights, with adapter_config.json or with {PROJECTOR_FILE}, or this file"
        raise UserError("not an original LLaVA checkpoint", file=source, remedy=remedy)
    if weights.llm:
        raise UserError("belongs to an LLM", file=source, key=min(weights.llm), remedy="give the original file")
    logger.info("%s: tower %s", source, "from the checkpoint" if weights.tower else tower or config.tower)
    return _join(source, config, weights, tower, language, tokenizer)


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
        raise UserError("its config names no vision tower", file=source, key="--tower", remedy="give it")
    vision, image_processor = _tower(source, name, weights.tower)
    # "default" means to drop the class token, which some towers do not have.
    select = feature_selection(name, vision.config, "auto" if config.feature_select == "default" else "full")
    model, processor = join_parts(
        vision, image_processor, language, tokenizer, feature_layer=config.feature_layer, feature_select=select
    )
    if config.image_aspect_ratio == "pad":
        set_aspect_ratio(processor, "pad")
    _fill_projector(source, model.model.multi_modal_projector, weights.projector)
    return model, processor


def _fill_projector(source: Path, projector: torch.nn.Module, state: Weights) -> None:
    wanted = projector.state_dict()
    for name, value in state.items():
        if value.shape != wanted[name].shape:
            raise UserError(
                f"its shape is {tuple(value.shape)}, this tower and LLM need {tuple(wanted[name].shape)}",
                file=source,
                key=f"projector.{name}",
                remedy="give the tower and the LLM that it was trained with",
            )
    projector.load_state_dict(state)


def _tower(source: Path, name: str, state: Weights) -> tuple[Any, Any]:
    """Load the named tower; weights in the checkpoint (`state`) replace its own."""
    from transformers import AutoConfig, AutoImageProcessor, CLIPVisionModel

    if not state:
        return read_tower(name, "auto")
    config = read_pretrained(AutoConfig, name)
    if config.model_type == "clip":
        config = config.vision_config
    check_tower(name, config)
    if config.model_type != "clip_vision_model":
        raise UserError(
            f"the weights in {source} are those of a CLIP vision tower",
            file=name,
            key="model_type",
            value=config.model_type,
            remedy="give the CLIP tower with --tower",
        )
    weights = _without_position_ids(state)
    model = with_weights(CLIPVisionModel, config, weights, source, dtype=_dtype(weights))
    return model, read_pretrained(AutoImageProcessor, name)


def _without_position_ids(state: Weights) -> Weights:
    """Remove 0, 1, 2, …, which old checkpoints contain and transformers computes."""
    return {name: value for name, value in state.items() if not name.endswith("embeddings.position_ids")}


def _full_llm(folder: Path, config: OriginalConfig, weights: OriginalWeights) -> tuple[Any, PreTrainedTokenizerFast]:
    """Load the LLM of a full checkpoint, with `weights.llm`, which is emptied."""
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
        raise UserError("no such file", file=folder / LORA_FILE, remedy="download it: it has the LoRA's projector")
    return folder / LORA_FILE


def _base(folder: Path) -> str:
    from vision_tower.common.files import read_object

    base = read_object(folder / "adapter_config.json").get("base_model_name_or_path")
    if not base:
        remedy = "give its LLM with --llm"
        raise UserError(
            "names no base model", file=folder / "adapter_config.json", key="base_model_name_or_path", remedy=remedy
        )
    return str(base)


def _with_adapter(folder: Path, llm: str | None) -> tuple[Any, PreTrainedTokenizerFast]:
    """Load the base LLM and merge the adapter into it; every weight of the adapter must fit."""
    from peft import PeftConfig, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict

    from vision_tower.checkpoints.weight_files import read_tensors

    file = next((folder / name for name in ADAPTERS if (folder / name).is_file()), None)
    if file is None:
        raise UserError("no such file", file=folder / ADAPTERS[0], remedy="download it")
    language, tokenizer = read_llm(llm or _base(folder), "auto")
    state = read_tensors(file)
    try:
        adapted = get_peft_model(language, PeftConfig.from_pretrained(str(folder)))
    except (ValueError, TypeError, json.JSONDecodeError) as error:
        raise UserError(
            f"does not fit the LLM ({error})", file=folder / "adapter_config.json", remedy="give its LLM with --llm"
        ) from error
    wanted = {name: value.shape for name, value in get_peft_model_state_dict(adapted).items()}
    found = {name: value.shape for name, value in state.items()}
    if wrong := sorted(name for name in wanted.keys() | found.keys() if wanted.get(name) != found.get(name)):
        raise UserError(
            f"{len(wrong)} weights do not fit the LLM (first: {wrong[0]}, shape {found.get(wrong[0], 'missing')}, "
            f"needed {wanted.get(wrong[0], 'none')})",
            file=file,
            remedy="give its LLM with --llm",
        )
    set_peft_model_state_dict(adapted, state)
    return adapted.merge_and_unload(), tokenizer
