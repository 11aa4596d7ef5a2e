"""Rename and reshape open_clip's weights to ours and back, from one table of pairs.

theirs   visual.* and the text tower at the top level (or below `text.`); queries, keys and values in one matrix;
         projections are (in, out)
ours     vision_model.* of ViTModel, text_model.* of SiglipTextModel; projections are Linear layers, (out, in)
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import torch

from vision_tower.common.errors import UserError
from vision_tower.model.config import ClipsConfig
from vision_tower.model.modeling import ClipsModel


@dataclasses.dataclass(frozen=True)
class WeightPair:
    """One tensor of open_clip and its counterpart.

    Attributes:
        theirs: name in open_clip.
        ours: names of the tensors into which theirs is split along dimension 0.
        form: `same`; `transposed`; `table`, (n, w) is (1, n, w) here; `token`, (w,) is (1, 1, w) here; `number`, one
            number of any shape is (1,) here.
    """

    theirs: str
    ours: tuple[str, ...]
    form: Literal["same", "transposed", "table", "token", "number"] = "same"

    def split(self, tensor: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
        """Convert their tensor to ours, fp32."""
        match self.form:
            case "transposed":
                tensor = tensor.T
            case "table":
                tensor = tensor[None]
            case "token":
                tensor = tensor[None, None]
            case "number":
                tensor = tensor.reshape(-1)
        for name, part in zip(self.ours, tensor.chunk(len(self.ours)), strict=True):
            yield name, part.float().contiguous()

    def join(self, state: dict[str, torch.Tensor]) -> torch.Tensor:
        """Convert our tensors to theirs, fp32."""
        tensor = torch.cat([state[name] for name in self.ours]) if len(self.ours) > 1 else state[self.ours[0]]
        match self.form:
            case "transposed":
                tensor = tensor.T
            case "table":
                tensor = tensor[0]
            case "token":
                tensor = tensor[0, 0]
            case "number":
                tensor = tensor[0]
        return tensor.float().clone(memory_format=torch.contiguous_format)


# Modules of a block with weight and bias: their name to ours.
_MLP = {"mlp.c_fc": "mlp.fc1", "mlp.c_proj": "mlp.fc2"}
IMAGE_BLOCK = {"ln_1": "layernorm_before", "ln_2": "layernorm_after", "attn.out_proj": "attention.o_proj", **_MLP}
TEXT_BLOCK = {"ln_1": "layer_norm1", "ln_2": "layer_norm2", "attn.out_proj": "self_attn.out_proj", **_MLP}


def pairs(config: ClipsConfig) -> list[WeightPair]:
    """List the pairs of all tensors of both towers; open_clip has no captioner."""
    image = "vision_model.embeddings"
    text = "text_model.embeddings"
    found = [
        WeightPair("logit_scale", ("logit_scale",), "number"),
        WeightPair("visual.class_embedding", (f"{image}.cls_token",), "token"),
        WeightPair("visual.positional_embedding", (f"{image}.position_embeddings",), "table"),
        WeightPair("visual.conv1.weight", (f"{image}.patch_embeddings.projection.weight",)),
        WeightPair("visual.proj", ("visual_projection.weight",), "transposed"),
        WeightPair("token_embedding.weight", (f"{text}.token_embedding.weight",)),
        WeightPair("positional_embedding", (f"{text}.position_embedding.weight",)),
        WeightPair("text_projection", ("text_model.head.weight",), "transposed"),
        *_module("visual.ln_post", "vision_model.layernorm"),
        *_module("ln_final", "text_model.final_layer_norm"),
    ]
    for index in range(config.vision_config.num_hidden_layers):
        theirs, ours = f"visual.transformer.resblocks.{index}", f"vision_model.layers.{index}"
        found += _block(theirs, ours, IMAGE_BLOCK, "attention")
    for index in range(config.text_config.num_hidden_layers):
        theirs, ours = f"transformer.resblocks.{index}", f"text_model.encoder.layers.{index}"
        found += _block(theirs, ours, TEXT_BLOCK, "self_attn")
    return found


def _block(theirs: str, ours: str, modules: dict[str, str], attention: str) -> Iterator[WeightPair]:
    for name, own in modules.items():
        yield from _module(f"{theirs}.{name}", f"{ours}.{own}")
    for kind in ("weight", "bias"):
        qkv = tuple(f"{ours}.{attention}.{part}_proj.{kind}" for part in "qkv")
        yield WeightPair(f"{theirs}.attn.in_proj_{kind}", qkv)


def _module(theirs: str, ours: str) -> Iterator[WeightPair]:
    for kind in ("weight", "bias"):
        yield WeightPair(f"{theirs}.{kind}", (f"{ours}.{kind}",))


def to_ours(state: dict[str, torch.Tensor], config: ClipsConfig, file: Path) -> dict[str, torch.Tensor]:
    """Convert open_clip's state dict to our names and shapes, without captioner, in fp32.

    Args:
        file: of the weights, named in errors.
    Raises:
        UserError: weights are missing, unexpected, or of another shape than in the config.
    """
    state = {name.removeprefix("text."): value for name, value in state.items()}
    table = pairs(config)
    _refuse_other_names(state, {pair.theirs for pair in table}, file)
    with torch.device("meta"):
        model = ClipsModel(config)
    shapes = {name: value.shape for name, value in model.named_parameters()}
    found = {name: torch.zeros(shapes[name]) for name in _absent(model)}
    for pair in table:
        for name, value in pair.split(state[pair.theirs]):
            if value.shape != shapes[name]:
                raise UserError(
                    f"its shape {tuple(state[pair.theirs].shape)} does not match the sizes in open_clip_config.json",
                    file=file,
                    key=pair.theirs,
                    remedy="download both files of one model",
                )
            found[name] = value
    return found


def to_theirs(model: ClipsModel) -> dict[str, torch.Tensor]:
    """Convert a model with class token to open_clip's state dict, without its captioner.

    Raises:
        UserError: a bias that CLIPS and open_clip lack is not zero.
    """
    state = {name: value.detach() for name, value in model.named_parameters()}
    for name in _absent(model):
        if state[name].any():
            raise UserError("not zero, and open_clip has no such weight", key=name, remedy="give a `pretrain` model")
    return {pair.theirs: pair.join(state) for pair in pairs(model.config)}


def _absent(model: ClipsModel) -> list[str]:
    absent = {id(value) for value in model.absent_parameters()}
    return [name for name, value in model.named_parameters() if id(value) in absent]


def _refuse_other_names(state: dict[str, torch.Tensor], known: set[str], file: Path) -> None:
    for kind, names in (("missing", known - set(state)), ("unexpected", set(state) - known)):
        if names:
            remedy = "the file does not belong to open_clip_config.json: download both again"
            raise UserError(f"{len(names)} {kind} weights (first: {min(names)})", file=file, remedy=remedy)
