"""Model sections of the pretraining recipe. Does not import torch."""

from __future__ import annotations

import dataclasses
from typing import Literal

from vision_tower.common.errors import UserError
from vision_tower.common.recipe import check_ranges, refuse_unused


@dataclasses.dataclass(frozen=True, kw_only=True)
class TowerRecipe:
    """Size of one transformer.

    Args:
        width: hidden size.
        layers: number of blocks.
        mlp: hidden size of the MLP.
        heads: number of attention heads.
    """

    width: int
    layers: int
    mlp: int
    heads: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelRecipe:
    """Model architecture.

    Args:
        image: image tower.
        text: text tower.
        captioner: captioner; unused by objectives without caption loss.
        embed_dim: width of the joint embedding space.
        image_size: height and width of the image, in pixels.
        patch_size: height and width of a patch, in pixels; must divide the image size.
        class_token: prepend a class token, attended to but not pooled, as in published weights (the tower is then a
            ViTModel, otherwise a SiglipVisionModel).
        positions: image position embeddings: sincos is fixed; learned is trained, initialized as sincos.
        text_length: context length of the text tower, including special tokens.
        padding: whether the text tower attends to padding: attended, as in published weights; or masked, which allows
            trimming batches to their longest text (faster, but open_clip has no equivalent).
        target_length: number of learnable queries, which is the maximum length of a predicted caption.
        vocabulary: WordPiece vocab.txt; null trains a vocabulary on the captions.
        vocabulary_size: rows of the token embedding.
        start_from: folder of an encoder to take weights and vocabulary from, usually trained at a smaller image size;
            the optimizer state is not loaded.
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
        """Maximum word pieces of a caption: the context without `[bos]`, `[eos]` and `[CLS]`."""
        return self.text_length - 3

    def check(self) -> None:
        """Raise UserError if sizes are out of range or do not fit together."""
        sizes = ("embed_dim", "image_size", "patch_size", "vocabulary_size")
        check_ranges(self, "model.", **dict.fromkeys(sizes, "[1, inf)"))
        check_ranges(self, "model.", text_length="[4, inf)", target_length="[3, inf)")  # a word and special tokens
        if self.image_size % self.patch_size:
            down = self.image_size // self.patch_size * self.patch_size
            near = f"{down} or {down + self.patch_size}" if down else str(self.patch_size)
            raise UserError(
                "not a multiple of patch_size", key="model.image_size", value=self.image_size, remedy=f"use {near}"
            )
        for name, tower in (("image", self.image), ("text", self.text), ("captioner", self.captioner)):
            sizes = ("width", "layers", "mlp", "heads")
            check_ranges(tower, f"model.{name}.", **dict.fromkeys(sizes, "[1, inf)"))
            if tower.width % tower.heads:
                raise UserError(
                    f"does not divide model.{name}.width={tower.width}",
                    key=f"model.{name}.heads",
                    value=tower.heads,
                    remedy="change one of the two",
                )
        if self.start_from is not None and self.vocabulary is not None:
            raise UserError(
                "model.start_from has its own", key="model.vocabulary", value=self.vocabulary, remedy="remove it"
            )
        if self.image.width % 4:
            raise UserError("sin-cos positions need a multiple of 4", key="model.image.width", value=self.image.width)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LockRecipe:
    """A frozen tower (LiT).

    Args:
        tower: tower to freeze together with its projection, at the weights of the checkpoint.
        checkpoint: folder of a `pretrain` run or a converted encoder with the tower sizes of this recipe; a text tower
            also sets the vocabulary.
    """

    tower: Literal["none", "image", "text"] = "none"
    checkpoint: str | None = None

    def check(self) -> None:
        """Raise UserError if only one of the two is set."""
        if self.tower != "none" and self.checkpoint is None:
            raise UserError(f"required by lock.tower={self.tower}", key="lock.checkpoint", remedy="set it")
        if self.tower == "none":
            remedy = "set lock.tower, or remove it"
            refuse_unused(self, ["checkpoint"], "has no effect with lock.tower=none", "lock.", remedy)
