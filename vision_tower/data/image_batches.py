"""Evaluation images: decoded one batch ahead in threads; unreadable ones are counted.

EncodedImage(name, content) --threads--> decoded batch --caller--> embeddings
"""

from __future__ import annotations

import hashlib
import itertools
import logging
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from vision_tower.common.errors import UserError

if TYPE_CHECKING:
    from PIL import Image

logger = logging.getLogger(__name__)

MAX_BAD_FRACTION = 0.01
MIN_IMAGES = 1000  # images before the fraction of unreadable ones is checked


@dataclass(frozen=True, kw_only=True)
class EncodedImage:
    """An encoded image: a file or bytes. `name` identifies it in messages and results."""

    name: str
    content: Path | bytes


@dataclass(frozen=True, kw_only=True)
class CaptionedImage(EncodedImage):
    """An image and the captions that describe it."""

    texts: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Labeled(EncodedImage):
    """An image and the index of its class."""

    label: int


AnyImage = TypeVar("AnyImage", bound=EncodedImage)


class SkipCounter:
    """Counts readable and unreadable images; above a fraction of `max_bad_fraction` it stops the run.

    The fraction is checked from image MIN_IMAGES on, and at the end.
    """

    def __init__(self, source: str, max_bad_fraction: float = MAX_BAD_FRACTION) -> None:
        self.source = source
        self.max_bad_fraction = max_bad_fraction
        self.seen = 0
        self.bad = 0
        self.first = ""

    def skip(self, name: str, cause: str) -> None:
        """Count an unreadable image; the first one is logged."""
        self.seen += 1
        self.bad += 1
        if self.bad == 1:
            self.first = f"{name}: {cause}"
            logger.warning("skipped: %s (later ones are only counted)", self.first)

    def check(self) -> None:
        """Raise UserError if more than the allowed fraction was skipped."""
        if self.bad > self.max_bad_fraction * self.seen:
            raise UserError(
                f"{self.bad} of {self.seen} images are unreadable (first: {self.first}), more than the "
                f"allowed fraction of {self.max_bad_fraction}",
                file=self.source,
                remedy="replace or remove them",
            )


def decoded(
    images: Iterable[AnyImage], batch_size: int, skips: SkipCounter, digests: list[str] | None = None
) -> Iterator[tuple[list[AnyImage], list[Image.Image]]]:
    """Yield batches of the readable images, in order; the next batch is decoded in threads meanwhile.

    Args:
        digests: if given, the SHA-256 of each readable image's bytes is appended, since they are read here anyway.
    Raises:
        UserError: too many unreadable images.
    """
    rest = iter(images)
    waiting: deque[list[tuple[AnyImage, Future[tuple[Image.Image, str]]]]] = deque()
    hashed = digests is not None
    with ThreadPoolExecutor() as pool:
        while batch := list(itertools.islice(rest, batch_size)):
            waiting.append([(image, pool.submit(_decode, image.content, hashed)) for image in batch])
            if len(waiting) > 1:
                yield _readable(waiting.popleft(), skips, digests)
        while waiting:
            yield _readable(waiting.popleft(), skips, digests)
    skips.check()


def _readable(
    batch: list[tuple[AnyImage, Future[tuple[Image.Image, str]]]], skips: SkipCounter, digests: list[str] | None
) -> tuple[list[AnyImage], list[Image.Image]]:
    from vision_tower.data.images import BadImage

    kept, images = [], []
    for encoded, future in batch:
        try:
            image, digest = future.result()
            images.append(image)
            kept.append(encoded)
            if digests is not None:
                digests.append(digest)
            skips.seen += 1
        except BadImage as error:
            skips.skip(encoded.name, str(error))
    if skips.seen >= MIN_IMAGES:
        skips.check()
    return kept, images


def _decode(content: Path | bytes, hashed: bool) -> tuple[Image.Image, str]:
    from vision_tower.data.images import BadImage, decode_image

    try:
        read = content.read_bytes() if isinstance(content, Path) else content
        return decode_image(read), hashlib.sha256(read).hexdigest() if hashed else ""
    except OSError as error:  # from reading the file; decoding errors are BadImage
        raise BadImage(error.strerror or str(error)) from error
