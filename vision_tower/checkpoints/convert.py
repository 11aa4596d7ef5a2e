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
from vision_tower.text.tokenizer import ClipsTokenizer

EncoderFormat = Literal["clips", "tower", "open_clip"]


def convert_encoder(source: Path, folder: Path, to: EncoderFormat, name: str) -> None:
    """Write the encoder in `source` to `folder` in another format.

    Args:
        name: of the model, for open_clip's JSON.
    Raises:
        UserError: no encoder in `source`, a damaged file, or a model that the format cannot represent.
    """
    model, tokenizer = read_encoder(source)
    if to == "tower":
        save_tower(model, folder)
    elif tokenizer is None:
        raise UserError("no vocab.txt or tokenizer.json", file=source, remedy="put the model's vocabulary there")
    elif to == "clips":
        save_encoder(model, tokenizer, folder)
    else:
        save_open_clip(model, tokenizer, folder, name)
    make_readable(folder)


def read_encoder(folder: Path) -> tuple[ClipsModel, ClipsTokenizer | None]:
    """Read model and tokenizer of a `pretrain` run or an open_clip folder; the latter may lack the tokenizer."""
    if (folder / FILE).is_file():
        return read_open_clip(folder)
    if (folder / "config.json").is_file():
        model = load_model(folder)
        refuse_not_finite(folder, model.state_dict())
        return model, ClipsTokenizer.from_pretrained(folder)
    raise UserError(f"neither {FILE} nor config.json", file=folder, remedy="give a `pretrain` run or open_clip model")
