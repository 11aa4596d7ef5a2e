"""An untrained encoder with known outputs: an image embeds to its mean color, a text to the colors that it names."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image

from vision_tower.data.images import evaluation_processor

COLORS = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255)}


class ColorEncoder:
    """Replaces a trained `Encoder`."""

    def __init__(self) -> None:
        self.processor = evaluation_processor(24)

    def embed_images(self, images: list[Image.Image]) -> torch.Tensor:
        rows = [torch.tensor(image.resize((1, 1)).getpixel((0, 0)), dtype=torch.float32) for image in images]
        return torch.nn.functional.normalize(torch.stack(rows), dim=1)

    def embed_texts(self, texts: list[str]) -> torch.Tensor:
        rows = [torch.tensor([float(color in text) for color in COLORS]) for text in texts]
        return torch.nn.functional.normalize(torch.stack(rows) + 1e-3, dim=1)


def install(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with weights, which loads as a ColorEncoder."""
    folder.mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(b"weights")
    monkeypatch.setattr("vision_tower.checkpoints.encoder.load_encoder", lambda folder, device="auto": ColorEncoder())
    return folder


def paint(file: Path, color: str) -> None:
    """An image of one color."""
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (24, 24), COLORS[color]).save(file)
