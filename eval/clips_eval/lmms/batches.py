"""From requests to tensors, the part without a model: options, order, padding, and the shuffled control.

Shapes: N documents of a batch, T prompt tokens (left-padded), P tokens an image, D width of the language model.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from clips_eval.lmms.images import derangement
from clips_eval.lmms.journal import key_of
from vision_tower.common.errors import UserError

# lmms-eval puts its few-shot delimiter into `until` of every task that names none. In a chat there are no shots to
# delimit, and an answer that opens with a blank line would be cut to nothing.
FEWSHOT_DELIMITER = "\n\n"


@dataclass(frozen=True, kw_only=True)
class Document:
    """A request made ready to batch."""

    task: str
    doc_id: int
    ids: list[int]  # the prompt, one placeholder token an image
    images: list[str]  # digests, in the prompt's order
    options: str  # generation options as JSON: only documents with equal ones share a batch

    @property
    def key(self) -> str:
        """For the journal."""
        return key_of(self.task, self.doc_id, self.ids, self.images, self.options)


def generation_options(gen_kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """A task's generation_kwargs as options of `generate`, plus `until`; greedy unless a temperature is asked for."""
    given = gen_kwargs.get("temperature")
    temperature = float(bool(gen_kwargs.get("do_sample"))) if given is None else float(given)
    sample = temperature > 0 and bool(gen_kwargs.get("do_sample", True))
    until = gen_kwargs.get("until") or []
    until = [until] if isinstance(until, str) else list(until)
    return {
        "max_new_tokens": int(gen_kwargs.get("max_new_tokens", 1024)),
        "num_beams": int(gen_kwargs.get("num_beams") or 1),
        "do_sample": sample,
        # None, not absent: a checkpoint's own generation_config must not warn about, or change, greedy decoding.
        "temperature": temperature if sample else None,
        "top_p": gen_kwargs.get("top_p") if sample else None,
        "top_k": gen_kwargs.get("top_k") if sample else None,
        "repetition_penalty": float(gen_kwargs.get("repetition_penalty") or 1.0),
        "until": [text for text in until if text and text != FEWSHOT_DELIMITER],
    }


def batches(documents: Sequence[Document], size: int) -> Iterator[list[int]]:
    """Places of the documents in batches of equal options, longest first; ties keep their order.

    Longest first, so that a batch that does not fit into memory fails at once. Questions about one image stay
    together, at the place of their longest: what they share is read once.
    """
    groups: dict[str, list[int]] = {}
    for place, document in enumerate(documents):
        groups.setdefault(document.options, []).append(place)
    for group in groups.values():
        places = _by_image(documents, group)
        for start in range(0, len(places), size):
            yield places[start : start + size]


def _by_image(documents: Sequence[Document], places: Sequence[int]) -> list[int]:
    longest: dict[tuple[str, ...], int] = {}
    for place in places:
        images = tuple(documents[place].images)
        longest[images] = max(longest.get(images, 0), len(documents[place].ids))

    def order(place: int) -> tuple[int, int, tuple[str, ...], int]:
        length, images = len(documents[place].ids), tuple(documents[place].images)
        # An image has the same number of tokens everywhere, more than any text differs by.
        return len(images), longest[images] if images else 0, images, length

    return sorted(places, key=order, reverse=True)


def shuffle_images(documents: Sequence[Document], seed: int) -> list[Document]:
    """Every image of a task exchanged for another image of that task.

    Raises:
        UserError: a task whose documents all show one image.
    """
    exchange: dict[str, dict[str, str]] = {}
    for task in dict.fromkeys(document.task for document in documents):
        digests = {digest for document in documents if document.task == task for digest in document.images}
        try:
            exchange[task] = derangement(digests, seed)
        except ValueError as error:
            raise UserError(
                f"task {task}: {error}", remedy="the shuffled control needs two different images"
            ) from error
    return [
        replace(document, images=[exchange[document.task][digest] for digest in document.images])
        for document in documents
    ]


def left_pad(prompts: Sequence[Sequence[int]], pad: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and attention mask, both (N, T): generation goes on from the right edge."""
    width = max(len(ids) for ids in prompts)
    ids = torch.tensor([[pad] * (width - len(ids)) + list(ids) for ids in prompts])
    mask = torch.tensor([[0] * (width - len(ids)) + [1] * len(ids) for ids in prompts])
    return ids, mask


def cut(text: str, until: Sequence[str]) -> str:
    """The text before the first of the stop strings."""
    ends = [text.find(stop) for stop in until]
    return text[: min((end for end in ends if end >= 0), default=len(text))]


def expand(document: Document, features: Mapping[str, torch.Tensor], image_token: int) -> list[int]:
    """The document's ids with each image placeholder repeated to its image's P tokens."""
    images = iter(document.images)
    ids: list[int] = []
    for token in document.ids:
        ids += [token] * (len(features[next(images)]) if token == image_token else 1)
    return ids
