"""`clips-mllm convert SRC DST --to FORMAT`: convert checkpoints.

encoder of `pretrain` or open_clip                           --> clips | tower | open_clip
mm_projector.bin, LoRA folder or full original LLaVA folder  --> llava            stock model, processor, template
checkpoint of `train`                                        --> llava_projector  mm_projector.bin, config.json
"""

from __future__ import annotations

import dataclasses
import logging
import sys
from pathlib import Path
from typing import Literal

from clips_mllm.prompts.render import TemplateName
from vision_tower.common.errors import run_command
from vision_tower.common.files import new_folder
from vision_tower.common.recipe import parse_recipe, refuse_unused

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ConvertRecipe:
    """Convert encoders and multimodal LLMs between the formats in which they are published, trained and used.

    Args:
        source: an encoder (folder of a `pretrain` run or of an open_clip model); with --to llava an original LLaVA
            checkpoint (full, LoRA, or an mm_projector.bin); with --to llava_projector a checkpoint of `train`.
        destination: a new folder.
        to: clips (as `pretrain` saves it), tower (the stock vision tower alone), open_clip, llava (a stock multimodal
            LLM) or llava_projector (an mm_projector.bin for the original LLaVA code).
        tower: vision tower of an original LLaVA checkpoint, a folder or hub id; default is the one in its config.
        llm: LLM that an original LoRA or mm_projector.bin was trained with; a LoRA's config names one.
        template: chat template that an original LLaVA checkpoint was trained with.
    """

    source: Path
    destination: Path
    to: Literal["clips", "tower", "open_clip", "llava", "llava_projector"]
    tower: str | None = None
    llm: str | None = None
    template: TemplateName = "vicuna_v1"


# Options that change nothing in a conversion, and are refused there.
UNUSED = {
    "clips": ("tower", "llm"),
    "tower": ("tower", "llm"),
    "open_clip": ("tower", "llm"),
    "llava": (),
    "llava_projector": ("llm",),
}


def main(argv: list[str]) -> None:
    """Convert, and write the destination completely or not at all.

    Raises:
        UserError: a source of another kind than `to` needs, a damaged file, parts that do not fit together, or a
            destination that is not empty.
    """
    from vision_tower.common.provenance import finish_provenance, start_provenance

    recipe = parse_recipe(ConvertRecipe, argv, command="convert", positional=("source", "destination"))
    refuse_unused(recipe, UNUSED[recipe.to], f"has no effect with --to {recipe.to}", "--")
    with new_folder(recipe.destination) as work:
        inputs = {"source": str(recipe.source), "tower": recipe.tower, "llm": recipe.llm}
        start_provenance(work, "convert", argv, inputs)
        convert(recipe, work)
        finish_provenance(work)
    logger.info("%s: written as %s", recipe.destination, recipe.to)


def convert(recipe: ConvertRecipe, folder: Path) -> None:
    """Write the converted checkpoint to `folder`."""
    match recipe.to:
        case "clips" | "tower" | "open_clip":
            from vision_tower.checkpoints.convert import convert_encoder

            convert_encoder(recipe.source, folder, recipe.to, name=recipe.destination.name)
        case "llava":
            convert_original(recipe, folder)
        case "llava_projector":
            from clips_mllm.formats.original_weights import write_projector

            write_projector(recipe.source, folder, tower=recipe.tower)


def convert_original(recipe: ConvertRecipe, folder: Path) -> None:
    """Write an original LLaVA checkpoint as a stock one with processor and chat template."""
    from clips_mllm.formats.original_llava import read_original
    from clips_mllm.model.checkpoint import save_mllm
    from clips_mllm.prompts.chat_template import adopt_template

    model, processor = read_original(recipe.source, tower=recipe.tower, llm=recipe.llm)
    adopt_template(processor, recipe.template, model, key="--template")
    save_mllm(model, processor, folder)


if __name__ == "__main__":
    sys.exit(run_command(main))
