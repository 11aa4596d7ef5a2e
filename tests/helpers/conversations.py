"""LLaVA rows, images and data sets, for the tests of data and training."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from PIL import Image

from clips_mllm.data.dataset import InstructionDataset
from clips_mllm.data.recipe import InstructionRecipe
from clips_mllm.model.checkpoint import Mllm


def turns(*values: str, first: str = "human") -> list[dict[str, str]]:
    speakers = ["human", "gpt"] if first == "human" else ["gpt", "human"]
    return [{"from": speakers[at % 2], "value": value} for at, value in enumerate(values)]


def row(*values: str, image: Any = None, first: str = "human") -> dict[str, Any]:
    talk = turns(*values, first=first)
    return {"id": "r", "conversations": talk} | ({} if image is None else {"image": image})


def make_image(file: Path, color: str | tuple[int, int, int] = "red", size: tuple[int, int] = (40, 30)) -> None:
    Image.new("RGB", size, color).save(file)


def open_rows(folder: Path, rows: list[Any], mllm: Mllm, **values: Any) -> InstructionDataset:
    """Write the rows to a file in `folder`, which also contains their images, and open it."""
    (folder / "rows.json").write_text(json.dumps(rows))
    given = {"file": str(folder / "rows.json"), "images": str(folder), "template": "chatml"}
    return InstructionDataset(InstructionRecipe(**(given | values)), mllm.processor)
