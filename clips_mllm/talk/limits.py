"""What the network may ask for, and how it is told no."""

from __future__ import annotations

import dataclasses

from vision_tower.common.errors import UserError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Limits:
    """What a client may ask for.

    Args:
        images: images in one request.
        image_bytes: bytes of one encoded image.
        image_pixels: pixels of one image once decoded.
        body_bytes: bytes of a whole request.
        body_seconds: longest time that a request may take to arrive.
        new_tokens: longest answer, in tokens.
        waiting: requests that may wait; more get 429.
        rows: answers computed together.
        remote_images: fetch http(s) images, from public addresses only; off by default.
        fetch_seconds: longest time that fetching one image may take.
    """

    images: int = 8
    image_bytes: int = 20_000_000
    image_pixels: int = 50_000_000
    body_bytes: int = 64_000_000
    body_seconds: float = 60.0
    new_tokens: int = 1024
    waiting: int = 64
    rows: int = 8
    remote_images: bool = False
    fetch_seconds: float = 10.0

    def check(self) -> None:
        """Raise UserError for numbers that would let nothing through."""
        for name, value in dataclasses.asdict(self).items():
            if value < 0 or (value == 0 and name not in ("images", "remote_images")):
                raise UserError(f"limits.{name}={value}: must be above 0")


class BadRequest(Exception):
    """A request that is refused: HTTP status, OpenAI's error code, and a sentence without any path of this machine."""

    def __init__(self, message: str, *, status: int = 400, code: str = "invalid_request") -> None:
        super().__init__(message)
        self.status = status
        self.code = code
