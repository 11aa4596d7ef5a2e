"""Images to be measured on, wherever they lie: decoded a batch ahead, unreadable ones counted.

EncodedImage(name, content) --threads--> decoded batch --caller--> embeddings
"""

from __future__ import annotations

import hashlib
import itertools
import sys
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from vision_tower.common.errors import UserError

if TYPE_CHECKING:
    from PIL import Image

MAX_BAD_FRACTION = 0.01
EARLY = 1000  # images after which a share of unreadable ones says something


@dataclass(frozen=True, kw_only=True)
class EncodedImage:
    """An encoded image: a file, or the bytes of one. `name` is what messages and results call it."""

    name: str
    content: Path | bytes


@dataclass(frozen=True, kw_only=True)
class Pair(EncodedImage):
    """An image and the captions that describe it."""

    texts: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Labelled(EncodedImage):
    """An image and the place of its class."""

    label: int


AnyImage = TypeVar("AnyImage", bound=EncodedImage)


class SkipCounter:
    """Counts images, and those that cannot be used; above a share of `max_bad_fraction` it stops the run.

    The share is looked at from the 1,000th image on, and at the end.
    """

    def __init__(self, source: str, max_bad_fraction: float = MAX_BAD_FRACTION) -> None:
        self.source = source
        self.max_bad_fraction = max_bad_fraction
        self.seen = 0
        self.bad = 0
        self.first = ""

    def skip(self, name: str, cause: str) -> None:
        """Count one that cannot be used; the first is told of at once."""
        self.seen += 1
        self.bad += 1
        if self.bad == 1:
            self.first = f"{name}: {cause}"
            print(f"skipped: {self.first} (further ones are counted)", file=sys.stderr, flush=True)

    def check(self) -> None:
        """Raise UserError where more than the share was skipped."""
        if self.bad > self.max_bad_fraction * self.seen:
            raise UserError(
                f"{self.bad} of {self.seen} images cannot be used (first: {self.first}), more than the "
                f"share of {self.max_bad_fraction} that may be skipped",
                file=self.source,
                remedy="replace them or take them out",
            )


def decoded(
    images: Iterable[AnyImage], batch_size: int, skips: SkipCounter, digests: list[str] | None = None
) -> Iterator[tuple[list[AnyImage], list[Image.Image]]]:
    """Batches of the readable images, in order; while one is in use the next is decoded in threads.

    Args:
        digests: if given, the SHA-256 of each readable image's bytes is appended, for they are read here anyway.
    Raises:
        UserError: too many are unreadable.
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
    if skips.seen >= EARLY:
        skips.check()
    return kept, images


def _decode(content: Path | bytes, hashed: bool) -> tuple[Image.Image, str]:
    from vision_tower.data.images import BadImage, decode_image

    try:
        read = content.read_bytes() if isinstance(content, Path) else content
        return decode_image(read), hashlib.sha256(read).hexdigest() if hashed else ""
    except OSError as error:  # of reading the file; those of decoding are BadImage already
        raise BadImage(error.strerror or str(error)) from error
