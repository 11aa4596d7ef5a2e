"""What a request asks: the prompt's text and the images that go with it, in lmms-eval's two modes and under controls.

chat    doc_to_messages(document) --parts--> the processor's chat template
simple  context with <image> put before it --string--> the tokenizer's chat template, as stock `llava_hf` does
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
PLACEHOLDER = "<image>"  # lmms-eval's, in contexts; a checkpoint's own may differ


@dataclass(frozen=True, kw_only=True)
class Asked:
    """A prompt with a placeholder for each of its images."""

    prompt: str
    images: list[Image]


def place_of(request: Instance) -> str:
    """For messages: "task pope, document 3"."""
    _, _, _, doc_id, task, _ = request.args
    return f"task {task}, document {doc_id}"


def task_names(requests: Sequence[Instance]) -> str:
    """For progress bars: the first three."""
    return ", ".join([*dict.fromkeys(request.args[4] for request in requests)][:3])


def options_of(request: Instance, *, simple: bool) -> Mapping[str, Any]:
    """The task's generation_kwargs."""
    return request.args[1] if simple else request.args[2]


def document_of(request: Instance, documents: Mapping[str, Any]) -> Any:
    """The task's row that the request asks about; `documents` is the model's `task_dict`.

    Raises:
        UserError: its image cannot be decoded, which `datasets` does as the row is read.
    """
    _, _, _, doc_id, task, split = request.args
    with readable(place_of(request)):
        return documents[task][split][doc_id]


def ask_chat(request: Instance, document: Any, processor: LlavaProcessor, control: Control) -> Asked:
    """In chat mode.

    Raises:
        UserError: an image that cannot be read, or a document with video or sound.
    """
    place = place_of(request)
    images: list[Image] = []
    messages: list[dict[str, Any]] = []
    with readable(place):
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
                        images.append(_shown(part["url"], control, processor))
                    case other:
                        raise UserError(
                            f"it has {other}, which a LLaVA model cannot take", file=place, remedy="leave the task out"
                        )
            messages.append({"role": message["role"], "content": content})
    prompt = processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    return Asked(prompt=prompt, images=images)


def ask_simple(request: Instance, document: Any, processor: LlavaProcessor, control: Control) -> Asked:
    """In simple mode, where a context that has no placeholder gets one for each image, before the text.

    Raises:
        UserError: as `ask_chat`.
    """
    place = place_of(request)
    context: str = request.args[0]
    with readable(place):
        visuals = list(request.args[2](document) or [])
        if any(isinstance(visual, str) for visual in visuals):
            raise UserError("it has video, which a LLaVA model cannot take", file=place, remedy="leave the task out")
        images = [] if control == "no_image" else [_shown(visual, control, processor) for visual in visuals]
    if control == "no_image":
        context = context.replace(PLACEHOLDER, "").strip()
    elif images and PLACEHOLDER not in context:
        context = f"{' '.join([PLACEHOLDER] * len(images))}\n{context}"
    messages = [{"role": "user", "content": context.replace(PLACEHOLDER, processor.image_token)}]
    template = processor.tokenizer.chat_template or processor.chat_template
    prompt = processor.tokenizer.apply_chat_template(
        messages, chat_template=template, tokenize=False, add_generation_prompt=True
    )
    return Asked(prompt=str(prompt), images=images)


@contextmanager
def readable(place: str) -> Iterator[None]:
    """What PIL raises for a broken image, as a line that names the document."""
    try:
        yield
    except (OSError, SyntaxError) as error:
        if disk_is_full(error):
            raise
        raise UserError(f"its image cannot be read ({error})", file=place, remedy="mend the data file") from error


def _shown(source: Image | str, control: Control, processor: LlavaProcessor) -> Image:
    """The image, or under the blank control one of its size in the mean colour, which is zero to the tower."""
    from PIL import Image, ImageOps

    # Upright, as `datasets` gives a task the images of its documents.
    image = ImageOps.exif_transpose(Image.open(source)) if isinstance(source, str) else source
    if control != "blank":
        return image.convert("RGB")
    mean = processor.image_processor.image_mean or [0.5] * 3
    return Image.new("RGB", image.size, tuple(round(255 * part) for part in mean))
