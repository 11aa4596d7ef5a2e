"""Karpathy-style retrieval data: `{"images": [{"filename", "filepath", "split", "sentences": [{"raw"}]}]}`.

The form of dataset_coco.json and dataset_flickr30k.json; COCO's entries also name a folder, "filepath".
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from vision_tower.common.errors import UserError
from vision_tower.common.files import read_object
from vision_tower.data.image_batches import Pair


def load_pairs(data: Path, images_dir: Path, split: str) -> list[Pair]:
    """The images of `split` with all their captions (COCO's test split: 5,000 and 25,010).

    Raises:
        UserError: what is wrong in which image of the JSON, or an image that does not exist.
    """
    rows = read_object(data).get("images")
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise UserError(
            "no list 'images' of objects", file=data, remedy="give a Karpathy-style JSON (dataset_coco.json)"
        )
    chosen = [(place, row) for place, row in enumerate(rows) if row.get("split") == split]
    if not chosen:
        known = ", ".join(sorted({str(row.get("split")) for row in rows})) or "none"
        raise UserError(
            f"no image of split '{split}'; splits in this file: {known}",
            file=data,
            remedy="choose with --split (pretrain: evaluation.split)",
        )
    pairs = []
    for place, row in chosen:
        captions = tuple(_captions(data, place, row))
        file = _file(data, place, row, images_dir)
        pairs.append(Pair(name=str(file), content=file, texts=captions))
    return pairs


def _captions(data: Path, place: int, row: dict[str, Any]) -> list[str]:
    sentences = row.get("sentences")
    if not isinstance(sentences, list) or not sentences:
        raise UserError(f"images[{place}]: no 'sentences'", file=data, remedy="every image needs at least one caption")
    captions = [sentence.get("raw") if isinstance(sentence, dict) else None for sentence in sentences]
    for number, caption in enumerate(captions):
        if not isinstance(caption, str) or not caption.strip():
            raise UserError(
                f"images[{place}].sentences[{number}]: no text 'raw'", file=data, remedy="write or remove the caption"
            )
    return [str(caption) for caption in captions]


def _file(data: Path, place: int, row: dict[str, Any], images_dir: Path) -> Path:
    name, folder = row.get("filename"), row.get("filepath") or ""
    if not isinstance(name, str) or not name or not isinstance(folder, str):
        raise UserError(
            f"images[{place}]: 'filename' (and 'filepath') must be text", file=data, remedy="correct the entry"
        )
    file = images_dir / folder / name
    if not file.is_file():
        raise UserError(
            f"no such image (images[{place}] of {data})",
            file=file,
            remedy="give their folder with --images (pretrain: evaluation.images)",
        )
    return file
