"""Retrieval data in Karpathy's format: `{"images": [{"filename", "filepath", "split", "sentences": [{"raw"}]}]}`.

The format of dataset_coco.json and dataset_flickr30k.json; COCO's entries also have a folder, "filepath".
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from vision_tower.common.errors import UserError
from vision_tower.common.files import read_object
from vision_tower.data.image_batches import CaptionedImage


def load_pairs(data: Path, images_dir: Path, split: str) -> list[CaptionedImage]:
    """Load the images of `split` with all their captions (COCO's test split: 5,000 images, 25,010 captions).

    Raises:
        UserError: an invalid entry, an unknown split, or an image file that does not exist.
    """
    rows = read_object(data).get("images")
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise UserError("no list 'images' of objects", file=data, remedy="give a Karpathy JSON (dataset_coco.json)")
    chosen = [(index, row) for index, row in enumerate(rows) if row.get("split") == split]
    if not chosen:
        known = ", ".join(sorted({str(row.get("split")) for row in rows})) or "none"
        remedy = "choose with --split (pretrain: evaluation.split)"
        raise UserError(f"no such split (has {known})", file=data, key="split", value=split, remedy=remedy)
    pairs = []
    for index, row in chosen:
        captions = tuple(_captions(data, index, row))
        file = _file(data, index, row, images_dir)
        pairs.append(CaptionedImage(name=str(file), content=file, texts=captions))
    return pairs


def _captions(data: Path, index: int, row: dict[str, Any]) -> list[str]:
    sentences = row.get("sentences")
    if not isinstance(sentences, list) or not sentences:
        raise UserError("no captions", file=data, key=f"images[{index}].sentences", remedy="add at least one")
    captions = [sentence.get("raw") if isinstance(sentence, dict) else None for sentence in sentences]
    for number, caption in enumerate(captions):
        if not isinstance(caption, str) or not caption.strip():
            raise UserError("no text", file=data, key=f"images[{index}].sentences[{number}].raw", remedy="add it")
    return [str(caption) for caption in captions]


def _file(data: Path, index: int, row: dict[str, Any], images_dir: Path) -> Path:
    name, folder = row.get("filename"), row.get("filepath") or ""
    if not isinstance(name, str) or not name or not isinstance(folder, str):
        raise UserError("must be text, like 'filepath'", file=data, key=f"images[{index}].filename", remedy="fix it")
    file = images_dir / folder / name
    if not file.is_file():
        raise UserError(
            f"no such image (images[{index}] of {data})", file=file, remedy="set --images (pretrain: evaluation.images)"
        )
    return file
