"""Pictures in, with limits: nothing is decoded before its size is known."""

from __future__ import annotations

import io
from pathlib import Path

from clips_mllm.talk.prompt import Picture
from vision_tower.common.errors import UserError

MOST_PIXELS = 50_000_000
MOST_BYTES = 20_000_000
# Of strangers. Pillow hands PostScript to Ghostscript, and the pictures within icons tell their size when decoded.
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")


class Refused(UserError):
    """A picture that is none, or larger than allowed. The message names no path."""


def decode_picture(
    content: bytes, *, most_bytes: int = MOST_BYTES, most_pixels: int = MOST_PIXELS, file: str | None = None
) -> Picture:
    """A picture from its bytes.

    Its header is read first: a decompression bomb says there how large it would be.

    Raises:
        Refused: no picture, too many bytes, or too many pixels.
    """
    from PIL import Image

    from vision_tower.data.images import BadImage, decode_image

    if len(content) > most_bytes:
        raise Refused(
            f"the picture has {len(content):,} bytes, more than the {most_bytes:,} allowed; send a smaller one"
        )
    try:
        with Image.open(io.BytesIO(content), formats=FORMATS) as header:
            width, height = header.size
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise Refused(f"the picture has more than the {most_pixels:,} pixels allowed; send a smaller one") from None
    except Exception:  # whatever a damaged header makes Pillow raise
        raise Refused("not a readable picture; send PNG, JPEG or WebP") from None
    if width * height > most_pixels:
        raise Refused(
            f"the picture has {width} x {height} pixels, more than the {most_pixels:,} allowed; send a smaller one"
        )
    try:
        return Picture(decode_image(content, formats=FORMATS), file)
    except BadImage:
        raise Refused("not a readable picture (damaged or cut off); send PNG, JPEG or WebP") from None


def read_picture(path: Path, *, most_pixels: int = MOST_PIXELS) -> Picture:
    """A picture of a file on this machine. Raises UserError that names it."""
    path = path.expanduser()
    if not path.is_file():
        raise UserError(f"{path}: no such picture; check the path")
    try:
        content = path.read_bytes()
        return decode_picture(content, most_bytes=len(content), most_pixels=most_pixels, file=str(path.resolve()))
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); check its permissions") from error
    except Refused as error:
        raise UserError(f"{path}: {error}") from error
