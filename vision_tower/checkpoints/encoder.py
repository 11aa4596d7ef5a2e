"""A trained encoder: save it with its stock tower, load it, embed images and texts.

folder/          ClipsModel checkpoint, tokenizer.json
folder/tower/    the stock vision tower and its image processor, which load without this package
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
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
    """Write model, tokenizer and tower to a temporary folder, then move them to `folder`, the tower last.

    Args:
        weights: state dict to save instead of the model's own, which ZeRO-3 shards over the ranks.
        exported: state dict for `tower/` if it differs from `weights`, such as an EMA.
    """
    weights = model.state_dict() if weights is None else weights
    with filled_together(folder, last=("tower",)) as work:
        model.save_pretrained(work, state_dict=dict(weights))  # a copy: save_pretrained empties it
        tokenizer.save_pretrained(work)
        save_tower(model, work / "tower", weights if exported is None else exported)


@contextlib.contextmanager
def filled_together(folder: Path, last: tuple[str, ...]) -> Iterator[Path]:
    """Yield a temporary folder whose contents are moved to `folder` at the end, and deleted after an error.

    Args:
        last: names by which readers recognize a complete folder, moved last.
    """
    work = folder / "partial"
    shutil.rmtree(work, ignore_errors=True)
    try:
        yield work
    except BaseException:
        shutil.rmtree(work, ignore_errors=True)  # after a full disk or Ctrl-C no incomplete folder stays
        raise
    make_readable(work)
    for path in work.iterdir():
        if path.is_dir():  # cannot replace another one
            shutil.rmtree(folder / path.name, ignore_errors=True)
    for path in sorted(work.iterdir(), key=lambda path: path.name in last):
        os.replace(path, folder / path.name)
    work.rmdir()


def save_tower(model: ClipsModel, folder: Path, weights: dict[str, torch.Tensor] | None = None) -> None:
    """Save the vision tower as its stock class, with its image processor; `weights` replaces the model's state dict."""
    prefix = "vision_model."
    state = model.state_dict() if weights is None else weights
    tower = {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
    model.vision_model.save_pretrained(folder, state_dict=tower)
    evaluation_processor(model.config.vision_config.image_size).save_pretrained(folder)


def make_readable(folder: Path) -> None:
    """Give weight files the permissions of other new files; safetensors makes them readable by their owner only."""
    mask = os.umask(0)  # the mask can only be read by setting it
    os.umask(mask)
    for file in folder.rglob("*.safetensors"):
        file.chmod(0o666 & ~mask)


class Encoder:
    """A model in evaluation mode with its tokenizer and image processor."""

    def __init__(self, model: ClipsModel, tokenizer: ClipsTokenizer, processor: BaseImageProcessor) -> None:
        self.model = model.eval()
        self.tokenizer = tokenizer
        self.processor = processor

    @torch.inference_mode()
    def embed_images(self, images: list[Image.Image]) -> torch.Tensor:
        """Return unit-norm fp32 embeddings, (images, d), on the CPU."""
        pixels = self.processor(images=images, return_tensors="pt")["pixel_values"]
        return self.model.embed_images(pixels.to(self.model.device)).cpu()

    @torch.inference_mode()
    def embed_texts(self, texts: list[str]) -> torch.Tensor:
        """Return unit-norm fp32 embeddings, (texts, d), on the CPU."""
        config, pieces = self.model.config, self.tokenizer.pieces(texts)
        length = config.text_config.max_position_embeddings
        if config.padding == "masked":  # the amount of padding has no effect, so pad to the longest text only
            length = min(max(map(len, pieces)) + 3, length)  # 3: [bos], [eos] and [CLS]
        ids = self.tokenizer.contrastive_layout(pieces, length)
        return self.model.embed_texts(ids.to(self.model.device)).cpu()


def load_encoder(folder: str | Path, device: str = "auto", image_size: int | None = None) -> Encoder:
    """Load what `save_encoder` wrote.

    Args:
        folder: a `pretrain` run, or a converted encoder.
        device: a PyTorch device, or auto: cuda, else mps, else cpu.
        image_size: side of the images in pixels; None keeps the checkpoint's size.
    Raises:
        UserError: a file is missing or damaged, or weights are missing or unexpected.
    """
    from transformers import AutoImageProcessor

    folder = Path(folder)
    model = load_model(folder, image_size)
    file = folder / "tower" / "preprocessor_config.json"
    if not file.is_file():
        raise UserError("no such file", file=file, remedy="run `clips-mllm pretrain` to its end")
    side = model.config.vision_config.image_size
    processor = read_pretrained(AutoImageProcessor, folder / "tower", size={"height": side, "width": side})
    return Encoder(model.to(choose_device(device)), ClipsTokenizer.from_pretrained(folder), processor)


def choose_device(name: str) -> torch.device:
    """Return a PyTorch device; `auto` is cuda, else mps, else cpu. Raises UserError if it is not available."""
    if name == "auto":
        return torch.device(
            "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
        )
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        raise UserError(
            f"not available ({str(error).splitlines()[0]})", key="device", value=name, remedy="use auto or cpu"
        ) from error
    return torch.device(name)
