"""Retrieval to look at: a caption finds images of a folder, an image finds captions of a file."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from vision_tower.common.errors import UserError
from vision_tower.common.files import read_text
from vision_tower.data.image_folder import ENDINGS

if TYPE_CHECKING:
    import torch
    from PIL.Image import Image

    from vision_tower.checkpoints.encoder import Encoder

BATCH = 64


class Gallery:
    """Images of a folder and captions of a file (one a line), embedded once by a CLIPS encoder."""

    def __init__(self, encoder: Encoder, folder: Path, captions: Path | None) -> None:
        import torch
        from tqdm import tqdm

        from vision_tower.data.image_batches import EncodedImage, SkipCounter, decoded

        files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in ENDINGS)
        if not files:
            raise UserError(f"no image ({' '.join(sorted(ENDINGS))})", file=folder, remedy="give another folder")
        self.encoder = encoder
        self.files: list[Path] = []
        found = []
        skips = SkipCounter(str(folder))
        batches = decoded((EncodedImage(name=str(file), content=file) for file in files), BATCH, skips)
        for kept, images in tqdm(batches, total=-(-len(files) // BATCH), desc="gallery", unit="batch"):
            self.files += [Path(image.name) for image in kept]
            found.append(encoder.embed_images(images))
        self.images = torch.cat(found)
        self.captions = [line.strip() for line in read_text(captions).splitlines() if line.strip()] if captions else []
        texts = [encoder.embed_texts(self.captions[i : i + BATCH]) for i in range(0, len(self.captions), BATCH)]
        self.texts: torch.Tensor | None = torch.cat(texts) if texts else None

    def images_for(self, caption: str, most: int = 8) -> list[tuple[Path, float]]:
        """The nearest images with their cosine, nearest first."""
        scores = self.images @ self.encoder.embed_texts([caption])[0]
        best = scores.topk(min(most, len(self.files)))
        return [
            (self.files[place], score) for score, place in zip(best.values.tolist(), best.indices.tolist(), strict=True)
        ]

    def captions_for(self, image: Image, most: int = 8) -> list[tuple[str, float]]:
        """The nearest captions with their cosine, nearest first."""
        if self.texts is None:
            return []
        scores = self.texts @ self.encoder.embed_images([image])[0]
        best = scores.topk(min(most, len(self.captions)))
        return [
            (self.captions[place], score)
            for score, place in zip(best.values.tolist(), best.indices.tolist(), strict=True)
        ]
