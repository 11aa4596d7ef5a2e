"""Images in: decoding, normalising, and the processor that evaluation and the MLLM use."""

from __future__ import annotations

import io
import struct
import zlib
from typing import TYPE_CHECKING

from PIL import ExifTags, Image, ImageFile, ImageOps, UnidentifiedImageError

if TYPE_CHECKING:
    import torch
    from transformers import BaseImageProcessor

MEAN = (0.485, 0.456, 0.406)  # ImageNet
STD = (0.229, 0.224, 0.225)
DECODING = 2  # raised where `decode_image` gives other pixels: features kept on disk belong to one of its versions

# What Pillow's decoders raise on damaged files, besides its own errors.
_BROKEN = (OSError, ValueError, SyntaxError, EOFError, IndexError, OverflowError, struct.error, zlib.error)


class BadImage(ValueError):
    """Bytes that are no image."""


def decode_image(content: bytes, least: int | None = None, formats: tuple[str, ...] | None = None) -> Image.Image:
    """RGB image of encoded bytes, upright by its EXIF orientation, as `datasets` and transformers give it.

    Args:
        least: pixels a side that are enough. JPEG is then decoded at a half, a quarter or an eighth, whichever is the
            smallest that leaves them, in a fraction of the time.
        formats: those of Pillow's that the bytes may be of; all by default.
    Raises:
        BadImage: the bytes are no image.
    """
    tolerant = ImageFile.LOAD_TRUNCATED_IMAGES
    ImageFile.LOAD_TRUNCATED_IMAGES = False  # tasks of lmms-eval switch it on for the whole process
    try:
        image = Image.open(io.BytesIO(content), formats=formats)
        if least is not None:
            image.draft("RGB", (least, least))
        image.load()
        return _upright(image if image.mode == "RGB" else _as_rgb(image))  # each would copy it
    except UnidentifiedImageError as error:
        raise BadImage("not an image, by its first bytes") from error
    except (Image.DecompressionBombError, *_BROKEN) as error:
        raise BadImage(str(error) or type(error).__name__) from error
    finally:
        ImageFile.LOAD_TRUNCATED_IMAGES = tolerant


def _upright(image: Image.Image) -> Image.Image:
    """Turned by its EXIF orientation; one that cannot be read says nothing about the pixels."""
    try:
        turned = image.getexif().get(ExifTags.Base.Orientation, 1) != 1
        return ImageOps.exif_transpose(image) if turned else image  # which would copy it
    except _BROKEN:
        return image


def _as_rgb(image: Image.Image) -> Image.Image:
    """Grey of 16 bits by its upper eight: Pillow's own conversion makes white of all above 255."""
    if image.mode.startswith("I"):
        image = image.convert("I")
        most = image.getextrema()[1]
        if isinstance(most, (int, float)) and most < 1 << 16:
            return image.point(lambda value: value * (1 / 256)).convert("L").convert("RGB")
    if image.mode in ("I", "F"):
        raise BadImage("grey of 32 bits, whose white it does not tell; save it with 8 or 16")
    return image.convert("RGB")


def normalize(pixels: torch.Tensor) -> torch.Tensor:
    """uint8 pixels (b, 3, h, w) -> fp32, ImageNet-normalised."""
    import torch

    mean = torch.tensor(MEAN, device=pixels.device).view(3, 1, 1)
    std = torch.tensor(STD, device=pixels.device).view(3, 1, 1)
    return pixels.float().div_(255).sub_(mean).div_(std)  # in place: a batch of images is large


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
