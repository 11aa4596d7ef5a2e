"""Retrieval tab: a caption finds images of a folder, and an image finds captions of a file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gradio as gr
import torch
from PIL import Image
from tqdm import tqdm

from clips_mllm.talk.web.toasts import errors_as_toasts
from clips_mllm.talk.web.uploads import read_upload
from vision_tower.checkpoints.encoder import Encoder
from vision_tower.common.errors import UserError
from vision_tower.common.files import read_text
from vision_tower.data.image_batches import EncodedImage, SkipCounter, decoded
from vision_tower.data.image_folder import ENDINGS
from vision_tower.data.images import decode_image

BATCH_SIZE = 64
RESULTS = 8
THUMBNAIL_SIZE = 400  # pixels
BUTTONS: list[Any] = ["download", "fullscreen"]  # without Gradio's "share", which uploads images to the hub


class Gallery:
    """Images of a folder and captions of a file (one per line), embedded once by a CLIPS encoder.

    Raises:
        UserError: the folder contains no image.
    """

    def __init__(self, encoder: Encoder, folder: Path, captions: Path | None) -> None:
        files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in ENDINGS)
        if not files:
            raise UserError(f"no image ({' '.join(sorted(ENDINGS))})", file=folder, remedy="choose another folder")
        self.encoder = encoder
        self.files: list[Path] = []
        embeddings = []
        encoded = (EncodedImage(name=str(file), content=file) for file in files)
        batches = decoded(encoded, BATCH_SIZE, SkipCounter(str(folder)))
        for names, images in tqdm(batches, total=-(-len(files) // BATCH_SIZE), desc="gallery", unit="batch"):
            self.files += [Path(image.name) for image in names]
            embeddings.append(encoder.embed_images(images))
        self.images = torch.cat(embeddings)
        self.captions = [line.strip() for line in read_text(captions).splitlines() if line.strip()] if captions else []
        chunks = [self.captions[i : i + BATCH_SIZE] for i in range(0, len(self.captions), BATCH_SIZE)]
        self.texts = torch.cat([encoder.embed_texts(chunk) for chunk in chunks]) if chunks else None

    def images_for(self, caption: str) -> list[tuple[Path, float]]:
        """Return the nearest images with their cosine similarity, nearest first."""
        return nearest(self.files, self.images @ self.encoder.embed_texts([caption])[0])

    def captions_for(self, image: Image.Image) -> list[tuple[str, float]]:
        """Return the nearest captions with their cosine similarity, nearest first."""
        if self.texts is None:
            return []
        return nearest(self.captions, self.texts @ self.encoder.embed_images([image])[0])


def nearest(items: list[Any], scores: torch.Tensor) -> list[tuple[Any, float]]:
    """Return the items with the highest scores, highest first."""
    best = scores.topk(min(RESULTS, len(items)))
    return [(items[index], score) for score, index in zip(best.values.tolist(), best.indices.tolist(), strict=True)]


def retrieval_tab(gallery: Gallery, max_pixels: int) -> None:
    """Add the components and events of the tab to the page under construction."""
    with gr.Row():
        with gr.Column(min_width=280):
            caption = gr.Textbox(label="A caption finds images", elem_id="caption", submit_btn=True)
            found = gr.Gallery(
                label="Nearest images", elem_id="found", height=360, object_fit="contain", buttons=BUTTONS
            )
        with gr.Column(min_width=280):
            image = gr.Image(label="An image finds captions", type="filepath", elem_id="query", height=260)
            captions = gr.Dataframe(
                headers=["caption", "cosine"],
                column_widths=["75%", "25%"],
                wrap=True,
                label="Nearest captions",
                elem_id="captions",
            )

    def images_for(text: str) -> list[tuple[Image.Image, str]]:
        with errors_as_toasts():
            results = gallery.images_for(text.strip()) if text.strip() else []
        # Images instead of paths: Gradio only serves files of its own folders and of the working directory.
        return [(thumbnail(file), f"{score:.3f} {file.stem}") for file, score in results]

    def captions_for(upload: dict[str, Any] | None) -> list[list[Any]]:
        if upload is None:
            return []
        with errors_as_toasts():
            results = gallery.captions_for(read_upload(upload["path"], max_pixels).image)
        return [[text, round(score, 3)] for text, score in results]

    caption.submit(images_for, caption, found, api_visibility="private")
    # `preprocess=False`: Gradio would decode the upload before `captions_for`, and fail without a message if it is
    # broken. Its check that the file is an upload runs in any case.
    image.change(captions_for, image, captions, preprocess=False, api_visibility="private")


def thumbnail(file: Path) -> Image.Image:
    """Return a small copy of a gallery image."""
    image = decode_image(file.read_bytes(), min_size=THUMBNAIL_SIZE)
    image.thumbnail((THUMBNAIL_SIZE, THUMBNAIL_SIZE))
    return image
