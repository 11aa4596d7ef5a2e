"""open_clip folders, in and out: open_clip_config.json, weights and vocabulary.

json --open_clip_config--> ClipsConfig;  weights --open_clip_weights--> state dict;  vocab.txt --> ClipsTokenizer
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from vision_tower.checkpoints.loading import with_weights
from vision_tower.checkpoints.open_clip_config import FILE, read_config, write_config
from vision_tower.checkpoints.open_clip_weights import to_ours, to_theirs
from vision_tower.checkpoints.weight_files import read_tensors
from vision_tower.common.errors import UserError
from vision_tower.common.files import read_object, write_text
from vision_tower.model.modeling import ClipsModel
from vision_tower.model.positions import sincos_positions
from vision_tower.text.tokenizer import BOS, EOS, UNUSED, ClipsTokenizer

WEIGHTS = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")
SUFFIXES = (".safetensors", ".bin", ".pt")


def read_open_clip(folder: Path) -> tuple[ClipsModel, ClipsTokenizer | None]:
    """Read a model without captioner, and its tokenizer if the folder has one.

    open_clip stores sin-cos positions as weights: they count as sin-cos if they equal the table.

    Raises:
        UserError: a damaged file, or a model that is not of the CLIPS layout.
    """
    config = read_config(folder / FILE)
    tokenizer = read_tokenizer(folder)
    if tokenizer is not None:
        if len(tokenizer) > config.text_config.vocab_size:
            raise UserError(
                f"the vocabulary has {len(tokenizer)} tokens, more than "
                f"text_cfg.vocab_size={config.text_config.vocab_size}",
                file=folder,
                remedy="use the vocabulary that the model was trained with",
            )
        special = {"pad_token_id": tokenizer.pad, "bos_token_id": tokenizer.bos, "eos_token_id": tokenizer.eos}
        config.text_config.update(special)
    file = find_weights(folder)
    tensors = read_tensors(file)
    state = to_ours(tensors, config, file)
    vision = config.vision_config
    table = sincos_positions(vision.image_size // vision.patch_size, vision.hidden_size, class_token=True)
    positions = state["vision_model.embeddings.position_embeddings"][0]
    half = any(value.dtype in (torch.float16, torch.bfloat16) for value in tensors.values())
    fixed = torch.allclose(positions, table, atol=8e-3 if half else 1e-4)  # below 1, bf16 rounds by up to 2e-3
    config.positions = "sincos" if fixed else "learned"
    return with_weights(ClipsModel, config, state, file), tokenizer


def save_open_clip(model: ClipsModel, tokenizer: ClipsTokenizer, folder: Path, name: str) -> None:
    """Write a folder that open_clip reads as `local-dir:FOLDER`, without the captioner, which open_clip does not have.

    Args:
        name: hub id or name that the JSON gives for the tokenizer.
    Raises:
        UserError: a model that open_clip cannot represent.
    """
    config = write_config(model.config, name)
    save_file(to_theirs(model), folder / WEIGHTS[0], metadata={"format": "pt"})
    tokenizer.save_pretrained(folder)
    write_text(folder / FILE, json.dumps(config, indent=2) + "\n")


def find_weights(folder: Path) -> Path:
    """Find the weight file: one of open_clip's names, otherwise the only file with a weight suffix.

    Raises:
        UserError: no such file, or several.
    """
    for name in WEIGHTS:
        if (folder / name).is_file():
            return folder / name
    found = sorted(file for file in folder.iterdir() if file.suffix in SUFFIXES)
    if len(found) != 1:
        problem = "no weight file" if not found else f"{len(found)} files could be the weights"
        raise UserError(problem, file=folder, remedy=f"name the right one {WEIGHTS[0]}")
    return found[0]


def read_tokenizer(folder: Path) -> ClipsTokenizer | None:
    """Read the tokenizer from `vocab.txt` or `tokenizer.json`; None if there is neither.

    Published models use BERT's vocabulary, with two unused tokens as `[bos]` and `[eos]`.

    Raises:
        UserError: a file that is not a WordPiece vocabulary of the CLIPS layout.
    """
    vocabulary, serialized = folder / "vocab.txt", folder / "tokenizer.json"
    if vocabulary.is_file():
        return ClipsTokenizer.from_vocabulary(vocabulary, _special_names(folder))
    if not serialized.is_file():
        return None
    try:
        pieces = {str(piece): int(index) for piece, index in read_object(serialized)["model"]["vocab"].items()}
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError("not a WordPiece tokenizer", file=serialized, remedy="add the model's vocab.txt") from error
    return ClipsTokenizer.from_pieces(pieces, serialized, _special_names(folder))


def _special_names(folder: Path) -> dict[str, str]:
    """Map the names of the two special tokens in `tokenizer_config.json`, which vary between models, to ours."""
    file = folder / "tokenizer_config.json"
    settings = read_object(file) if file.is_file() else {}
    names: dict[str, str] = {}
    for key, own in (("bos_token", BOS), ("eos_token", EOS)):
        name = settings.get(key)
        name = name.get("content") if isinstance(name, dict) else name
        if isinstance(name, str):
            names[name] = own
    return names or UNUSED
