"""Sections of the pretraining recipe that say what the model is. No torch."""

from __future__ import annotations

import dataclasses
from typing import Literal

from vision_tower.common.errors import UserError


@dataclasses.dataclass(frozen=True, kw_only=True)
class TowerRecipe:
    """One transformer.

    Args:
        width: hidden size.
        layers: blocks.
        mlp: width of the MLP.
        heads: attention heads.
    """

    width: int
    layers: int
    mlp: int
    heads: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelRecipe:
    """The pretraining model.

    Args:
        image: image tower.
        text: text tower.
        captioner: captioner; objectives without one leave it out.
        embed_dim: width of the shared embedding space.
        image_size: side of the square image, in pixels.
        patch_size: side of a patch, in pixels; it must divide the image size.
        class_token: a class token before the patches, attended but not pooled, as in published weights (the tower is
            then a ViTModel, else a SiglipVisionModel).
        positions: of the image tower; sincos is fixed and recomputed at another size, learned starts from it.
        text_length: context of the text tower, with all special pieces.
        padding: of texts: attended, as in published weights, or masked, so that batches can be trimmed to their longest
            text (faster; open_clip knows no such model).
        target_length: learnable queries, that is the longest caption to predict.
        vocabulary: a WordPiece vocab.txt, or none to train one on the captions.
        vocabulary_size: rows of the token embedding.
        start_from: folder of an encoder whose weights and vocabulary the run starts from, usually at a smaller image
            size (the optimiser starts afresh).
    """

    image: TowerRecipe
    text: TowerRecipe
    captioner: TowerRecipe
    embed_dim: int
    image_size: int
    patch_size: int
    class_token: bool = False
    positions: Literal["sincos", "learned"] = "sincos"
    text_length: int = 80
    padding: Literal["attended", "masked"] = "attended"
    target_length: int = 128
    vocabulary: str | None = None
    vocabulary_size: int = 32_000
    start_from: str | None = None

    @property
    def text_room(self) -> int:
        """Word pieces of a caption that the text tower holds, beside `[bos]`, `[eos]` and `[CLS]`."""
        return self.text_length - 3

    def check(self) -> None:
        """Raise UserError where the numbers do not fit together."""
        for name, value in self._sizes().items():
            if value < 1:
                raise UserError(f"model.{name}={value}: at least 1")
        if self.image_size % self.patch_size:
            down = self.image_size // self.patch_size * self.patch_size
            near = f"{down} or {down + self.patch_size}" if down else str(self.patch_size)
            raise UserError(
                f"patch_size={self.patch_size} does not divide it",
                key="model.image_size",
                value=self.image_size,
                remedy=f"take {near}",
            )
        for name, tower in (("image", self.image), ("text", self.text), ("captioner", self.captioner)):
            if tower.width % tower.heads:
                raise UserError(
                    f"model.{name}.heads={tower.heads}: does not divide width={tower.width}", remedy="change one"
                )
        if self.start_from is not None and self.vocabulary is not None:
            raise UserError(
                "the encoder in model.start_from brings its own",
                key="model.vocabulary",
                value=self.vocabulary,
                remedy="leave it out",
            )
        if self.text_length < 4 or self.target_length < 3:
            raise UserError(
                "at least 4, and model.target_length at least 3",
                key="model.text_length",
                remedy="nothing else would fit",
            )
        if self.image.width % 4:
            raise UserError("sin-cos positions need a multiple of 4", key="model.image.width", value=self.image.width)

    def _sizes(self) -> dict[str, int]:
        """Every number of the recipe by its dotted name."""
        sizes = {name: getattr(self, name) for name in ("embed_dim", "image_size", "patch_size", "vocabulary_size")}
        for tower in ("image", "text", "captioner"):
            sizes |= {f"{tower}.{name}": value for name, value in dataclasses.asdict(getattr(self, tower)).items()}
        return sizes


@dataclasses.dataclass(frozen=True, kw_only=True)
class LockRecipe:
    """A tower that does not train (LiT).

    Args:
        tower: which tower, with its projection, keeps the weights of the checkpoint.
        checkpoint: folder of a `pretrain` run or a converted encoder; its tower must have this recipe's sizes. A text
            tower brings its vocabulary.
    """

    tower: Literal["none", "image", "text"] = "none"
    checkpoint: str | None = None

    def check(self) -> None:
        """Raise UserError where one of the two is missing."""
        if (self.tower == "none") != (self.checkpoint is None):
            raise UserError("tower and checkpoint belong together", key="lock", remedy="give both, or neither")
