"""Pictures in: decoding, training augmentation, and the processor that evaluation and the MLLM use."""

from __future__ import annotations

import io
import math
import struct
import zlib
from typing import TYPE_CHECKING

from PIL import Image, ImageFile, UnidentifiedImageError

from vision_tower.pairs_recipe import Augmentation

if TYPE_CHECKING:
    import torch
    from transformers import BaseImageProcessor

MEAN = (0.485, 0.456, 0.406)  # ImageNet
STD = (0.229, 0.224, 0.225)

# What Pillow's decoders raise on damaged files, besides its own errors.
_BROKEN = (OSError, ValueError, SyntaxError, EOFError, IndexError, OverflowError, struct.error, zlib.error)


class BadImage(ValueError):
    """Bytes that are no picture."""


def decode_image(content: bytes, least: int | None = None) -> Image.Image:
    """RGB picture of encoded bytes.

    Args:
        least: pixels a side that are enough. JPEG is then decoded at a half, a quarter or an eighth, whichever is the
            smallest that leaves them, in a fraction of the time.
    Raises:
        BadImage: the bytes are no picture.
    """
    tolerant = ImageFile.LOAD_TRUNCATED_IMAGES
    ImageFile.LOAD_TRUNCATED_IMAGES = False  # tasks of lmms-eval switch it on for the whole process
    try:
        picture = Image.open(io.BytesIO(content))
        if least is not None:
            picture.draft("RGB", (least, least))
        return picture.convert("RGB")
    except UnidentifiedImageError as error:
        raise BadImage("not an image, by its first bytes") from error
    except (Image.DecompressionBombError, *_BROKEN) as error:
        raise BadImage(str(error) or type(error).__name__) from error
    finally:
        ImageFile.LOAD_TRUNCATED_IMAGES = tolerant


def enough_pixels(augmentation: Augmentation, size: int) -> int:
    """Sides from which even the smallest crop, where it is square, still has `size` pixels a side."""
    return math.ceil(size / augmentation.smallest_crop**0.5)


def training_transform(augmentation: Augmentation, size: int) -> object:
    """PIL picture -> (3, size, size) uint8; no flip, since captions speak of left and right."""
    from torchvision.transforms import v2

    steps: list[object] = []
    if augmentation.smallest_crop < 1:
        steps.append(v2.RandomResizedCrop(size, scale=(augmentation.smallest_crop, 1.0), antialias=True))
    else:
        steps.append(v2.Resize((size, size), antialias=True))
    if augmentation.jitter > 0:
        strength = augmentation.jitter
        jitter = v2.ColorJitter(strength, strength, strength, strength / 4)
        steps.append(v2.RandomApply([jitter], augmentation.jitter_probability))
    if augmentation.gray_probability > 0:
        steps.append(v2.RandomGrayscale(augmentation.gray_probability))
    return v2.Compose([*steps, v2.PILToTensor()])


def normalize(pixels: torch.Tensor) -> torch.Tensor:
    """uint8 pixels (b, 3, h, w) -> fp32, ImageNet-normalised."""
    import torch

    mean = torch.tensor(MEAN).view(3, 1, 1)
    std = torch.tensor(STD).view(3, 1, 1)
    return pixels.float().div_(255).sub_(mean).div_(std)  # in place: a batch of pictures is large


def evaluation_processor(size: int) -> BaseImageProcessor:
    """The stock processor saved beside the tower: squash to a square, bilinear, ImageNet mean and deviation."""
    from transformers import SiglipImageProcessor

    return SiglipImageProcessor(
        size={"height": size, "width": size},
        resample=Image.Resampling.BILINEAR,
        image_mean=list(MEAN),
        image_std=list(STD),
        do_convert_rgb=True,
    )
