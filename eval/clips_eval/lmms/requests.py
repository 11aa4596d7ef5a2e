"""Prompt and images of an lmms-eval request, in its two modes and under image controls.

chat    doc_to_messages(document) --parts--> the processor's chat template
simple  context with <image> in front --string--> the tokenizer's chat template, as lmms-eval's `llava_hf`
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from vision_tower.common.errors import UserError, disk_is_full

if TYPE_CHECKING:
    from lmms_eval.api.instance import Instance
    from PIL.Image import Image
    from transformers import LlavaProcessor

Control = Literal["none", "shuffled", "blank", "no_image"]
PLACEHOLDER = "<image>"  # lmms-eval's in contexts; the checkpoint's image token can differ


@dataclass(frozen=True, kw_only=True)
class Prompt:
    """Prompt text with one placeholder per image."""

    text: str
    images: list[Image]


def request_name(request: Instance) -> str:
    """Return a name for messages: "task pope, document 3"."""
    _, _, _, doc_id, task, _ = request.args
    return f"task {task}, document {doc_id}"


def task_names(requests: Sequence[Instance]) -> str:
    """Return the first three task names, for progress bars."""
    return ", ".join([*dict.fromkeys(request.args[4] for request in requests)][:3])


def options_of(request: Instance, *, simple: bool) -> Mapping[str, Any]:
    """Return the task's generation_kwargs."""
    return request.args[1] if simple else request.args[2]


def document_of(request: Instance, datasets: Mapping[str, Any]) -> Any:
    """Return the row that the request asks about; `datasets` is the model's `task_dict`.

    Raises:
        UserError: its image cannot be decoded, which `datasets` does when the row is read.
    """
    _, _, _, doc_id, task, split = request.args
    with image_errors(request_name(request)):
        return datasets[task][split][doc_id]


def chat_prompt(request: Instance, document: Any, processor: LlavaProcessor, control: Control) -> Prompt:
    """Render a request of chat mode.

    Raises:
        UserError: an image that cannot be read, or a document with video or audio.
    """
    name = request_name(request)
    images: list[Image] = []
    messages: list[dict[str, Any]] = []
    with image_errors(name):
        for message in request.args[1](document):
            content: list[dict[str, str]] = []
            for part in message["content"]:
                match part["type"]:
                    case "text":
                        content.append({"type": "text", "text": part["text"]})
                    case "image" if control == "no_image":
                        pass
                    case "image":
                        content.append({"type": "image"})
                        images.append(_load(part["url"], control, processor))
                    case other:
                        raise UserError(f"LLaVA does not support {other}", file=name, remedy="remove the task")
            messages.append({"role": message["role"], "content": content})
    text = processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    return Prompt(text=text, images=images)


def simple_prompt(request: Instance, document: Any, processor: LlavaProcessor, control: Control) -> Prompt:
    """Render a request of simple mode: a context without placeholders gets one per image, before the text.

    Raises:
        UserError: as `chat_prompt`.
    """
    name = request_name(request)
    context: str = request.args[0]
    with image_errors(name):
        visuals = list(request.args[2](document) or [])
        if any(isinstance(visual, str) for visual in visuals):
            raise UserError("it contains video, which LLaVA does not support", file=name, remedy="remove the task")
        images = [] if control == "no_image" else [_load(visual, control, processor) for visual in visuals]
    if control == "no_image":
        context = context.replace(PLACEHOLDER, "").strip()
    elif images and PLACEHOLDER not in context:
        context = f"{' '.join([PLACEHOLDER] * len(images))}\n{context}"
    messages = [{"role": "user", "content": context.replace(PLACEHOLDER, processor.image_token)}]
    template = processor.tokenizer.chat_template or processor.chat_template
    text = processor.tokenizer.apply_chat_template(
        messages, chat_template=template, tokenize=False, add_generation_prompt=True
    )
    return Prompt(text=str(text), images=images)


@contextmanager
def image_errors(name: str) -> Iterator[None]:
    """Convert PIL's errors about a broken image to a UserError that names the document."""
    try:
        yield
    except (OSError, SyntaxError) as error:
        if disk_is_full(error):
            raise
        raise UserError(f"its image cannot be read ({error})", file=name, remedy="fix the data file") from error


def _load(source: Image | str, control: Control, processor: LlavaProcessor) -> Image:
    """Return the image in RGB; under the blank control one of its size in the mean color, zero after normalization."""
    from PIL import Image, ImageOps

    # `datasets` applies the EXIF orientation to the images that it decodes; do the same for a path.
    image = ImageOps.exif_transpose(Image.open(source)) if isinstance(source, str) else source
    if control != "blank":
        return image.convert("RGB")
    mean = processor.image_processor.image_mean or [0.5] * 3
    return Image.new("RGB", image.size, tuple(round(255 * part) for part in mean))
