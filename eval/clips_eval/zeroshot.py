"""`clips-mllm zeroshot ENCODER --data FOLDER`: zero-shot classification of the images in class folders.

FOLDER/CLASS/*.jpg, templates, class names --encoder--> top-1, top-5, mean per class --> zeroshot.json
"""

from __future__ import annotations

import logging
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vision_tower.common.errors import NotFinite, run_command
from vision_tower.common.files import make_folder
from vision_tower.common.recipe import check_ranges, parse_recipe

logger = logging.getLogger(__name__)

FORMAT = 1  # of zeroshot.json


@dataclass(frozen=True, kw_only=True)
class ZeroShotRecipe:
    """Measure an encoder's zero-shot classification on a folder of class folders (ImageFolder).

    Args:
        encoder: folder of an encoder, as written by 'pretrain' and 'convert'.
        data: folder that contains one folder of images per class.
        templates: text file with one prompt per line, {} marks the class name; by default eight simple prompts.
        classes: text file with one class name per line, in the order of the sorted class folders; by default the
            folders' names with spaces for underscores.
        output: result file, by default ENCODER/zeroshot.json.
        batch_size: images, or prompts, per batch.
        max_bad_fraction: fraction of unreadable images above which the run stops; fewer are left out and counted.
        device: auto, cpu or cuda.
    """

    encoder: Path
    data: Path
    templates: Path | None = None
    classes: Path | None = None
    output: Path | None = None
    batch_size: int = 64
    max_bad_fraction: float = 0.01
    device: str = "auto"

    def check(self) -> None:
        """Raise UserError on values that are out of range."""
        check_ranges(self, batch_size="[1, inf)", max_bad_fraction="[0, 1)")


def main(argv: list[str]) -> None:
    """Run the command.

    Raises:
        UserError: bad data, too many unreadable images, an unusable encoder.
    """
    start = time.perf_counter()
    recipe = parse_recipe(ZeroShotRecipe, argv, command="zeroshot", positional=("encoder",))
    recipe.check()

    from vision_tower.data.image_folder import load_task

    task = load_task(recipe.data, recipe.templates, recipe.classes)
    for name, folders in task.duplicate_names.items():
        logger.warning("%s are all named '%s'; no encoder can tell their images apart", ", ".join(folders), name)

    from clips_eval.retrieval.scores import zeroshot_intervals
    from clips_eval.stats.json_files import write_json
    from clips_eval.stats.provenance import diverged, provenance
    from vision_tower.checkpoints.encoder import load_encoder
    from vision_tower.data.image_batches import SkipCounter
    from vision_tower.evaluation.zeroshot import classify

    encoder = load_encoder(recipe.encoder, recipe.device)
    output = recipe.output or recipe.encoder / "zeroshot.json"
    make_folder(output.parent)  # fail before the work if it is not writable
    skips = SkipCounter(str(recipe.data), recipe.max_bad_fraction)
    try:
        scores = classify(encoder, task, recipe.batch_size, skips)
    except NotFinite as error:
        raise diverged(recipe.encoder) from error
    per_class = zip(task.folders, task.names, scores.images_per_class, scores.per_class, strict=True)
    result = {
        "format": FORMAT,
        "top1": scores.top1,
        "top5": scores.top5,
        "mean_per_class": scores.mean_per_class,
        "intervals": zeroshot_intervals(scores),
        "n_images": sum(scores.images_per_class),
        "n_texts": len(task.names) * len(task.templates),
        "n_classes": len(task.names),
        "n_skipped": skips.bad,
        "data": str(recipe.data),
        "templates": task.templates,
        "classes": [{"folder": folder, "name": name, "n": n, "top1": top1} for folder, name, n, top1 in per_class],
        **provenance(recipe.encoder, encoder, "zeroshot", argv),
        "seconds": round(time.perf_counter() - start, 2),
    }
    write_json(output, result)
    print(_table(result, output))


def _table(result: dict[str, Any], output: Path) -> str:
    names = {"top1": "top-1", "top5": "top-5", "mean_per_class": "mean per class"}
    lines = [
        f"{name:16}{result[key]:8.1%}   95 %: {_ends(result['intervals'][key])}"
        for key, name in names.items()
        if result[key] is not None
    ]
    skipped = f" ({result['n_skipped']} unreadable images left out)" if result["n_skipped"] else ""
    counts = f"{result['n_images']} images{skipped}, {result['n_classes']} classes, {result['n_texts']} prompts"
    return "\n".join([*lines, f"{counts}; {result['seconds']:.0f} s; written to {output}"])


def _ends(interval: dict[str, Any]) -> str:
    return "–" if interval["low"] is None else f"{100 * interval['low']:.1f}–{100 * interval['high']:.1f}"


if __name__ == "__main__":
    sys.exit(run_command(main))
