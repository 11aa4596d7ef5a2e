"""Render messages and images into the token positions that the model reads."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from clips_mllm.prompts.conversation import IMAGE, Message
from clips_mllm.talk.images import InputImage, PreparedImage
from vision_tower.common.errors import UserError

if TYPE_CHECKING:
    from clips_mllm.model.tiles import AnyProcessor


@dataclasses.dataclass(frozen=True)
class Prompt:
    """Positions of one request.

    Attributes:
        ids: token ids; `<image>` is repeated once per patch.
        keys: identity of each position: its token id, or the key of its image.
        images: in order of appearance.
        starts: first position of each image.
        lengths: number of positions of each image.
    """

    ids: list[int]
    keys: list[int | str]
    images: list[PreparedImage]
    starts: list[int]
    lengths: list[int]

    def shared_length(self, keys: list[int | str]) -> int:
        """Return the number of leading positions shared with `keys`.

        At least one position is left to read, because its logits are needed, and images are never split.
        """
        longest = min(len(keys), len(self.keys) - 1)
        count = next((i for i in range(longest) if keys[i] != self.keys[i]), longest)
        images = zip(self.starts, self.lengths, strict=True)
        split = [start for start, length in images if start < count < start + length]
        return split[0] if split else count


def build_prompt(processor: AnyProcessor, messages: list[Message], images: list[InputImage]) -> Prompt:
    """Render with the checkpoint's chat template, as in training.

    Raises:
        UserError: the template rejects the conversation, or a text contains `<image>`.
    """
    from jinja2 import TemplateError

    from clips_mllm.model.processors import image_token_counts

    reject_placeholders(messages)
    try:
        text = processor.apply_chat_template(messages, add_generation_prompt=True)
    except TemplateError as error:
        raise UserError(
            f"the model's chat template rejects this conversation ({error})", remedy="change the roles or turns"
        ) from error
    if not text:
        remedy = "add an image, or use a stage 2 checkpoint"
        raise UserError("the model's chat template renders images only, as after stage 1", remedy=remedy)
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
    return Prompt(ids, keys, [image.prepared(processor) for image in images], starts, lengths)


def reject_placeholders(messages: list[Message]) -> None:
    """Raise UserError if a text contains `<image>`, which would be expanded into patches of a missing image."""
    for message in messages:
        content = message["content"]
        texts = [content] if isinstance(content, str) else [part["text"] for part in content if part["type"] == "text"]
        if any(IMAGE in text for text in texts):
            remedy = "attach the image instead, or write the text differently"
            raise UserError(f"{IMAGE} in a question is the placeholder of an image", remedy=remedy)
