"""`clips-mllm retrieve ENCODER --data test.json`: recall@1/5/10 between images and captions.

Karpathy JSON or CSV --> pairs --encoder--> embeddings --recall_at_k--> retrieval.json
"""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from vision_tower.errors import UserError, run_command
from vision_tower.recipe import parse_recipe


@dataclass(frozen=True, kw_only=True)
class RetrieveRecipe:
    """Measure an encoder's retrieval on a Karpathy-style JSON (COCO, Flickr30K, the sample world) or a CSV.

    Args:
        encoder: folder of an encoder, as 'pretrain' and 'convert' write it.
        data: the file with the captions.
        format: karpathy (images with "filename", "split", "sentences" and, as COCO's do, a folder "filepath"), or csv
            (a header, then a row for each caption; rows that name the same picture describe it together).
        images: folder of the pictures; the file's own folder if not given.
        split: karpathy; which of the file's splits to measure.
        image_column: csv; the column with the picture's path.
        caption_column: csv; the column with the caption.
        separator: csv; what stands between columns.
        output: where the scores go; ENCODER/retrieval.json if not given.
        batch_size: pictures, or captions, at a time.
        most_bad: share of unreadable pictures above which the run stops; below it they are left out and counted.
        device: auto, cpu or cuda.
    """

    encoder: Path
    data: Path
    format: Literal["karpathy", "csv"] = "karpathy"
    images: Path | None = None
    split: str = "test"
    image_column: str = "image"
    caption_column: str = "caption"
    separator: str = ","
    output: Path | None = None
    batch_size: int = 64
    most_bad: float = 0.01
    device: str = "auto"

    def check(self) -> None:
        """Raise UserError where a value has no meaning."""
        if self.batch_size < 1:
            raise UserError(f"--batch_size {self.batch_size}: at least 1 is needed")
        if not 0 <= self.most_bad < 1:
            raise UserError(f"--most_bad {self.most_bad}: a share from 0 to below 1 is needed")
        if len(self.separator) != 1:
            raise UserError(f"--separator {self.separator!r}: one character is needed; a tab is $'\\t' in the shell")


def main(argv: list[str]) -> None:
    """Run the command.

    Raises:
        UserError: bad data, no picture of the split, too many unreadable pictures, an unusable encoder.
    """
    start = time.perf_counter()
    recipe = parse_recipe(RetrieveRecipe, argv, command="retrieve", positional=("encoder",))
    recipe.check()
    pairs = _pairs(recipe)

    from clips_eval.provenance import provenance
    from clips_eval.report_files import write_json
    from clips_eval.retrieval_scores import examples, score
    from vision_tower.embedding import embed_pairs
    from vision_tower.encoder import load_encoder
    from vision_tower.pictures import Skips

    encoder = load_encoder(recipe.encoder, recipe.device)
    skips = Skips(str(recipe.data), recipe.most_bad)
    found = embed_pairs(encoder, pairs, recipe.batch_size, skips, total=len(pairs))
    output = recipe.output or recipe.encoder / "retrieval.json"
    result = {
        **score(recipe.encoder, found),
        "n_images": len(found.images),
        "n_texts": len(found.texts),
        "n_skipped": skips.bad,
        "data": str(recipe.data),
        "split": recipe.split if recipe.format == "karpathy" else None,
        **provenance(recipe.encoder, encoder, "retrieve", argv),
        "examples": examples(found, output.parent),
        "seconds": round(time.perf_counter() - start, 2),
    }
    write_json(output, result)
    print(_table(result, output))


def _pairs(recipe: RetrieveRecipe) -> list[Any]:
    folder = recipe.images or recipe.data.parent
    match recipe.format:
        case "karpathy":
            from vision_tower.karpathy import load_pairs

            return load_pairs(recipe.data, folder, recipe.split)
        case "csv":
            from clips_eval.csv_pairs import load_csv

            return load_csv(recipe.data, folder, recipe.image_column, recipe.caption_column, recipe.separator)


def _table(result: dict[str, Any], output: Path) -> str:
    from clips_eval.retrieval_scores import KS

    head = f"{'':16}" + "".join(f"{f'R@{k}':>8}" for k in KS)
    names = {"i2t": "image to text", "t2i": "text to image"}
    body = [f"{name:16}" + "".join(f"{result[f'{way}_r{k}']:8.1%}" for k in KS) for way, name in names.items()]
    left_out = f" ({result['n_skipped']} unreadable pictures left out)" if result["n_skipped"] else ""
    counts = f"{result['n_images']} images{left_out}, {result['n_texts']} texts; {result['seconds']:.0f} s"
    return "\n".join([head, *body, f"{counts}; written to {output}"])


if __name__ == "__main__":
    sys.exit(run_command(main))
