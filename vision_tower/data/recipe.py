"""The recipe of image-text pairs: sources, columns, shuffling, augmentation. Imports no torch, as all recipes."""

from __future__ import annotations

import dataclasses
import math

from vision_tower.common.errors import UserError

IMAGE_ENDINGS = ("png", "jpg", "jpeg", "webp")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Augmentation:
    """Training augmentation; the defaults are those of CLIPS.

    Args:
        smallest_crop: smallest share of the area that a random crop keeps; 1 squashes the whole image.
        jitter: strength of brightness, contrast and saturation jitter; hue gets a quarter.
        jitter_probability: how often colours are jittered.
        gray_probability: how often the image turns gray.
    """

    smallest_crop: float = 0.4
    jitter: float = 0.32
    jitter_probability: float = 0.8
    gray_probability: float = 0.2

    def check(self) -> None:
        """Raise UserError where a number has no meaning."""
        if not 0 < self.smallest_crop <= 1:
            raise UserError(
                "a share above 0, at most 1", key="data.augmentation.smallest_crop", value=self.smallest_crop
            )
        if not 0 <= self.jitter <= 2:
            raise UserError("from 0 to 2", key="data.augmentation.jitter", value=self.jitter)
        for name in ("jitter_probability", "gray_probability"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"data.augmentation.{name}={getattr(self, name)}: from 0 to 1")


@dataclasses.dataclass(frozen=True, kw_only=True)
class SourceRecipe:
    """One source of image-text pairs.

    Args:
        shards: WebDataset tars or Parquet files: a path, or a URL that fsspec knows (hf://, s3://, https://), globs
            and braces as {000..127} or {a,b} in it.
        weight: share of the samples drawn from here, in proportion to the other weights.
        image: the image's column (bytes, or a struct with bytes) or, in tars, its ending; png, jpg, jpeg and webp are
            found without it.
        web_caption: the web caption's column; in tars a key of the json, or the ending of a text. A list: one is drawn.
        synthetic_caption: the synthetic caption's column, likewise.
    """

    shards: str
    weight: float = 1.0
    image: str = "image"
    web_caption: str = "web_caption"
    synthetic_caption: str = "synthetic_caption"

    @property
    def text_names(self) -> frozenset[str]:
        """Columns or endings in which captions may be."""
        return frozenset({"json", self.web_caption, self.synthetic_caption})

    @property
    def names(self) -> frozenset[str]:
        """Columns or endings that are read."""
        return self.text_names | {self.image, *IMAGE_ENDINGS}


@dataclasses.dataclass(frozen=True, kw_only=True)
class PairsRecipe:
    """Where the image-text pairs come from: one source, or a mixture of several.

    Args:
        shards: WebDataset tars or Parquet files: a path, or a URL that fsspec knows (hf://, s3://, https://), globs
            and braces as {000..127} or {a,b} in it.
        image: the image's column (bytes, or a struct with bytes) or, in tars, its ending; png, jpg, jpeg and webp are
            found without it.
        web_caption: the web caption's column; in tars a key of the json, or the ending of a text. A list: one is drawn.
        synthetic_caption: the synthetic caption's column, likewise.
        mixture: several sources with shards, weight, image, web_caption and synthetic_caption each, instead of the four
            values above.
        shuffle_buffer: samples that are shuffled together, per loader process; 0 leaves them as they lie in a shard.
        max_bad_fraction: share of unreadable samples, or of unreadable shards, above which the run stops.
        augmentation: what happens to images in training.
    """

    shards: str | None = None
    image: str = "image"
    web_caption: str = "web_caption"
    synthetic_caption: str = "synthetic_caption"
    mixture: tuple[SourceRecipe, ...] = ()
    shuffle_buffer: int = 4096
    max_bad_fraction: float = 0.01
    augmentation: Augmentation = dataclasses.field(default_factory=Augmentation)

    @property
    def sources(self) -> tuple[SourceRecipe, ...]:
        """The mixture, or the one source."""
        if self.shards is None:
            return self.mixture
        return (
            SourceRecipe(
                shards=self.shards,
                image=self.image,
                web_caption=self.web_caption,
                synthetic_caption=self.synthetic_caption,
            ),
        )

    def check(self) -> None:
        """Raise UserError where it does not say what to read."""
        if self.shards is None and not self.mixture:
            raise UserError("say where the pairs are, or give several sources as data.mixture", key="data.shards")
        if self.shards is not None and self.mixture:
            raise UserError(
                "data.mixture has its own",
                key="data.shards",
                value=self.shards,
                remedy="take one out (data.shards=null where a recipe brings it)",
            )
        for number, source in enumerate(self.mixture):
            if not 0 < source.weight < math.inf:
                raise UserError(
                    f"data.mixture[{number}].weight={source.weight}: must be a number above 0",
                    remedy="or leave the source out",
                )
        if self.shuffle_buffer < 0:
            raise UserError(
                "0 (as they lie in the shards) or a number of samples",
                key="data.shuffle_buffer",
                value=self.shuffle_buffer,
            )
        if not 0 <= self.max_bad_fraction <= 1:
            raise UserError("a share is from 0 to 1", key="data.max_bad_fraction", value=self.max_bad_fraction)
        self.augmentation.check()
