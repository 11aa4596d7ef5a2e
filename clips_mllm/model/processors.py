"""Image tokens per image, and the aspect ratio mode of stock processors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from PIL import Image
from transformers import LlavaImageProcessor, LlavaNextProcessor, LlavaProcessor

from clips_mllm.model.feature_store import ImageOrFeatures
from clips_mllm.model.tiles import AnyProcessor, tiled_tokens
from vision_tower.common.errors import UserError

IMAGE_INPUTS = ("pixel_values", "image_sizes")  # `image_sizes` with tiles only


def image_token_counts(processor: AnyProcessor, images: Sequence[Image.Image | ImageOrFeatures]) -> list[int]:
    """Return the number of image tokens of each image."""
    if isinstance(processor, LlavaNextProcessor):  # tiled images are never cached
        return tiled_tokens(processor, [image for image in images if not isinstance(image, ImageOrFeatures)])
    return [image_tokens(processor)] * len(images)


def image_tokens(processor: LlavaProcessor) -> int:
    """Return the number of image tokens per image in stock LLaVA."""
    size = processor.image_processor.size
    crop = getattr(processor.image_processor, "crop_size", None)
    side = (crop or size).get("height") or size["shortest_edge"]
    count = (side // processor.patch_size) ** 2 + processor.num_additional_image_tokens
    return int(count) - (processor.vision_feature_select_strategy == "default")


def set_aspect_ratio(processor: LlavaProcessor, ratio: Literal["squash", "pad", "crop"]) -> None:
    """Set how the processor makes images square. The setting is saved with the checkpoint, in stock fields.

    Args:
        ratio: `squash` resizes, `pad` first pads to a square with the mean color (LLaVA-1.5), `crop` keeps the tower's
            own mode; OpenAI CLIP's resizes the shorter side and crops the center.
    Raises:
        UserError: not `squash` with tiles, for which LLaVA-NeXT's processor has its own resizing and padding.
    """
    own = processor.image_processor
    if isinstance(processor, LlavaNextProcessor):
        if ratio != "squash":
            raise UserError("has no effect with tiles", key="data.image_aspect_ratio", value=ratio, remedy="use squash")
        return
    if ratio == "pad":
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
    if ratio == "squash" and getattr(own, "do_center_crop", False):
        own.size, own.do_center_crop = own.crop_size, False
