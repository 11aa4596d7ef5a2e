"""What an earlier evaluation left where this one would write: a smaller run must not take its place unasked."""

from __future__ import annotations

from pathlib import Path

from clips_eval.lmms.recipe import EvaluateRecipe
from vision_tower.common.errors import UserError
from vision_tower.common.files import read_object

FORMAT = 2  # of lmms.json; 1 had no intervals and no parts of single documents
REMEDY = "give --output, or remove the file"


def refuse_smaller(recipe: EvaluateRecipe) -> None:
    """Look at the result file of every variant.

    Raises:
        UserError: one of them holds a task that the recipe does not have, or more documents of each, or is not a
            result of this version.
    """
    for file in (recipe.result_of(variant) for variant in recipe.variants):
        if file.is_file():
            _refuse(file, recipe)


def _refuse(file: Path, recipe: EvaluateRecipe) -> None:
    stored = read_object(file)
    try:
        known = stored["format"] == FORMAT
        # Of a task that was left out or failed it holds no score.
        measured = {spec["task"] for spec in stored["recipe"]["tasks"]} - {*stored["skipped"], *stored["failed"]}
        limit = stored["recipe"]["limit"]
    except (KeyError, TypeError):
        known = False
    if not known:
        # A finished result of another version, or a file of something else: nobody can tell what would be lost.
        raise UserError("not a result of this version of 'clips-mllm evaluate'", file=file, remedy=f"{REMEDY}")
    if more := measured - {spec.task for spec in recipe.specs}:
        raise UserError(
            f"holds {', '.join(sorted(more))}, which this run would not measure", file=file, remedy=f"{REMEDY}"
        )
    if recipe.limit is not None and (limit is None or limit > recipe.limit):
        before = "without --limit" if limit is None else f"with --limit {limit}"
        raise UserError(f"measured {before}, this run has --limit {recipe.limit}", file=file, remedy=f"{REMEDY}")
