"""`clips-mllm convert SRC DST --to clips|tower|open_clip`: checkpoints of CLIPS encoders, in and out.

open_clip folder (json + weights) --+                      +--> clips      ClipsModel, tokenizer, tower/
                                    +--> model, tokenizer --+--> tower      the stock image tower and its processor
`pretrain` run ---------------------+                      +--> open_clip  json, safetensors, tokenizer
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from vision_tower.checkpoints.recipe import ConvertRecipe
from vision_tower.common.errors import UserError, run_command
from vision_tower.common.files import new_folder, write_text
from vision_tower.common.recipe import parse_recipe

if TYPE_CHECKING:
    from vision_tower.model.modeling import ClipsModel
    from vision_tower.text.tokenizer import ClipsTokenizer

WEIGHTS = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")
SUFFIXES = (".safetensors", ".bin", ".pt")


def main(argv: list[str]) -> None:
    """Run the command.

    Raises:
        UserError: a source that is neither, is damaged or is no CLIPS model; a destination that is not empty.
    """
    convert(parse_recipe(ConvertRecipe, argv, command="convert", positional=("source", "destination")))


def convert(recipe: ConvertRecipe) -> None:
    """Read, write whole or not at all, and say so. Raises UserError as `main` does."""
    with new_folder(recipe.destination) as work:
        model, tokenizer = read_source(recipe.source)
        print(f"{recipe.source}: {describe(model)}", flush=True)
        write(recipe, model, tokenizer, work)
    print(f"{recipe.destination}: written as {recipe.to}")


def write(recipe: ConvertRecipe, model: ClipsModel, tokenizer: ClipsTokenizer | None, folder: Path) -> None:
    """Leave the model in `folder` in the form that the recipe names."""
    from vision_tower.checkpoints.encoder import make_readable, save_encoder, save_tower

    if recipe.to == "tower":
        save_tower(model, folder)
    elif tokenizer is None:
        raise UserError("no vocab.txt or tokenizer.json", file=recipe.source, remedy="put the model's vocabulary there")
    elif recipe.to == "clips":
        save_encoder(model, tokenizer, folder)
    else:
        save_open_clip(model, tokenizer, folder, recipe.destination.name)
    make_readable(folder)


def read_source(folder: Path) -> tuple[ClipsModel, ClipsTokenizer | None]:
    """Model and tokenizer of either kind of folder; an open_clip folder may lack the tokenizer."""
    from vision_tower.checkpoints.loading import load_model
    from vision_tower.checkpoints.open_clip_config import FILE
    from vision_tower.checkpoints.weight_files import refuse_not_finite
    from vision_tower.text.tokenizer import ClipsTokenizer

    if (folder / FILE).is_file():
        return read_open_clip(folder)
    if (folder / "config.json").is_file():
        model = load_model(folder)
        refuse_not_finite(folder, model.state_dict())
        return model, ClipsTokenizer.from_pretrained(folder)
    raise UserError(
        f"neither {FILE} nor config.json here", file=folder, remedy="give a folder of open_clip or of `pretrain`"
    )


def read_open_clip(folder: Path) -> tuple[ClipsModel, ClipsTokenizer | None]:
    """A published model, without captioner; its positions count as sin-cos where they are."""
    import torch

    from vision_tower.checkpoints.loading import with_weights
    from vision_tower.checkpoints.open_clip_config import FILE, read_config
    from vision_tower.checkpoints.open_clip_weights import to_ours
    from vision_tower.checkpoints.published_vocabulary import read_tokenizer
    from vision_tower.checkpoints.weight_files import read_tensors
    from vision_tower.model.modeling import ClipsModel
    from vision_tower.model.positions import sincos_positions

    config = read_config(folder / FILE)
    tokenizer = read_tokenizer(folder)
    if tokenizer is not None:
        if len(tokenizer) > config.text_config.vocab_size:
            raise UserError(
                f"its vocabulary has {len(tokenizer)} pieces, more than "
                f"text_cfg.vocab_size={config.text_config.vocab_size}",
                file=folder,
                remedy="put the model's own vocabulary there",
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
    fixed = torch.allclose(positions, table, atol=8e-3 if half else 1e-4)  # below 1 bf16 rounds by up to 2e-3
    config.positions = "sincos" if fixed else "learned"
    return with_weights(ClipsModel, config, state, file), tokenizer


def find_weights(folder: Path) -> Path:
    """The file of weights: by open_clip's names, or the only one there is. Raises UserError."""
    for name in WEIGHTS:
        if (folder / name).is_file():
            return folder / name
    found = sorted(file for file in folder.iterdir() if file.suffix in SUFFIXES)
    if len(found) != 1:
        what = "no file of weights" if not found else f"{len(found)} files that could be the weights"
        raise UserError(f"{what}", file=folder, remedy=f"put {WEIGHTS[0]} there")
    return found[0]


def save_open_clip(model: ClipsModel, tokenizer: ClipsTokenizer, folder: Path, name: str) -> None:
    """What open_clip reads as `local-dir:FOLDER`. A captioner, which it has no place for, stays behind."""
    from safetensors.torch import save_file

    from vision_tower.checkpoints.open_clip_config import FILE, write_config
    from vision_tower.checkpoints.open_clip_weights import to_theirs

    config = write_config(model.config, name)
    save_file(to_theirs(model), folder / WEIGHTS[0], metadata={"format": "pt"})
    tokenizer.save_pretrained(folder)
    write_text(folder / FILE, json.dumps(config, indent=2) + "\n")


def describe(model: ClipsModel) -> str:
    """One line of what a model is."""
    from vision_tower.model.towers import has_class_token

    vision = model.config.vision_config
    millions = sum(value.numel() for value in model.parameters()) / 1e6
    return (
        f"width {vision.hidden_size}, {vision.num_hidden_layers} layers, patch {vision.patch_size}, "
        f"{vision.image_size} pixels, {'with' if has_class_token(vision) else 'without'} class token, "
        f"{model.config.positions} positions, {'with' if model.captioner else 'without'} captioner; "
        f"{millions:.1f}M parameters"
    )


if __name__ == "__main__":
    sys.exit(run_command(main))
