"""Questions about pictures, read from a file."""

from __future__ import annotations

import json
from pathlib import Path

from vision_tower.common.errors import UserError
from vision_tower.common.files import read_text


def check_picture(file: str) -> None:
    """Raise UserError, before the model is loaded, where the file is no readable picture."""
    from clips_mllm.talk.pictures import read_picture

    read_picture(Path(file))


def read_examples(file: Path) -> list[dict[str, str]]:
    """Questions about pictures; the pictures' paths are relative to the file. Raises UserError on bad input."""
    try:
        rows = json.loads(read_text(file))
    except json.JSONDecodeError as error:
        raise UserError(f"{file}: not valid JSON ({error}); mend the file") from error
    if not isinstance(rows, list) or not rows:
        raise UserError(f'{file}: expected a JSON list of {{"image", "question"}}, with one at least')
    for at, row in enumerate(rows):
        if not isinstance(row, dict) or not isinstance(row.get("image"), str) or "question" not in row:
            raise UserError(f'{file}: entry {at}: expected {{"image": FILE, "question": TEXT}}; mend it')
    examples = [{"image": str(file.parent / row["image"]), "question": str(row["question"])} for row in rows]
    for example in examples:
        check_picture(example["image"])
    return examples
