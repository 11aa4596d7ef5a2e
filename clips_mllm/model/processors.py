"""What a stock processor makes of an image: positions in the sequence, squash, pad or crop."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from PIL import Image
from transformers import LlavaImageProcessor, LlavaNextProcessor, LlavaProcessor

from clips_mllm.model.feature_store import ImageOrFeatures
from clips_mllm.model.tiles import AnyProcessor, tiled_tokens
from vision_tower.common.errors import UserError

IMAGE_INPUTS = ("pixel_values", "image_sizes")  # sizes where images have tiles


def image_token_counts(processor: AnyProcessor, images: Sequence[Image.Image | ImageOrFeatures]) -> list[int]:
    """Positions that each image takes in the sequence."""
    if isinstance(processor, LlavaNextProcessor):  # whose tiles no cache holds, so no image was looked up
        return tiled_tokens(processor, [image for image in images if not isinstance(image, ImageOrFeatures)])
    return [image_tokens(processor)] * len(images)


def image_tokens(processor: LlavaProcessor) -> int:
    """Positions that any image takes in the sequence of stock LLaVA."""
    size = processor.image_processor.size
    crop = getattr(processor.image_processor, "crop_size", None)
    side = (crop or size).get("height") or size["shortest_edge"]
    count = (side // processor.patch_size) ** 2 + processor.num_additional_image_tokens
    return int(count) - (processor.vision_feature_select_strategy == "default")


def set_aspect_ratio(processor: LlavaProcessor, square: Literal["squash", "pad", "crop"]) -> None:
    """Let the processor squash images, or first centre them on a square of its mean colour, as LLaVA-1.5 does.

    `crop` leaves a tower's processor as it came: OpenAI CLIP's scales the shorter side and crops the middle.

    Padding is the stock processor's, and so is saved with the checkpoint: whoever loads it prepares images in the
    way that it was trained with.

    Raises:
        UserError: anything but `squash` with tiles, which LLaVA-NeXT's processor pads and squashes in its own way.
    """
    own = processor.image_processor
    if isinstance(processor, LlavaNextProcessor):
        if square != "squash":
            raise UserError(
                "images in tiles are fitted by their own processor",
                key="data.image_aspect_ratio",
                value=square,
                remedy="take squash",
            )
        return
    if square == "pad":
        processor.image_processor = LlavaImageProcessor(
            do_pad=True,
            size=own.size,
            do_center_crop=bool(getattr(own, "do_center_crop", False)),
            crop_size=getattr(own, "crop_size", None) or own.size,
            resample=own.resample,
            image_mean=own.image_mean,
            image_std=own.image_std,
            do_convert_rgb=True,
        )
    elif isinstance(own, LlavaImageProcessor):
        own.do_pad = False
    if square == "squash" and getattr(own, "do_center_crop", False):
        own.size, own.do_center_crop = own.crop_size, False
