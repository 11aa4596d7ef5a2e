"""Conversion of encoders between the formats in which they are trained, used and published.

open_clip folder ----+                       +--> clips      ClipsModel, tokenizer, tower/
                     +--> model, tokenizer --+--> tower      the stock vision tower and its image processor
`pretrain` run ------+                       +--> open_clip  json, safetensors, tokenizer
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from vision_tower.checkpoints.encoder import make_readable, save_encoder, save_tower
from vision_tower.checkpoints.loading import load_model
from vision_tower.checkpoints.open_clip import read_open_clip, save_open_clip
from vision_tower.checkpoints.open_clip_config import FILE
from vision_tower.checkpoints.weight_files import refuse_not_finite
from vision_tower.common.errors import UserError
from vision_tower.model.modeling import ClipsModel
from vision_tower.model.towers import has_class_token
from vision_tower.text.tokenizer import ClipsTokenizer

EncoderFormat = Literal["clips", "tower", "open_clip"]


def convert_encoder(source: Path, folder: Path, to: EncoderFormat, name: str) -> str:
    """Write the encoder in `source` to `folder` in another format, and return a one-line description of the model.

    Args:
        name: of the model, for open_clip's JSON.
    Raises:
        UserError: no encoder in `source`, a damaged file, or a model that the format cannot represent.
    """
    model, tokenizer = read_encoder(source)
    if to == "tower":
        save_tower(model, folder)
    elif tokenizer is None:
        raise UserError(
            "no vocab.txt or tokenizer.json", file=source, remedy="put the model's vocabulary in this folder"
        )
    elif to == "clips":
        save_encoder(model, tokenizer, folder)
    else:
        save_open_clip(model, tokenizer, folder, name)
    make_readable(folder)
    return describe(model)


def read_encoder(folder: Path) -> tuple[ClipsModel, ClipsTokenizer | None]:
    """Read model and tokenizer of a `pretrain` run or an open_clip folder; the latter may lack the tokenizer."""
    if (folder / FILE).is_file():
        return read_open_clip(folder)
    if (folder / "config.json").is_file():
        model = load_model(folder)
        refuse_not_finite(folder, model.state_dict())
        return model, ClipsTokenizer.from_pretrained(folder)
    raise UserError(
        f"neither {FILE} nor config.json in this folder",
        file=folder,
        remedy="give the folder of a `pretrain` run or of an open_clip model",
    )


def describe(model: ClipsModel) -> str:
    """Sizes of a model in one line."""
    vision = model.config.vision_config
    millions = sum(value.numel() for value in model.parameters()) / 1e6
    return (
        f"width {vision.hidden_size}, {vision.num_hidden_layers} layers, patch {vision.patch_size}, "
        f"{vision.image_size} pixels, {'with' if has_class_token(vision) else 'without'} class token, "
        f"{model.config.positions} positions, {'with' if model.captioner else 'without'} captioner; "
        f"{millions:.1f}M parameters"
    )
