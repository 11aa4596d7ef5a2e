"""`clips-mllm ablate`: repeat the paper's comparisons of caption length and objective on any shards.

recipe --> grid of runs --processes--> retrieval.json of each --> ablation.md, ablation.json, length.png, objectives.png
"""

from __future__ import annotations

import shlex
import sys
from pathlib import Path

from clips_eval.experiments.ablate_grid import AblateRecipe, settings
from vision_tower.common.errors import UserError, run_command
from vision_tower.common.recipe import parse_recipe
from vision_tower.pretraining.recipe import PretrainRecipe


def main(argv: list[str]) -> None:
    """Run the command.

    Raises:
        UserError: invalid recipe, runs of another recipe in the folder, or failed runs.
    """
    recipe = parse_recipe(AblateRecipe, argv, command="ablate")
    samples_seen = _check(recipe)

    from clips_eval.experiments.ablate_report import write_report
    from clips_eval.experiments.ablate_runner import run_cells, score
    from clips_eval.stats.provenance import refuse_mixed_precision

    done = run_cells(recipe)
    refuse_mixed_precision(cell.folder for cell in done)
    scores = {
        setting: [score(cell, recipe.metric) for cell in done if cell.setting == setting]
        for setting in settings(recipe)
    }
    print(write_report(recipe, scores, samples_seen, shlex.join(["clips-mllm", "ablate", *argv])))
    print(f"written to {Path(recipe.output_dir) / 'ablation.md'}")


def _check(recipe: AblateRecipe) -> int:
    """Return the number of pairs per run. Raises UserError if a recipe is invalid or the data are missing."""
    run = parse_recipe(PretrainRecipe, ["--config", str(recipe.pretrain)], command="pretrain")
    run.check()
    recipe.check(run.model.text_room)
    if not recipe.data.is_file():
        raise UserError("no such file", file=recipe.data, remedy="give a Karpathy-style JSON with --data")
    return run.training.max_steps * run.training.global_batch_size


if __name__ == "__main__":
    sys.exit(run_command(main))
