"""open_clip's names of the weights and ours, both ways, from one table.

theirs   visual.* and the text tower at the top level (or below `text.`), queries, keys and values in one matrix,
         projections as (in, out)
ours     vision_model.* of ViTModel, text_model.* of SiglipTextModel, projections as Linear, (out, in)
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
class Pair:
    """One tensor of theirs and what it is here.

    Attributes:
        ours: several names where theirs is several of ours, one below the other.
        form: `same`; `transposed`; `table`, ours (1, n, w) for (n, w); `token`, ours (1, 1, w) for (w,); `number`, ours
            (1,) for one number of any shape.
    """

    theirs: str
    ours: tuple[str, ...]
    form: Literal["same", "transposed", "table", "token", "number"] = "same"

    def split(self, tensor: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
        """Theirs as ours."""
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
        """Ours as theirs."""
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


# Modules of a block that have a weight and a bias, as theirs and ours.
_MLP = {"mlp.c_fc": "mlp.fc1", "mlp.c_proj": "mlp.fc2"}
IMAGE_BLOCK = {"ln_1": "layernorm_before", "ln_2": "layernorm_after", "attn.out_proj": "attention.o_proj", **_MLP}
TEXT_BLOCK = {"ln_1": "layer_norm1", "ln_2": "layer_norm2", "attn.out_proj": "self_attn.out_proj", **_MLP}


def pairs(config: ClipsConfig) -> list[Pair]:
    """All tensors of the two towers; the captioner has no place in open_clip."""
    image = "vision_model.embeddings"
    text = "text_model.embeddings"
    found = [
        Pair("logit_scale", ("logit_scale",), "number"),
        Pair("visual.class_embedding", (f"{image}.cls_token",), "token"),
        Pair("visual.positional_embedding", (f"{image}.position_embeddings",), "table"),
        Pair("visual.conv1.weight", (f"{image}.patch_embeddings.projection.weight",)),
        Pair("visual.proj", ("visual_projection.weight",), "transposed"),
        Pair("token_embedding.weight", (f"{text}.token_embedding.weight",)),
        Pair("positional_embedding", (f"{text}.position_embedding.weight",)),
        Pair("text_projection", ("text_model.head.weight",), "transposed"),
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


def _block(theirs: str, ours: str, modules: dict[str, str], attention: str) -> Iterator[Pair]:
    for name, own in modules.items():
        yield from _module(f"{theirs}.{name}", f"{ours}.{own}")
    for what in ("weight", "bias"):
        three = tuple(f"{ours}.{attention}.{part}_proj.{what}" for part in "qkv")
        yield Pair(f"{theirs}.attn.in_proj_{what}", three)


def _module(theirs: str, ours: str) -> Iterator[Pair]:
    for what in ("weight", "bias"):
        yield Pair(f"{theirs}.{what}", (f"{ours}.{what}",))


def to_ours(state: dict[str, torch.Tensor], config: ClipsConfig, file: Path) -> dict[str, torch.Tensor]:
    """A state dict of `ClipsModel` without captioner, fp32, from open_clip's.

    Raises:
        UserError: weights that are missing, left over, or of another shape than the config says.
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
                    f"{pair.theirs} has the shape {tuple(state[pair.theirs].shape)}, which is not that "
                    f"of the sizes in open_clip_config.json",
                    file=file,
                    remedy="fetch both files of one model",
                )
            found[name] = value
    return found


def to_theirs(model: ClipsModel) -> dict[str, torch.Tensor]:
    """open_clip's state dict of a model with class token; its captioner, if any, is left out.

    Raises:
        UserError: a bias that CLIPS and open_clip do not have is not zero.
    """
    state = {name: value.detach() for name, value in model.named_parameters()}
    for name in _absent(model):
        if state[name].any():
            raise UserError(
                "not zero, and open_clip has no place for it", file=name, remedy="this is no model of `pretrain`"
            )
    return {pair.theirs: pair.join(state) for pair in pairs(model.config)}


def _absent(model: ClipsModel) -> list[str]:
    absent = {id(value) for value in model.absent_parameters()}
    return [name for name, value in model.named_parameters() if id(value) in absent]


def _refuse_other_names(state: dict[str, torch.Tensor], known: set[str], file: Path) -> None:
    for what, names in (("missing", known - set(state)), ("unexpected", set(state) - known)):
        if names:
            raise UserError(
                f"{len(names)} {what} weights (first: {min(names)})",
                file=file,
                remedy="the file is not of the model that open_clip_config.json describes, fetch both again",
            )
