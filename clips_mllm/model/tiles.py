"""High resolution by tiles, with the stock LLaVA-NeXT classes. Optional; the default is LLaVA without tiles.

The model sees the complete image and up to `max_tiles` tiles of the tower's size, in a grid that fits its shape. A
trained vector, `image_newline`, ends each row of patches. The classes are `LlavaNextForConditionalGeneration` and
`LlavaNextProcessor`. Four tiles of 576 patches take up to 2,928 positions per image.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeAlias

from torch import nn
from transformers import (
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextImageProcessor,
    LlavaNextProcessor,
    LlavaProcessor,
)
from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches

if TYPE_CHECKING:
    from PIL import Image

AnyModel: TypeAlias = LlavaForConditionalGeneration | LlavaNextForConditionalGeneration
AnyProcessor: TypeAlias = LlavaProcessor | LlavaNextProcessor


def grid(tile: int, max_tiles: int) -> list[list[int]]:
    """Return (height, width) in pixels of every layout of 2 to `max_tiles` tiles."""
    sides = range(1, max_tiles + 1)
    return [[rows * tile, columns * tile] for rows in sides for columns in sides if 2 <= rows * columns <= max_tiles]


def with_tiles(
    model: LlavaForConditionalGeneration, processor: LlavaProcessor, max_tiles: int
) -> tuple[LlavaNextForConditionalGeneration, LlavaNextProcessor]:
    """Return the same tower, projector and LLM in LLaVA-NeXT's classes.

    Args:
        max_tiles: maximum number of tiles per image, in addition to the complete image.
    """
    own = model.config
    tile = own.vision_config.image_size
    layouts = grid(tile, max_tiles)
    config = LlavaNextConfig(
        vision_config=own.vision_config,
        text_config=own.text_config,
        image_token_index=own.image_token_id,
        projector_hidden_act=own.projector_hidden_act,
        vision_feature_layer=own.vision_feature_layer,
        vision_feature_select_strategy=own.vision_feature_select_strategy,
        image_seq_length=own.image_seq_length,
        tie_word_embeddings=own.tie_word_embeddings,
        image_grid_pinpoints=layouts,
    )
    tiled = LlavaNextForConditionalGeneration._from_config(config, dtype=model.dtype)
    tiled.model.vision_tower = model.model.vision_tower
    tiled.model.multi_modal_projector = model.model.multi_modal_projector
    tiled.model.language_model = model.model.language_model
    tiled.lm_head = model.lm_head
    tiled.tie_weights()
    tiled.generation_config = model.generation_config
    square = {"height": tile, "width": tile}
    images = processor.image_processor
    return tiled, LlavaNextProcessor(
        image_processor=LlavaNextImageProcessor(
            size=square,
            crop_size=square,
            do_center_crop=False,
            resample=images.resample,
            image_mean=images.image_mean,
            image_std=images.image_std,
            image_grid_pinpoints=layouts,
        ),
        tokenizer=processor.tokenizer,
        patch_size=processor.patch_size,
        vision_feature_select_strategy=processor.vision_feature_select_strategy,
        num_additional_image_tokens=processor.num_additional_image_tokens,
        image_token=processor.image_token,
        chat_template=processor.chat_template,
    )


def tiled_tokens(processor: LlavaNextProcessor, images: list[Image.Image]) -> list[int]:
    """Return the number of image tokens of each image, as the stock processor counts them (transformers 5.23)."""
    tile = _side(processor)
    dropped = processor.vision_feature_select_strategy == "default"
    return [processor._get_number_of_features(image.height, image.width, tile, tile) - dropped for image in images]


def views(processor: AnyProcessor, image: Image.Image) -> int:
    """Return the number of tower inputs of an image: its tiles and the complete image, or 1 in stock LLaVA."""
    if not isinstance(processor, LlavaNextProcessor):
        return 1
    layouts = processor.image_processor.image_grid_pinpoints
    return int(image_size_to_num_patches([image.height, image.width], layouts, _side(processor)))


def _side(processor: LlavaNextProcessor) -> int:
    """Return the side of a tile in pixels."""
    size = processor.image_processor.size
    return int(size.get("height") or size["shortest_edge"])


def image_newline_modules(model: AnyModel) -> list[nn.Module]:
    """Return `image_newline`, which trains with the projector, as a module; stock LLaVA has none."""
    if not isinstance(model, LlavaNextForConditionalGeneration):
        return []
    return [nn.ParameterList([model.model.image_newline])]


def register_image_newline(model: AnyModel) -> None:
    """Register `image_newline` in the projector too, before PEFT copies it: PEFT copies and saves modules only."""
    if isinstance(model, LlavaNextForConditionalGeneration):
        model.model.multi_modal_projector.image_newline = model.model.image_newline


def use_registered_image_newline(model: AnyModel) -> None:
    """Let the model use the projector's `image_newline`: PEFT's copy, which is trained and saved."""
    if isinstance(model, LlavaNextForConditionalGeneration):
        model.model.image_newline = model.model.multi_modal_projector.image_newline


def unregister_image_newline(model: AnyModel) -> None:
    """Remove `image_newline` from the projector again, after the adapter was merged."""
    if isinstance(model, LlavaNextForConditionalGeneration):
        use_registered_image_newline(model)
        del model.model.multi_modal_projector.image_newline
