"""`clips-mllm convert SRC DST --to clips|tower|open_clip|llava|llava_projector`: checkpoints in and out.

encoders                                                     --> vision_tower.convert
mm_projector.bin, LoRA folder, whole original LLaVA folder   --> llava            stock model, processor, template
checkpoint of `train`                                        --> llava_projector  mm_projector.bin, config.json
"""

from __future__ import annotations

import sys

from clips_mllm.formats.recipe import ConvertRecipe
from vision_tower.checkpoints.recipe import ConvertRecipe as EncoderRecipe
from vision_tower.common.errors import UserError, run_command
from vision_tower.common.files import new_folder
from vision_tower.common.recipe import parse_recipe


def main(argv: list[str]) -> None:
    """Run the command.

    Raises:
        UserError: a source that is not what `to` wants, is damaged or does not fit; a destination that is not empty.
    """
    recipe = parse_recipe(ConvertRecipe, argv, command="convert", positional=("source", "destination"))
    match recipe.to:
        case "clips" | "tower" | "open_clip":
            refuse_unused(recipe)
            from vision_tower.convert import convert

            convert(EncoderRecipe(source=recipe.source, destination=recipe.destination, to=recipe.to))
        case "llava":
            import_llava(recipe)
        case "llava_projector":
            export_projector(recipe)


def refuse_unused(recipe: ConvertRecipe) -> None:
    """Raise UserError where a field is given that an encoder has no use for."""
    for name in ("tower", "llm"):
        if getattr(recipe, name) is not None:
            raise UserError(f"--{name}: an encoder's conversion has no use for it", remedy="it belongs to '--to llava'")


def import_llava(recipe: ConvertRecipe) -> None:
    """An original LLaVA checkpoint as a stock one."""
    from clips_mllm.formats.original_llava import read_original
    from clips_mllm.model.checkpoint import save_mllm
    from clips_mllm.prompts.chat_template import adopt_template
    from clips_mllm.provenance.manifest import note_origin

    with new_folder(recipe.destination) as work:
        model, processor, line = read_original(recipe.source, tower=recipe.tower, llm=recipe.llm)
        print(f"{recipe.source}: {line}", flush=True)
        adopt_template(processor, recipe.template, model, key="--template")
        save_mllm(model, processor, work)
        note_origin(work, made_by="convert", source=str(recipe.source), tower=recipe.tower, llm=recipe.llm)
    print(f"{recipe.destination}: written as a stock LLaVA checkpoint; conversations as {recipe.template}")


def export_projector(recipe: ConvertRecipe) -> None:
    """The projector of a stock checkpoint under its original names."""
    from clips_mllm.formats.original_weights import write_projector

    with new_folder(recipe.destination) as work:
        write_projector(recipe.source, work, tower=recipe.tower)
    print(f"{recipe.destination}: mm_projector.bin and config.json, for --pretrain_mm_mlp_adapter of the original code")


if __name__ == "__main__":
    sys.exit(run_command(main))
