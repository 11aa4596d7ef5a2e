"""`clips-mllm retrieve ENCODER --data test.json`: recall@1/5/10 between images and captions.

Karpathy JSON, CSV or shards --> pairs --encoder--> embeddings --recall_at_k--> retrieval.json
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from vision_tower.common.errors import UserError, run_command
from vision_tower.common.files import make_folder, read_text
from vision_tower.common.recipe import parse_recipe
from vision_tower.data.image_batches import Pair, SkipCounter

FORMAT = 1  # of retrieval.json
SHOWN = 5  # names that no caption contains, on the screen


@dataclass(frozen=True, kw_only=True)
class RetrieveRecipe:
    """Measure an encoder's retrieval on a Karpathy-style JSON (COCO, Flickr30K, the sample world), a CSV, or shards.

    Args:
        encoder: folder of an encoder, as 'pretrain' and 'convert' write it.
        data: the file with the captions; for shards a path or URL, with globs and braces as {000..009}.
        format: karpathy (images with "filename", "split", "sentences" and, as COCO's do, a folder "filepath"), csv
            (a header, then a row for each caption; rows that name the same image describe it together), or shards
            (WebDataset tars or Parquet; a row is an image with its captions).
        images: karpathy and csv; folder of the images, the file's own folder if not given.
        split: karpathy; which of the file's splits to measure.
        image_column: csv; the column with the image's path. shards; the image's column, or ending in a tar.
        caption_column: csv; the column with the caption. shards; the column, or in a tar a key of the json or an ending
            such as txt; one caption or a list.
        separator: csv; what stands between columns.
        positives: karpathy; a JSON with further right answers (ECCV Caption, CxC), for recall and mAP@R over all.
        objects: a text file with a name a line; recalls are broken down by the captions that contain it.
        output: where the scores go; ENCODER/retrieval.json if not given.
        batch_size: images, or captions, at a time.
        max_bad_fraction: share of unreadable images above which the run stops; below it they are left out and counted.
        device: auto, cpu or cuda.
    """

    encoder: Path
    data: str
    format: Literal["karpathy", "csv", "shards"] = "karpathy"
    images: Path | None = None
    split: str = "test"
    image_column: str = "image"
    caption_column: str = "caption"
    separator: str = ","
    positives: Path | None = None
    objects: Path | None = None
    output: Path | None = None
    batch_size: int = 64
    max_bad_fraction: float = 0.01
    device: str = "auto"

    def check(self) -> None:
        """Raise UserError where a value has no meaning."""
        if self.batch_size < 1:
            raise UserError(f"--batch_size {self.batch_size}: at least 1 is needed")
        if not 0 <= self.max_bad_fraction < 1:
            raise UserError(f"--max_bad_fraction {self.max_bad_fraction}: a share from 0 to below 1 is needed")
        if self.positives is not None and self.format != "karpathy":
            raise UserError(
                f"--positives {self.positives}: names images by ids of a Karpathy JSON", remedy="use that format"
            )
        if len(self.separator) != 1:
            raise UserError(
                f"--separator {self.separator!r}: one character is needed", remedy="a tab is $'\\t' in the shell"
            )


def main(argv: list[str]) -> None:
    """Run the command.

    Raises:
        UserError: bad data, no image of the split, too many unreadable images, an unusable encoder.
    """
    start = time.perf_counter()
    recipe = parse_recipe(RetrieveRecipe, argv, command="retrieve", positional=("encoder",))
    recipe.check()
    from clips_eval.retrieval.measures import measures
    from clips_eval.retrieval.scores import examples, score, trust
    from clips_eval.stats.json_files import write_json
    from clips_eval.stats.provenance import provenance
    from vision_tower.checkpoints.encoder import load_encoder
    from vision_tower.evaluation.embedding import embed_pairs

    objects = _names(recipe.objects)
    skips = SkipCounter(recipe.data, recipe.max_bad_fraction)
    pairs, total = _pairs(recipe, skips)
    encoder = load_encoder(recipe.encoder, recipe.device)
    output = recipe.output or recipe.encoder / "retrieval.json"
    make_folder(output.parent)  # before the work, not after it
    found = embed_pairs(encoder, pairs, recipe.batch_size, skips, total=total)
    recalls, told = score(recipe.encoder, found), trust(found)
    result = {
        "format": FORMAT,
        **recalls,
        "n_images": len(found.images),
        "n_texts": len(found.texts),
        "n_skipped": skips.bad,
        "data": recipe.data,
        "split": recipe.split if recipe.format == "karpathy" else None,
        **measures(found, told["hits"], objects),
        "multi_positive": _multi_positive(recipe, found),
        **provenance(recipe.encoder, encoder, "retrieve", argv),
        **told,
        "examples": examples(found, output.parent),
        "seconds": round(time.perf_counter() - start, 2),
    }
    write_json(output, result)
    print(_table(result, output))
    if unseen := _unseen(objects, result["by_object"]):
        print(f"{recipe.objects}: {unseen}")


def _pairs(recipe: RetrieveRecipe, skips: SkipCounter) -> tuple[Iterable[Pair], int | None]:
    """The pairs, and how many there are where that is known."""
    file = Path(recipe.data)
    folder = recipe.images or file.parent
    match recipe.format:
        case "karpathy":
            from vision_tower.data.karpathy import load_pairs

            pairs = load_pairs(file, folder, recipe.split)
            return pairs, len(pairs)
        case "csv":
            from clips_eval.retrieval.csv_pairs import load_csv

            pairs = load_csv(file, folder, recipe.image_column, recipe.caption_column, recipe.separator)
            return pairs, len(pairs)
        case "shards":
            from clips_eval.retrieval.shard_pairs import count_pairs, stream_pairs

            stream = stream_pairs(recipe.data, recipe.image_column, recipe.caption_column, skips)
            return stream, count_pairs(recipe.data)


def _multi_positive(recipe: RetrieveRecipe, found: Any) -> dict[str, Any] | None:
    if recipe.positives is None:
        return None
    from clips_eval.retrieval.positives import multi_positive

    return multi_positive(recipe.positives, Path(recipe.data), recipe.split, found)


def _names(file: Path | None) -> list[str]:
    """The lines of a text file that are not blank."""
    if file is None:
        return []
    names = [line.strip() for line in read_text(file).splitlines() if line.strip()]
    if not names:
        raise UserError("no names in it", file=file, remedy="write one a line")
    return list(dict.fromkeys(names))


def _unseen(objects: list[str], rows: list[dict[str, Any]]) -> str:
    """What is to be said of the names that no caption contains; nothing if there are none."""
    seen = {row["object"] for row in rows}
    missing = [name for name in objects if name not in seen]
    if not missing:
        return ""
    named = ", ".join(missing[:SHOWN]) + (", ..." if len(missing) > SHOWN else "")
    return f"{len(missing)} of its {len(objects)} names are in no caption and have no row ({named})"


def _table(result: dict[str, Any], output: Path) -> str:
    from clips_eval.retrieval.scores import KS

    head = f"{'':16}" + "".join(f"{f'R@{k}':>8}" for k in KS)
    names = {"i2t": "image to text", "t2i": "text to image"}
    body = []
    for way, name in names.items():
        body.append(f"{name:16}" + "".join(f"{result[f'{way}_r{k}']:8.1%}" for k in KS))
        spans = [result["intervals"][f"{way}_r{k}"] for k in KS]
        ends = "".join(f"{100 * span['low']:.0f}–{100 * span['high']:.0f}".rjust(8) for span in spans)
        body.append(f"{'  95 %':16}{ends}   median rank {result['median_rank'][way]:.0f}")
    left_out = f" ({result['n_skipped']} unreadable images left out)" if result["n_skipped"] else ""
    counts = f"{result['n_images']} images{left_out}, {result['n_texts']} texts; {result['seconds']:.0f} s"
    return "\n".join([head, *body, f"{counts}; written to {output}"])


if __name__ == "__main__":
    sys.exit(run_command(main))
