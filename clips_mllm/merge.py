"""`clips-mllm merge ADAPTER OUTPUT`: merge an adapter into its base model.

clips-mllm merge ADAPTER OUTPUT
"""

from __future__ import annotations

import dataclasses
import logging
import sys
from pathlib import Path
from typing import Literal

from vision_tower.common.errors import UserError, run_command
from vision_tower.common.recipe import parse_recipe

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, kw_only=True)
class MergeRecipe:
    """Merge an adapter into its base model and save a stock checkpoint with the same outputs.

    Args:
        adapter: folder of a LoRA, DoRA or QLoRA run, or one of its checkpoints.
        output: new folder for the merged checkpoint.
        dtype: auto (the base's), float32, bfloat16 or float16.
    """

    adapter: str
    output: str
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"


def main(argv: list[str]) -> None:
    """Load, merge and save; the output folder is written completely or not at all.

    A QLoRA adapter is merged into the dequantized 4-bit weights: it was trained on these, so merging it into the
    unquantized weights would change the outputs.
    """
    recipe = parse_recipe(MergeRecipe, argv, command="merge", positional=("adapter", "output"))

    from clips_mllm.model.adapters import is_adapter
    from clips_mllm.model.checkpoint import load_parts, save_mllm
    from vision_tower.common.files import new_folder
    from vision_tower.common.provenance import finish_provenance, start_provenance

    if not is_adapter(recipe.adapter):
        raise UserError("no adapter_config.json", file=recipe.adapter, remedy="give the folder of a LoRA run")
    with new_folder(Path(recipe.output)) as work:
        start_provenance(work, "merge", argv, {"adapter": recipe.adapter})
        model, processor = load_parts(recipe.adapter, dtype=recipe.dtype)
        save_mllm(model, processor, work)
        finish_provenance(work)
    logger.info("merged checkpoint in %s", recipe.output)


if __name__ == "__main__":
    sys.exit(run_command(main))
