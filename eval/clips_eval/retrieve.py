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
from vision_tower.common.recipe import check_ranges, parse_recipe, refuse_unused
from vision_tower.data.image_batches import CaptionedImage, SkipCounter

FORMAT = 1  # of retrieval.json
MAX_SHOWN = 5  # names without a caption that are listed
# Options that only some formats use; elsewhere a value other than the default is refused.
FORMAT_OPTIONS: dict[str, tuple[str, ...]] = {
    "images": ("karpathy", "csv"),
    "split": ("karpathy",),
    "positives": ("karpathy",),
    "image_column": ("csv", "shards"),
    "caption_column": ("csv", "shards"),
    "separator": ("csv",),
}


@dataclass(frozen=True, kw_only=True)
class RetrieveRecipe:
    """Measure an encoder's retrieval on a Karpathy-style JSON (COCO, Flickr30K, the sample world), a CSV, or shards.

    Args:
        encoder: folder of an encoder, as written by 'pretrain' and 'convert'.
        data: the file with the captions; for shards a path or URL, with globs and braces such as {000..009}.
        format: karpathy (images with "filename", "split", "sentences" and, as in COCO, a folder "filepath"), csv
            (a header, then one row per caption; rows with the same image belong together), or shards (WebDataset tars
            or Parquet; a row is an image with its captions).
        images: karpathy and csv; folder of the images, by default the file's own folder.
        split: karpathy; the split to measure.
        image_column: csv; column with the image's path. shards; the image's column, or its file ending in a tar.
        caption_column: csv; column with the caption. shards; column, or in a tar a key of the json or a file ending
            such as txt, with one caption or a list.
        separator: csv; character between columns.
        positives: karpathy; JSON with further positives (ECCV Caption, CxC), for recall and mAP@R over all of them.
        objects: text file with one name per line; recalls are also reported for the captions that contain each name.
        output: result file, by default ENCODER/retrieval.json.
        batch_size: images, or captions, per batch.
        max_bad_fraction: fraction of unreadable images above which the run stops; fewer are left out and counted.
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
        """Raise UserError on values that are out of range or that the format does not use."""
        check_ranges(self, batch_size="[1, inf)", max_bad_fraction="[0, 1)")
        for name, formats in FORMAT_OPTIONS.items():
            if self.format not in formats:
                remedy = f"remove it, or choose --format {' or '.join(formats)}"
                refuse_unused(self, [name], f"has no effect with --format {self.format}", remedy=remedy)
        if len(self.separator) != 1:
            raise UserError("must be one character", key="separator", value=self.separator, remedy="for a tab, $'\\t'")


def main(argv: list[str]) -> None:
    """Run the command.

    Raises:
        UserError: bad data, no image of the split, too many unreadable images, an unusable encoder.
    """
    start = time.perf_counter()
    recipe = parse_recipe(RetrieveRecipe, argv, command="retrieve", positional=("encoder",))
    recipe.check()
    from clips_eval.retrieval.measures import measures
    from clips_eval.retrieval.scores import examples, hits_and_intervals, recalls_of
    from clips_eval.stats.json_files import write_json
    from clips_eval.stats.provenance import provenance
    from vision_tower.checkpoints.encoder import load_encoder
    from vision_tower.evaluation.embedding import embed_pairs

    objects = _names(recipe.objects)
    skips = SkipCounter(recipe.data, recipe.max_bad_fraction)
    data, total = _pairs(recipe, skips)
    encoder = load_encoder(recipe.encoder, recipe.device)
    output = recipe.output or recipe.encoder / "retrieval.json"
    make_folder(output.parent)  # fail before the work if it is not writable
    pairs = embed_pairs(encoder, data, recipe.batch_size, skips, total=total)
    recalls, hits = recalls_of(recipe.encoder, pairs), hits_and_intervals(pairs)
    result = {
        "format": FORMAT,
        **recalls,
        "n_images": len(pairs.images),
        "n_texts": len(pairs.texts),
        "n_skipped": skips.bad,
        "data": recipe.data,
        "split": recipe.split if recipe.format == "karpathy" else None,
        **measures(pairs, hits["hits"], objects),
        "multi_positive": _multi_positive(recipe, pairs),
        **provenance(recipe.encoder, encoder, "retrieve", argv),
        **hits,
        "examples": examples(pairs, output.parent),
        "seconds": round(time.perf_counter() - start, 2),
    }
    write_json(output, result)
    print(_table(result, output))
    if missing := _without_caption(objects, result["by_object"]):
        print(f"{recipe.objects}: {missing}")


def _pairs(recipe: RetrieveRecipe, skips: SkipCounter) -> tuple[Iterable[CaptionedImage], int | None]:
    """Return the pairs and their number; None if it is unknown."""
    file = Path(recipe.data)
    folder = recipe.images or file.parent
    match recipe.format:
        case "karpathy":
            from vision_tower.data.karpathy import load_pairs

            pairs = load_pairs(file, folder, recipe.split)
            return pairs, len(pairs)
        case "csv":
            from clips_eval.retrieval.data import load_csv

            pairs = load_csv(file, folder, recipe.image_column, recipe.caption_column, recipe.separator)
            return pairs, len(pairs)
        case "shards":
            from clips_eval.retrieval.data import count_pairs, stream_pairs

            stream = stream_pairs(recipe.data, recipe.image_column, recipe.caption_column, skips)
            return stream, count_pairs(recipe.data)


def _multi_positive(recipe: RetrieveRecipe, pairs: Any) -> dict[str, Any] | None:
    """Return recall@k, R-precision and mAP@R over the positives file; None without one.

    Raises:
        UserError: a bad positives file, or images of the split that could not be read.
    """
    if recipe.positives is None:
        return None
    from clips_eval.retrieval.data import load_positives
    from clips_eval.retrieval.measures import directions, multi_positive

    of_caption, of_image = load_positives(recipe.positives, Path(recipe.data), recipe.split)
    if (len(of_image), len(of_caption)) != (len(pairs.images), len(pairs.texts)):
        # Row numbers of the positives count all images of the split.
        raise UserError("--positives needs all images of the split", file=recipe.data, remedy="fix unreadable images")
    both = directions(pairs, of_caption, of_image)
    return {name: multi_positive(direction) for name, direction in both.items()} | {"source": str(recipe.positives)}


def _names(file: Path | None) -> list[str]:
    """Return the distinct lines of a text file that are not blank."""
    if file is None:
        return []
    names = [line.strip() for line in read_text(file).splitlines() if line.strip()]
    if not names:
        raise UserError("contains no names", file=file, remedy="write one name per line")
    return list(dict.fromkeys(names))


def _without_caption(objects: list[str], rows: list[dict[str, Any]]) -> str:
    """Return a note about the names that no caption contains, empty if there are none."""
    known = {row["object"] for row in rows}
    missing = [name for name in objects if name not in known]
    if not missing:
        return ""
    shown = ", ".join(missing[:MAX_SHOWN]) + (", ..." if len(missing) > MAX_SHOWN else "")
    return f"{len(missing)} of {len(objects)} names are in no caption and have no row ({shown})"


def _table(result: dict[str, Any], output: Path) -> str:
    from clips_eval.retrieval.scores import KS

    lines = [f"{'':16}" + "".join(f"{f'R@{k}':>8}" for k in KS)]
    for direction, name in {"i2t": "image to text", "t2i": "text to image"}.items():
        lines.append(f"{name:16}" + "".join(f"{result[f'{direction}_r{k}']:8.1%}" for k in KS))
        intervals = [result["intervals"][f"{direction}_r{k}"] for k in KS]
        ends = "".join(f"{100 * span['low']:.0f}–{100 * span['high']:.0f}".rjust(8) for span in intervals)
        lines.append(f"{'  95 %':16}{ends}   median rank {result['median_rank'][direction]:.0f}")
    skipped = f" ({result['n_skipped']} unreadable images left out)" if result["n_skipped"] else ""
    counts = f"{result['n_images']} images{skipped}, {result['n_texts']} texts; {result['seconds']:.0f} s"
    return "\n".join([*lines, f"{counts}; written to {output}"])


if __name__ == "__main__":
    sys.exit(run_command(main))
