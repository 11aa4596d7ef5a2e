"""`clips-mllm merge`: an adapter and its base become one plain checkpoint.

clips-mllm merge runs/vicuna_7b_finetune_lora runs/vicuna_7b_merged
"""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Literal

from vision_tower.common.errors import UserError, run_command
from vision_tower.common.recipe import parse_recipe


@dataclasses.dataclass(frozen=True, kw_only=True)
class MergeRecipe:
    """Merge an adapter into its base: a stock checkpoint that answers as the adapter does.

    Args:
        adapter: folder of a LoRA, DoRA or QLoRA run, or one of its checkpoints.
        output: new folder for the merged checkpoint.
        dtype: auto (the base's), float32, bfloat16 or float16.
    """

    adapter: str
    output: str
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"


def main(argv: list[str]) -> None:
    """Load, merge, save whole or not at all.

    A QLoRA adapter is merged into the base's 4-bit weights turned back into numbers: they are what it learnt to
    correct, and with the unquantised weights the answers would be others.
    """
    recipe = parse_recipe(MergeRecipe, argv, command="merge", positional=("adapter", "output"))

    from clips_mllm.model.adapters import is_adapter
    from clips_mllm.model.checkpoint import load_parts, save_mllm
    from clips_mllm.provenance.manifest import note_origin
    from vision_tower.common.files import new_folder

    if not is_adapter(recipe.adapter):
        raise UserError(
            "no adapter here (adapter_config.json)", file=recipe.adapter, remedy="give the folder of a LoRA run"
        )
    with new_folder(Path(recipe.output)) as work:
        model, processor = load_parts(recipe.adapter, dtype=recipe.dtype)
        save_mllm(model, processor, work)
        note_origin(work, made_by="merge", adapter=recipe.adapter)
    print(f"merged checkpoint in {recipe.output}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(run_command(main))
