"""Messages and images as the positions that the model reads."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from typing import TYPE_CHECKING

from clips_mllm.prompts.conversation import IMAGE, Message
from vision_tower.common.errors import UserError

if TYPE_CHECKING:
    import torch
    from PIL.Image import Image

    from clips_mllm.model.tiles import AnyProcessor


@dataclasses.dataclass(frozen=True)
class Shown:
    """An image as the tower gets it. It needs far less memory than a photograph that waits in a queue.

    Attributes:
        pixels: (3, h, w), or (tiles, 3, h, w).
        size: height and width of the image, by which tiles are laid out.
    """

    key: str
    pixels: torch.Tensor
    size: tuple[int, int]


@dataclasses.dataclass(frozen=True, eq=False)
class InputImage:
    """A decoded image; `file` is where it came from, if from a file."""

    image: Image
    file: str | None = None
    _shown: dict[int, Shown] = dataclasses.field(default_factory=dict, repr=False)

    @functools.cached_property
    def key(self) -> str:
        """Tells two images apart by their pixels."""
        return hashlib.sha256(repr(self.image.size).encode() + self.image.tobytes()).hexdigest()

    def shown(self, processor: AnyProcessor) -> Shown:
        """The image prepared for a model's tower; once for each model."""
        if id(processor) not in self._shown:
            pixels = processor.image_processor(images=[self.image], return_tensors="pt")["pixel_values"][0]
            self._shown[id(processor)] = Shown(self.key, pixels, (self.image.height, self.image.width))
        return self._shown[id(processor)]


@dataclasses.dataclass(frozen=True)
class Prompt:
    """One request's positions.

    Attributes:
        ids: token ids, `<image>` repeated for each patch.
        keys: what each position is: its token id, or the key of the image there.
        images: in order of appearance.
        starts: position of each image's first patch.
        lengths: positions that each image takes.
    """

    ids: list[int]
    keys: list[int | str]
    images: list[Shown]
    starts: list[int]
    lengths: list[int]

    def shared(self, keys: list[int | str]) -> int:
        """How many leading positions need not be read again after `keys`: all but one at most, and whole images."""
        most = min(len(keys), len(self.keys) - 1)
        count = next((place for place in range(most) if keys[place] != self.keys[place]), most)
        images = zip(self.starts, self.lengths, strict=True)
        inside = [start for start, length in images if start < count < start + length]
        return inside[0] if inside else count


def build_prompt(processor: AnyProcessor, messages: list[Message], images: list[InputImage]) -> Prompt:
    """Render by the checkpoint's own template, as training did.

    Raises:
        UserError: a template without room for words, or a placeholder written out in a text.
    """
    from jinja2 import TemplateError

    from clips_mllm.model.processors import image_token_counts

    refuse_placeholders(messages)
    try:
        text = processor.apply_chat_template(messages, add_generation_prompt=True)
    except TemplateError as error:
        raise UserError(
            f"the model's template refuses this conversation ({error})", remedy="change the roles or turns"
        ) from error
    if not text:
        raise UserError(
            "the model's template has room for images only, as after stage 1",
            remedy="show one, or use a checkpoint of stage 2",
        )
    lengths = image_token_counts(processor, [image.image for image in images])
    ids: list[int] = []
    keys: list[int | str] = []
    starts: list[int] = []
    for token in processor.tokenizer(text)["input_ids"]:
        if token != processor.image_token_id:
            ids.append(token)
            keys.append(token)
            continue
        key, length = images[len(starts)].key, lengths[len(starts)]
        starts.append(len(ids))
        ids += [token] * length
        keys += [key] * length
    return Prompt(ids, keys, [image.shown(processor) for image in images], starts, lengths)


def refuse_placeholders(messages: list[Message]) -> None:
    """Raise UserError where a text holds `<image>`: it would stand for an image that is not there."""
    for message in messages:
        content = message["content"]
        texts = [content] if isinstance(content, str) else [part["text"] for part in content if part["type"] == "text"]
        if any(IMAGE in text for text in texts):
            raise UserError(
                f"{IMAGE} in a question stands for an image", remedy="show one instead, and write it otherwise"
            )
