"""Build a stock LLaVA model from a vision tower and a causal LM, with a new projector."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import torch
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    CLIPVisionModel,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedModel,
    SiglipVisionModel,
)

from clips_mllm.model.recipe import check_feature_layer
from clips_mllm.model.stock import PICKLES, SHARD_FILES, _existing, _read_weights, check_image_token
from clips_mllm.model.tiles import AnyModel, AnyProcessor, with_tiles
from clips_mllm.model.towers import (
    FeatureSelect,
    additional_tokens,
    at_size,
    check_tower,
    feature_selection,
    resize_processor,
)
from clips_mllm.prompts.conversation import IMAGE
from vision_tower.checkpoints.loading import read_pretrained, refuse_partial_load
from vision_tower.common.errors import UserError

if TYPE_CHECKING:
    from transformers import BaseImageProcessor, PreTrainedTokenizerFast


# Two-tower checkpoints, from which only the vision tower is read.
VISION_HALVES: dict[str, type[PreTrainedModel]] = {"clip": CLIPVisionModel, "siglip": SiglipVisionModel}


# Config fields of causal LMs that scale the logits (Gemma 2, Cohere, Granite); stock LLaVA ignores them.
SCALED_LOGITS = ("final_logit_softcapping", "logit_scale", "logits_scaling")


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
    """Join a pretrained tower and LLM with a new projector, in LLaVA's classes, or LLaVA-NeXT's with `tiles`.

    Raises:
        UserError: a checkpoint is missing, its weights do not match its class, or tiles with a class token.
    """
    vision, image_processor = read_tower(tower, dtype)
    selection = feature_selection(tower, vision.config, feature_select)
    if tiles is not None and selection == "full" and additional_tokens(vision.config):
        raise UserError("LLaVA-NeXT uses no class token", key="model.feature_select", value="full", remedy="use auto")
    if image_size is not None:
        vision = at_size(vision, image_size)
        resize_processor(image_processor, image_size)
    language, tokenizer = read_llm(llm, dtype)
    model, processor = join_parts(
        vision, image_processor, language, tokenizer, feature_layer=feature_layer, feature_select=selection
    )
    return (model, processor) if tiles is None else with_tiles(model, processor, tiles)


def read_tower(tower: str, dtype: str | torch.dtype) -> tuple[Any, BaseImageProcessor]:
    """Load a stock vision tower and its image processor. Raises UserError if one is missing or unsupported."""
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
    """Load a causal LM and its tokenizer. Raises UserError if one is missing or unsupported."""
    config = read_pretrained(AutoConfig, _existing(llm, "model.llm", SHARD_FILES + PICKLES))
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        remedy = "choose an LLM of the LLaMA family, or set model.checkpoint to a stage's checkpoint"
        raise UserError("not a causal LM", file=llm, key="model_type", value=config.model_type, remedy=remedy)
    language = _read_weights(AutoModelForCausalLM, llm, dtype)
    scaled = next((name for name in SCALED_LOGITS if getattr(config, name, None) not in (None, 1)), None)
    if scaled is not None or not hasattr(getattr(language, "model", None), "embed_tokens"):
        raise UserError(
            "stock LLaVA ignores it" if scaled is not None else "stock LLaVA needs the structure of LLaMA",
            file=llm,
            key=scaled or "architectures",
            value=getattr(config, scaled or "architectures"),
            remedy="choose an LLM of the LLaMA family: LLaMA, Mistral, Qwen2, Qwen3, SmolLM",
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
    """Build the stock model and processor from their parts, in the LLM's dtype, with a new projector.

    Raises:
        UserError: the tower has no hidden state `feature_layer`.
    """
    check_feature_layer(feature_layer, vision.config.num_hidden_layers)
    if tokenizer.pad_token is None:  # as in LLaMA-3; padded positions are masked and have no label
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
    """Return the LLM's settings without sampling values: with `do_sample=False` these make `save_pretrained` fail."""
    from transformers import GenerationConfig

    own = language.generation_config
    return GenerationConfig(
        bos_token_id=own.bos_token_id,
        eos_token_id=own.eos_token_id if own.eos_token_id is not None else tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def add_image_token(tokenizer: PreTrainedTokenizerFast) -> int:
    """Add `<image>` as one special token and return its id. Otherwise transformers silently uses the id of `<`."""
    from tokenizers import AddedToken

    tokenizer.add_tokens([AddedToken(IMAGE, special=True, normalized=False)], special_tokens=True)
    check_image_token(tokenizer, tokenizer.name_or_path)
    return int(tokenizer.convert_tokens_to_ids(IMAGE))
