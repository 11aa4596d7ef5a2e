"""From requests to tensors, without a model: generation options, batching, padding, and the shuffled control.

Shapes: N documents of a batch, T prompt tokens (left-padded), P tokens per image.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from clips_eval.lmms.answer_cache import answer_key
from vision_tower.common.errors import UserError

# lmms-eval sets `until` to its few-shot delimiter if a task has none. A chat has no few-shot examples, and an answer
# that begins with a blank line would be cut to nothing.
FEWSHOT_DELIMITER = "\n\n"


@dataclass(frozen=True, kw_only=True)
class Document:
    """A tokenized request.

    Args:
        ids: the prompt, one placeholder token per image.
        images: digests in the prompt's order.
        options: generation options as JSON; only documents with equal options share a batch.
    """

    task: str
    doc_id: int
    ids: list[int]
    images: list[str]
    options: str

    @property
    def key(self) -> str:
        """Key in the answer cache."""
        return answer_key(self.task, self.doc_id, self.ids, self.images, self.options)


def generation_options(gen_kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Convert a task's generation_kwargs to options of `generate` plus `until`; greedy without a temperature."""
    given = gen_kwargs.get("temperature")
    temperature = float(bool(gen_kwargs.get("do_sample"))) if given is None else float(given)
    sample = temperature > 0 and bool(gen_kwargs.get("do_sample", True))
    until = gen_kwargs.get("until") or []
    until = [until] if isinstance(until, str) else list(until)
    return {
        "max_new_tokens": int(gen_kwargs.get("max_new_tokens", 1024)),
        "num_beams": int(gen_kwargs.get("num_beams") or 1),
        "do_sample": sample,
        # Explicit None: the checkpoint's generation_config must not change greedy decoding or warn about it.
        "temperature": temperature if sample else None,
        "top_p": gen_kwargs.get("top_p") if sample else None,
        "top_k": gen_kwargs.get("top_k") if sample else None,
        "repetition_penalty": float(gen_kwargs.get("repetition_penalty") or 1.0),
        "until": [text for text in until if text and text != FEWSHOT_DELIMITER],
    }


def batches(documents: Sequence[Document], size: int) -> Iterator[list[int]]:
    """Yield indices of documents in batches of equal options, longest first, ties in order.

    The longest come first so that a batch that exceeds the memory fails at once. Questions about the same image stay
    together, at the position of their longest, so that `prefix` can share their image tokens.
    """
    groups: dict[str, list[int]] = {}
    for index, document in enumerate(documents):
        groups.setdefault(document.options, []).append(index)
    for group in groups.values():
        ordered = _by_image(documents, group)
        for start in range(0, len(ordered), size):
            yield ordered[start : start + size]


def _by_image(documents: Sequence[Document], indices: Sequence[int]) -> list[int]:
    longest: dict[tuple[str, ...], int] = {}
    for index in indices:
        images = tuple(documents[index].images)
        longest[images] = max(longest.get(images, 0), len(documents[index].ids))

    def order(index: int) -> tuple[int, int, tuple[str, ...], int]:
        length, images = len(documents[index].ids), tuple(documents[index].images)
        # The number of images first: an image has far more tokens than its placeholder in `ids`.
        return len(images), longest[images] if images else 0, images, length

    return sorted(indices, key=order, reverse=True)


def derangement(names: Iterable[str], seed: int) -> dict[str, str]:
    """Map every distinct name to another one: a random cycle through all names (Sattolo's algorithm).

    Depends on the set of names and on the seed, not on their order.

    Raises:
        ValueError: there is only one name.
    """
    before = sorted(set(names))
    if len(before) == 1:
        raise ValueError("one image cannot be exchanged for another")
    after = before.copy()
    rng = random.Random(seed)
    for last in range(len(after) - 1, 0, -1):
        other = rng.randrange(last)
        after[last], after[other] = after[other], after[last]
    return dict(zip(before, after, strict=True))


def shuffle_images(documents: Sequence[Document], seed: int) -> list[Document]:
    """Exchange every image of a task for another image of the same task.

    Raises:
        UserError: all documents of a task show the same image.
    """
    exchange: dict[str, dict[str, str]] = {}
    for task in dict.fromkeys(document.task for document in documents):
        digests = {digest for document in documents if document.task == task for digest in document.images}
        try:
            exchange[task] = derangement(digests, seed)
        except ValueError as error:
            raise UserError(
                f"task {task} shows only one image, and the shuffled control needs two different ones",
                key="control",
                value="shuffled",
                remedy="leave the task or the control out",
            ) from error
    return [
        replace(document, images=[exchange[document.task][digest] for digest in document.images])
        for document in documents
    ]


def left_pad(prompts: Sequence[Sequence[int]], pad: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return ids and attention mask, both (N, T), padded on the left since generation appends on the right."""
    width = max(len(ids) for ids in prompts)
    ids = torch.tensor([[pad] * (width - len(ids)) + list(ids) for ids in prompts])
    mask = torch.tensor([[0] * (width - len(ids)) + [1] * len(ids) for ids in prompts])
    return ids, mask


def truncate(text: str, until: Sequence[str]) -> str:
    """Return the text before the first stop string."""
    ends = [text.find(stop) for stop in until]
    return text[: min((end for end in ends if end >= 0), default=len(text))]


def expand(document: Document, features: Mapping[str, torch.Tensor], image_token: int) -> list[int]:
    """Return the document's ids with each placeholder repeated to its image's P tokens."""
    images = iter(document.images)
    ids: list[int] = []
    for token in document.ids:
        ids += [token] * (len(features[next(images)]) if token == image_token else 1)
    return ids
