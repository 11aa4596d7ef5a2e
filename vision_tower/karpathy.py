"""Karpathy-style retrieval data: `{"images": [{"filename", "filepath", "split", "sentences": [{"raw"}]}]}`.

The form of dataset_coco.json and dataset_flickr30k.json; COCO's entries also name a folder, "filepath".
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vision_tower.errors import UserError
from vision_tower.json_files import read_object


@dataclass(frozen=True, kw_only=True)
class Pairs:
    """Pictures and their captions: `owner[j]` is the place in `files` of the picture that `texts[j]` describes."""

    files: list[Path]
    texts: list[str]
    owner: list[int]


def load_pairs(data: Path, images_dir: Path, split: str) -> Pairs:
    """Read the pictures of `split` and all their captions (COCO's test split: 5,000 and 25,010).

    Raises:
        UserError: what is wrong in which image of the JSON, or a picture that does not exist.
    """
    rows = read_object(data).get("images")
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise UserError(f"{data}: no list 'images' of objects; give a Karpathy-style JSON (dataset_coco.json)")
    chosen = [(place, row) for place, row in enumerate(rows) if row.get("split") == split]
    if not chosen:
        known = ", ".join(sorted({str(row.get("split")) for row in rows})) or "none"
        raise UserError(f"{data}: no image of split '{split}'; splits in this file: {known}; choose with --split")
    files: list[Path] = []
    texts: list[str] = []
    owner: list[int] = []
    for place, row in chosen:
        captions = _captions(data, place, row)
        files.append(_file(data, place, row, images_dir))
        texts += captions
        owner += [len(files) - 1] * len(captions)
    return Pairs(files=files, texts=texts, owner=owner)


def _captions(data: Path, place: int, row: dict[str, Any]) -> list[str]:
    sentences = row.get("sentences")
    if not isinstance(sentences, list) or not sentences:
        raise UserError(f"{data}: images[{place}]: no 'sentences'; every image needs at least one caption")
    captions = [sentence.get("raw") if isinstance(sentence, dict) else None for sentence in sentences]
    for number, caption in enumerate(captions):
        if not isinstance(caption, str) or not caption.strip():
            raise UserError(f"{data}: images[{place}].sentences[{number}]: no text 'raw'; write or remove the caption")
    return [str(caption) for caption in captions]


def _file(data: Path, place: int, row: dict[str, Any], images_dir: Path) -> Path:
    name, folder = row.get("filename"), row.get("filepath") or ""
    if not isinstance(name, str) or not name or not isinstance(folder, str):
        raise UserError(f"{data}: images[{place}]: 'filename' (and 'filepath') must be text; correct the entry")
    file = images_dir / folder / name
    if not file.is_file():
        raise UserError(f"{file}: no such image (images[{place}] of {data}); give their folder with --images")
    return file
