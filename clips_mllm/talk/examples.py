"""Questions about images, read from a file."""

from __future__ import annotations

import json
from pathlib import Path

from vision_tower.common.errors import UserError
from vision_tower.common.files import read_text


def check_image(file: str) -> None:
    """Raise UserError, before the model is loaded, where the file is no readable image."""
    from clips_mllm.talk.images import read_image

    read_image(Path(file))


def read_examples(file: Path) -> list[dict[str, str]]:
    """Questions about images; the images' paths are relative to the file. Raises UserError on bad input."""
    try:
        rows = json.loads(read_text(file))
    except json.JSONDecodeError as error:
        raise UserError(f"not valid JSON ({error})", file=file, remedy="mend the file") from error
    if not isinstance(rows, list) or not rows:
        raise UserError('expected a JSON list of {"image", "question"}, with one at least', file=file)
    for at, row in enumerate(rows):
        if not isinstance(row, dict) or not isinstance(row.get("image"), str) or "question" not in row:
            raise UserError(f'entry {at}: expected {{"image": FILE, "question": TEXT}}', file=file, remedy="mend it")
    examples = [{"image": str(file.parent / row["image"]), "question": str(row["question"])} for row in rows]
    for example in examples:
        check_image(example["image"])
    return examples
