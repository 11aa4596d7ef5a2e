"""Image decoding and normalization, and the image processor of evaluation and of the MLLM."""

from __future__ import annotations

import io
import struct
import types
import zlib
from typing import TYPE_CHECKING

from PIL import ExifTags, Image, ImageFile, ImageOps, UnidentifiedImageError
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.TiffImagePlugin import TiffImageFile

if TYPE_CHECKING:
    import torch
    from transformers import BaseImageProcessor

MEAN = (0.485, 0.456, 0.406)  # ImageNet
STD = (0.229, 0.224, 0.225)
DECODING = 2  # version of the decoded pixels, part of the key of cached features; increment when they change

# Raised by Pillow's decoders on damaged files, in addition to its own errors.
_DAMAGED = (
    OSError,
    ValueError,
    SyntaxError,
    EOFError,
    IndexError,
    OverflowError,
    RuntimeError,
    struct.error,
    zlib.error,
)
# Pillow's `ImageFile.load` as if `ImageFile.LOAD_TRUNCATED_IMAGES` were always False. lmms-eval tasks set that global
# for the whole process, also while other threads decode. A copy of the function with globals of its own is not
# affected, and Pillow stays as it is. Checked with Pillow 12.3.
_load_strictly = types.FunctionType(
    ImageFile.ImageFile.load.__code__, vars(ImageFile) | {"LOAD_TRUNCATED_IMAGES": False}, "load"
)


class BadImage(ValueError):
    """Bytes that are not a readable image."""


def decode_image(content: bytes, min_size: int | None = None, formats: tuple[str, ...] | None = None) -> Image.Image:
    """Decode to RGB and apply the EXIF orientation, with the same pixels as `datasets` and transformers.

    Thread-safe. A truncated image raises, also when `PIL.ImageFile.LOAD_TRUNCATED_IMAGES` is set.

    Args:
        min_size: smallest useful side in pixels. A JPEG is decoded at 1/2, 1/4 or 1/8 of its size, the smallest that
            has this side, in a fraction of the time.
        formats: Pillow names of the accepted formats; all by default.
    Raises:
        BadImage: not an image, damaged, or truncated.
    """
    try:
        image = Image.open(io.BytesIO(content), formats=formats)
        if min_size is not None:
            image.draft("RGB", (min_size, min_size))
        _load(image, content)
        return _apply_orientation(image if image.mode == "RGB" else _to_rgb(image))  # each would copy the image
    except UnidentifiedImageError as error:
        raise BadImage("unknown image format") from error
    except (Image.DecompressionBombError, *_DAMAGED) as error:
        raise BadImage(str(error) or type(error).__name__) from error


def _load(image: Image.Image, content: bytes) -> None:
    """Decode the pixels with the errors of Pillow's strict mode."""
    match image:
        case JpegImageFile():
            image._ended = True  # type: ignore[attr-defined]  # else load_read may append an end marker to the data
            _load_strictly(image)
        case PngImageFile():
            _check_png_chunks(content)
            _load_strictly(image)
        case TiffImageFile() if not image.use_load_libtiff:
            _load_strictly(image)
        case _ if type(image).load is ImageFile.ImageFile.load or image.format == "JPEG2000":
            _load_strictly(image)
        case _:  # loaders of WebP, AVIF and compressed TIFF are always strict; only icons (ICO, ICNS) follow the global
            image.load()


def _check_png_chunks(content: bytes) -> None:
    """Raise SyntaxError for a damaged chunk before the pixels: without strict mode Pillow skips optional ones."""
    start = 8
    while (chunk := content[start + 4 : start + 8]) not in (b"IDAT", b"fdAT", b""):
        (length,) = struct.unpack_from(">I", content, start)
        end = start + 8 + length
        if zlib.crc32(content[start + 4 : end]) != int.from_bytes(content[end : end + 4], "big"):
            raise SyntaxError(f"broken PNG file (chunk {chunk!r})")
        start = end + 4


def _apply_orientation(image: Image.Image) -> Image.Image:
    """Rotate or flip by the EXIF orientation; unreadable EXIF data is ignored, since it does not affect the pixels."""
    try:
        rotated = image.getexif().get(ExifTags.Base.Orientation, 1) != 1
        return ImageOps.exif_transpose(image) if rotated else image  # exif_transpose copies an upright image
    except _DAMAGED:
        return image


def _to_rgb(image: Image.Image) -> Image.Image:
    """Convert to RGB; 16-bit gray keeps its upper 8 bits, since Pillow's conversion clips values above 255 to white."""
    if image.mode.startswith("I"):
        image = image.convert("I")
        maximum = image.getextrema()[1]
        if isinstance(maximum, (int, float)) and maximum < 1 << 16:
            return image.point(lambda value: value * (1 / 256)).convert("L").convert("RGB")
    if image.mode in ("I", "F"):
        raise BadImage("32-bit gray without a known white level; save it with 8 or 16 bits")
    return image.convert("RGB")


def normalize(pixels: torch.Tensor) -> torch.Tensor:
    """Convert uint8 pixels (b, 3, h, w) to fp32 with ImageNet mean and standard deviation."""
    import torch

    mean = torch.tensor(MEAN, device=pixels.device).view(3, 1, 1)
    std = torch.tensor(STD, device=pixels.device).view(3, 1, 1)
    return pixels.float().div_(255).sub_(mean).div_(std)  # in place: a batch of images is large


def evaluation_processor(size: int) -> BaseImageProcessor:
    """Return the stock image processor saved with the tower: squash to a square, bilinear, ImageNet statistics."""
    from transformers import SiglipImageProcessor

    return SiglipImageProcessor(
        size={"height": size, "width": size},
        resample=Image.Resampling.BILINEAR,
        image_mean=list(MEAN),
        image_std=list(STD),
        do_convert_rgb=True,
    )
