"""A trained encoder on disk: saving it with its stock tower, loading it, embedding images and texts.

folder/          ClipsModel checkpoint, tokenizer.json
folder/tower/    the stock image tower and its image processor: loads anywhere, without this package
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from vision_tower.checkpoints.loading import load_model, read_pretrained
from vision_tower.common.errors import UserError
from vision_tower.data.images import evaluation_processor
from vision_tower.model.modeling import ClipsModel
from vision_tower.text.tokenizer import ClipsTokenizer

if TYPE_CHECKING:
    from PIL import Image
    from transformers import BaseImageProcessor


def save_encoder(
    model: ClipsModel,
    tokenizer: ClipsTokenizer,
    folder: Path,
    weights: dict[str, torch.Tensor] | None = None,
    exported: dict[str, torch.Tensor] | None = None,
) -> None:
    """Write everything to a temporary folder first, then move it in, the tower's folder last.

    Args:
        weights: the model's state dict, where the model itself does not hold it whole (ZeRO-3).
        exported: the state dict that the tower is taken from, where it is not the same (an average of the weights).
    """
    work = folder / "partial"
    shutil.rmtree(work, ignore_errors=True)
    weights = model.state_dict() if weights is None else weights
    try:
        model.save_pretrained(work, state_dict=dict(weights))  # which empties what it is given
        tokenizer.save_pretrained(work)
        save_tower(model, work / "tower", weights if exported is None else exported)
    except BaseException:
        shutil.rmtree(work, ignore_errors=True)  # a full disk, Ctrl-C: nothing half-written stays
        raise
    make_readable(work)
    shutil.rmtree(folder / "tower", ignore_errors=True)
    for path in sorted(work.iterdir(), key=lambda path: path.name == "tower"):
        os.replace(path, folder / path.name)
    work.rmdir()


def save_tower(model: ClipsModel, folder: Path, weights: dict[str, torch.Tensor] | None = None) -> None:
    """The image tower alone as its stock class has it, with its processor, from the model's state dict or another."""
    prefix = "vision_model."
    given = model.state_dict() if weights is None else weights
    tower = {name.removeprefix(prefix): value for name, value in given.items() if name.startswith(prefix)}
    model.vision_model.save_pretrained(folder, state_dict=tower)
    evaluation_processor(model.config.vision_config.image_size).save_pretrained(folder)


def make_readable(folder: Path) -> None:
    """Give weights the permissions of other new files: safetensors writes them for their owner alone."""
    mask = os.umask(0)
    os.umask(mask)
    for file in folder.rglob("*.safetensors"):
        file.chmod(0o666 & ~mask)


class Encoder:
    """A trained model with its tokenizer and image processor, in evaluation mode."""

    def __init__(self, model: ClipsModel, tokenizer: ClipsTokenizer, processor: BaseImageProcessor) -> None:
        self.model = model.eval()
        self.tokenizer = tokenizer
        self.processor = processor

    @torch.inference_mode()
    def embed_images(self, images: list[Image.Image]) -> torch.Tensor:
        """Unit-norm fp32 embeddings, (images, d), on the CPU."""
        pixels = self.processor(images=images, return_tensors="pt")["pixel_values"]
        return self.model.embed_images(pixels.to(self.model.device)).cpu()

    @torch.inference_mode()
    def embed_texts(self, texts: list[str]) -> torch.Tensor:
        """Unit-norm fp32 embeddings, (texts, d), on the CPU."""
        config, pieces = self.model.config, self.tokenizer.pieces(texts)
        length = config.text_config.max_position_embeddings
        if config.padding == "masked":  # then its amount means nothing
            length = min(max(map(len, pieces)) + 3, length)  # [bos], [eos] and [CLS]
        ids = self.tokenizer.contrastive_layout(pieces, length)
        return self.model.embed_texts(ids.to(self.model.device)).cpu()


def load_encoder(folder: str | Path, device: str = "auto", image_size: int | None = None) -> Encoder:
    """Read what `save_encoder` wrote, for images of another side where `image_size` says so.

    Raises:
        UserError: a missing file, or missing or unexpected weights.
    """
    from transformers import AutoImageProcessor

    folder = Path(folder)
    model = load_model(folder, image_size)
    if not (folder / "tower" / "preprocessor_config.json").is_file():
        raise UserError(
            "missing", file=folder / "tower" / "preprocessor_config.json", remedy="run `clips-mllm pretrain` to its end"
        )
    side = model.config.vision_config.image_size
    processor = read_pretrained(AutoImageProcessor, folder / "tower", size={"height": side, "width": side})
    return Encoder(model.to(choose_device(device)), ClipsTokenizer.from_pretrained(folder), processor)


def choose_device(name: str) -> torch.device:
    """A device by PyTorch's name, or with `auto` the best that is here. Raises UserError where it is not."""
    if name == "auto":
        return torch.device(
            "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
        )
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        raise UserError(
            f"device {name}: not usable here ({str(error).splitlines()[0]})", remedy="take auto or cpu"
        ) from error
    return torch.device(name)
