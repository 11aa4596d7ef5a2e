"""The result file of an evaluation (lmms.json): overwrite check, provenance, writing, table for the terminal."""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from clips_eval.lmms.recipe import EvaluateRecipe, Variant
from clips_eval.stats.json_files import write_json
from clips_eval.stats.provenance import checkpoint_digest
from vision_tower.common.errors import UserError
from vision_tower.common.files import read_object, write_text
from vision_tower.common.provenance import hardware, versions

FORMAT = 2  # of lmms.json
REMEDY = "give another --output, or remove the file"


def check_overwrite(recipe: EvaluateRecipe) -> None:
    """Check that no variant's result file would be replaced by a smaller evaluation.

    Raises:
        UserError: a result file has a task that the recipe does not, or more documents per task, or another format.
    """
    for file in (recipe.result_of(variant) for variant in recipe.variants):
        if file.is_file():
            _check_file(file, recipe)


def _check_file(file: Path, recipe: EvaluateRecipe) -> None:
    stored = read_object(file)
    try:
        known = stored["format"] == FORMAT
        # Skipped and failed tasks have no score in the file.
        measured = {spec["task"] for spec in stored["recipe"]["tasks"]} - {*stored["skipped"], *stored["failed"]}
        limit = stored["recipe"]["limit"]
    except (KeyError, TypeError):
        known = False
    if not known:
        raise UserError("not a result of this version of 'clips-mllm evaluate'", file=file, remedy=REMEDY)
    if more := measured - {spec.task for spec in recipe.specs}:
        raise UserError(
            "this run would not measure them", file=file, key="tasks", value=", ".join(sorted(more)), remedy=REMEDY
        )
    if recipe.limit is not None and (limit is None or limit > recipe.limit):
        raise UserError(
            f"has more documents per task than this run with --limit {recipe.limit}",
            file=file,
            key="limit",
            value="all" if limit is None else limit,
            remedy=REMEDY,
        )


def provenance(recipe: EvaluateRecipe, variant: Variant, command: str) -> dict[str, Any]:
    """Return the part of lmms.json that describes the model, the recipe and the machine."""
    folder = Path(recipe.checkpoint)
    has_weights = folder.is_dir() and any(folder.glob("model*.safetensors"))
    return {
        "format": FORMAT,
        "model": recipe.checkpoint,
        "sha256": checkpoint_digest(folder) if has_weights else None,
        "engine": recipe.model,
        "mode": recipe.mode,
        "control": variant.control,
        "wording": variant.wording,
        "versions": versions(),
        "hardware": hardware(),
        "processes": int(os.environ.get("WORLD_SIZE", "1")),
        "recipe": json.loads(json.dumps(asdict(recipe), default=str)),
        "command": command,
    }


def write_result(output: Path, result: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> None:
    """Write the samples file, and then the scores: a file with scores means a finished evaluation of its tasks."""
    write_text(output.parent / result["samples_file"], "".join(json.dumps(row) + "\n" for row in rows))
    write_json(output, dict(result))


def table(result: Mapping[str, Any], output: Path, logged: Collection[str] = ()) -> str:
    """Return the scores with their intervals, and notes on skipped and failed tasks, for the terminal.

    Args:
        logged: skipped tasks that need no note, since they are in the log.
    """
    lines = [f"{'task':<24}{'metric':<18}{'value':>8}{'95 %':>16}{'n':>8}"]
    for task, scores in result["tasks"].items():
        for metric, score in scores.items():
            if metric != "n":
                interval = result["intervals"][task][metric]
                ends = "–" if interval["low"] is None else f"{interval['low']:.3f}–{interval['high']:.3f}"
                value = f"{score:.3f}" if interval["n"] else "–"  # undefined, as precision if no answer is yes
                lines.append(f"{task:<24}{metric:<18}{value:>8}{ends:>16}{interval['n']:>8}")
    notes = [f"skipped: {task}: {reason}" for task, reason in result["skipped"].items() if task not in logged]
    notes += [f"failed: {task}: {reason}" for task, reason in result["failed"].items()]
    if result["control"] != "none":
        notes.append(f"control: {result['control'].replace('_', ' ')}")
    if result["wording"]:
        notes.append(f"wording: {result['wording']}")
    return "\n".join([*lines, *notes, f"written to {output}" if result["tasks"] else "nothing written"])
