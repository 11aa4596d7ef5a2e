"""Recipe of image-text pairs: sources, columns, shuffling, augmentation. Imports no torch, like all recipes."""

from __future__ import annotations

import dataclasses

from vision_tower.common.errors import UserError
from vision_tower.common.recipe import check_ranges

IMAGE_ENDINGS = ("png", "jpg", "jpeg", "webp")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Augmentation:
    """Training augmentation; the defaults are those of CLIPS.

    Args:
        smallest_crop: minimum fraction of the area that a random crop keeps; 1 resizes the full image to a square.
        jitter: strength of brightness, contrast and saturation jitter; a quarter of it for hue.
        jitter_probability: probability of color jitter.
        gray_probability: probability of conversion to grayscale.
    """

    smallest_crop: float = 0.4
    jitter: float = 0.32
    jitter_probability: float = 0.8
    gray_probability: float = 0.2

    def check(self) -> None:
        """Raise UserError for a value out of range."""
        check_ranges(self, "data.augmentation.", smallest_crop="(0, 1]", jitter="[0, 2]")
        check_ranges(self, "data.augmentation.", jitter_probability="[0, 1]", gray_probability="[0, 1]")


@dataclasses.dataclass(frozen=True, kw_only=True)
class SourceRecipe:
    """One source of image-text pairs.

    Args:
        shards: WebDataset tars or Parquet files: a path or any fsspec URL (hf://, s3://, https://), with globs and
            braces such as {000..127} or {a,b}.
        weight: relative sampling weight.
        image: the image's column (bytes, or a struct with bytes) or, in tars, its extension; png, jpg, jpeg and webp
            are found by default.
        web_caption: the web caption's column; in tars a key of the JSON, or the extension of a text file. Of a list
            one caption is drawn.
        synthetic_caption: the same for the synthetic caption.
    """

    shards: str
    weight: float = 1.0
    image: str = "image"
    web_caption: str = "web_caption"
    synthetic_caption: str = "synthetic_caption"

    @property
    def text_names(self) -> frozenset[str]:
        """Columns or extensions that can have captions."""
        return frozenset({"json", self.web_caption, self.synthetic_caption})

    @property
    def names(self) -> frozenset[str]:
        """Columns or extensions to read."""
        return self.text_names | {self.image, *IMAGE_ENDINGS}


@dataclasses.dataclass(frozen=True, kw_only=True)
class PairsRecipe:
    """Image-text pairs: one source, or a mixture of several.

    Args:
        shards: WebDataset tars or Parquet files: a path or any fsspec URL (hf://, s3://, https://), with globs and
            braces such as {000..127} or {a,b}.
        image: the image's column (bytes, or a struct with bytes) or, in tars, its extension; png, jpg, jpeg and webp
            are found by default.
        web_caption: the web caption's column; in tars a key of the JSON, or the extension of a text file. Of a list
            one caption is drawn.
        synthetic_caption: the same for the synthetic caption.
        mixture: several sources, each with shards, weight, image, web_caption and synthetic_caption, instead of the
            four values above.
        shuffle_buffer: samples shuffled together, per loader process; 0 keeps the order of the shard.
        max_bad_fraction: fraction of unreadable samples, or of unreadable shards, above which the run stops.
        augmentation: training augmentation of the images.
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
        """The mixture, or the single source."""
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
        """Raise UserError if the sources are missing or contradictory, or a value is out of range."""
        if self.shards is None and not self.mixture:
            raise UserError("required, unless data.mixture is set", key="data.shards", remedy="give a path or URL")
        if self.shards is not None and self.mixture:
            remedy = "remove one of them (--data.shards null if it comes from the recipe)"
            raise UserError("cannot be combined with data.mixture", key="data.shards", value=self.shards, remedy=remedy)
        for number, source in enumerate(self.mixture):
            check_ranges(source, f"data.mixture[{number}].", weight="(0, inf)")
        check_ranges(self, "data.", shuffle_buffer="[0, inf)", max_bad_fraction="[0, 1]")
        self.augmentation.check()
