"""Input images: decoded within limits, prepared for the vision tower, and read with the questions of an examples file.

No heavy imports: commands check their images before a model is loaded.
"""

from __future__ import annotations

import dataclasses
import functools
import io
from pathlib import Path
from typing import TYPE_CHECKING

from vision_tower.common.errors import UserError
from vision_tower.common.files import read_json
from vision_tower.common.hashes import image_hash

if TYPE_CHECKING:
    import torch
    from PIL.Image import Image

    from clips_mllm.model.tiles import AnyProcessor

MAX_PIXELS = 50_000_000
MAX_BYTES = 20_000_000
# Formats accepted over the network. Pillow runs Ghostscript on PostScript, and the size of an image inside an icon is
# only known after decoding.
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")


class ImageRejected(UserError):
    """A file that is not a readable image, or is too large. The message contains no path."""


class ImageTooLarge(ImageRejected):
    """An image with more bytes or pixels than allowed."""


@dataclasses.dataclass(frozen=True)
class PreparedImage:
    """Tower input of an image; much smaller than the decoded photograph, so queued requests hold this.

    Attributes:
        pixels: (3, h, w), or (tiles, 3, h, w) for LLaVA-NeXT.
        size: height and width of the original image, which determine the layout of tiles.
    """

    key: str
    pixels: torch.Tensor
    size: tuple[int, int]


@dataclasses.dataclass(frozen=True, eq=False)
class InputImage:
    """A decoded image, and its file if it was read from one."""

    image: Image
    file: str | None = None
    _prepared: dict[int, PreparedImage] = dataclasses.field(default_factory=dict, repr=False)

    @functools.cached_property
    def key(self) -> str:
        """Digest of size and pixels."""
        return image_hash(self.image)

    def prepared(self, processor: AnyProcessor) -> PreparedImage:
        """Return the tower's input; computed once per processor."""
        if id(processor) not in self._prepared:
            pixels = processor.image_processor(images=[self.image], return_tensors="pt")["pixel_values"][0]
            self._prepared[id(processor)] = PreparedImage(self.key, pixels, (self.image.height, self.image.width))
        return self._prepared[id(processor)]


def decode_limited(
    content: bytes, *, max_bytes: int = MAX_BYTES, max_pixels: int = MAX_PIXELS, file: str | None = None
) -> InputImage:
    """Decode an image if its header declares an allowed size (protects against decompression bombs).

    Raises:
        ImageTooLarge: too many bytes or pixels.
        ImageRejected: not a readable image.
    """
    from PIL import Image

    from vision_tower.data.images import BadImage, decode_image

    if len(content) > max_bytes:
        raise ImageTooLarge(
            f"the image has {len(content):,} bytes, more than the {max_bytes:,} allowed", remedy="send a smaller one"
        )
    try:
        with Image.open(io.BytesIO(content), formats=FORMATS) as header:
            width, height = header.size
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise ImageTooLarge(
            f"the image has more than the {max_pixels:,} pixels allowed", remedy="send a smaller one"
        ) from None
    except Exception:  # Pillow raises many types for damaged headers
        raise ImageRejected("not a readable image", remedy="send PNG, JPEG or WebP") from None
    if width * height > max_pixels:
        raise ImageTooLarge(
            f"the image has {width} x {height} pixels, more than the {max_pixels:,} pixels allowed",
            remedy="send a smaller one",
        )
    try:
        return InputImage(decode_image(content, formats=FORMATS), file)
    except BadImage:
        raise ImageRejected("not a readable image (damaged or truncated)", remedy="send PNG, JPEG or WebP") from None


def read_image(path: Path) -> InputImage:
    """Read an image file of this machine, of any size in bytes.

    Raises:
        UserError: with the file's path.
    """
    path = path.expanduser()
    if not path.is_file():
        raise UserError("no such image", file=path, remedy="check the path")
    try:
        content = path.read_bytes()
        return decode_limited(content, max_bytes=len(content), file=str(path.resolve()))
    except OSError as error:
        raise UserError(f"cannot be read ({error.strerror})", file=path, remedy="check its permissions") from error
    except ImageRejected as error:
        raise UserError(error.problem, file=path, remedy=error.remedy) from error


def read_examples(file: Path) -> list[dict[str, str]]:
    """Read a JSON list of {"image", "question"}; image paths are relative to the file.

    Raises:
        UserError: malformed JSON or an unreadable image.
    """
    expected = 'a JSON list of {"image": FILE, "question": TEXT}'
    rows = read_json(file)
    if not isinstance(rows, list) or not rows:
        raise UserError("not a JSON list, or an empty one", file=file, remedy=f"write {expected}")
    for index, row in enumerate(rows):
        if not isinstance(row, dict) or not isinstance(row.get("image"), str) or "question" not in row:
            raise UserError("wrong fields", file=file, key=f"[{index}]", remedy=f"write {expected}")
    examples = [{"image": str(file.parent / row["image"]), "question": str(row["question"])} for row in rows]
    for example in examples:
        read_image(Path(example["image"]))
    return examples
