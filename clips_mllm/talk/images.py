"""Images in, with limits: nothing is decoded before its size is known."""

from __future__ import annotations

import io
from pathlib import Path

from clips_mllm.talk.prompt import InputImage
from vision_tower.common.errors import UserError

MAX_PIXELS = 50_000_000
MAX_BYTES = 20_000_000
# Of strangers. Pillow hands PostScript to Ghostscript, and the images within icons tell their size when decoded.
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")


class Refused(UserError):
    """An image that is none, or larger than allowed. The message names no path."""


def decode_limited(
    content: bytes, *, max_bytes: int = MAX_BYTES, max_pixels: int = MAX_PIXELS, file: str | None = None
) -> InputImage:
    """An image from its bytes.

    Its header is read first: a decompression bomb says there how large it would be.

    Raises:
        Refused: no image, too many bytes, or too many pixels.
    """
    from PIL import Image

    from vision_tower.data.images import BadImage, decode_image

    if len(content) > max_bytes:
        raise Refused(
            f"the image has {len(content):,} bytes, more than the {max_bytes:,} allowed", remedy="send a smaller one"
        )
    try:
        with Image.open(io.BytesIO(content), formats=FORMATS) as header:
            width, height = header.size
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise Refused(
            f"the image has more than the {max_pixels:,} pixels allowed", remedy="send a smaller one"
        ) from None
    except Exception:  # whatever a damaged header makes Pillow raise
        raise Refused("not a readable image", remedy="send PNG, JPEG or WebP") from None
    if width * height > max_pixels:
        raise Refused(
            f"the image has {width} x {height} pixels, more than the {max_pixels:,} allowed",
            remedy="send a smaller one",
        )
    try:
        return InputImage(decode_image(content, formats=FORMATS), file)
    except BadImage:
        raise Refused("not a readable image (damaged or cut off)", remedy="send PNG, JPEG or WebP") from None


def read_image(path: Path, *, max_pixels: int = MAX_PIXELS) -> InputImage:
    """An image of a file on this machine. Raises UserError that names it."""
    path = path.expanduser()
    if not path.is_file():
        raise UserError("no such image", file=path, remedy="check the path")
    try:
        content = path.read_bytes()
        return decode_limited(content, max_bytes=len(content), max_pixels=max_pixels, file=str(path.resolve()))
    except OSError as error:
        raise UserError(f"cannot be read ({error.strerror})", file=path, remedy="check its permissions") from error
    except Refused as error:
        raise UserError(f"{error}", file=path) from error
