"""Batches of samples, padded or packed.

Packing puts several samples of a batch into one row instead of padding each. A batch keeps its samples, so its loss
does not change. No row is longer than the longest sample, so attention does not cost more. Each sample's
`position_ids` start at 0 and there is no `attention_mask`: transformers then builds a block-diagonal mask for sdpa and
eager attention, without code in stock LLaVA. The rest of a row is one more block, without labels.

Shapes: b samples, r rows, s longest sample in tokens.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal, TypeAlias

import torch
from PIL import Image
from transformers import LlavaProcessor

from clips_mllm.data.recipe import InstructionRecipe
from clips_mllm.model.feature_store import BLANK, FeatureStore, ImageOrFeatures, visual_inputs
from clips_mllm.model.processors import IMAGE_INPUTS, image_token_counts
from clips_mllm.prompts.conversation import IGNORED

Packing: TypeAlias = Literal["none", "rows", "one_row"]


@dataclasses.dataclass(frozen=True)
class InstructionCollator:
    """Samples -> `input_ids`, `attention_mask`, `labels` (b, s) and `pixel_values` (images, 3, h, w).

    With tiles, `pixel_values` is (images, tiles, 3, h, w), and `image_sizes` is (images, 2). With packing, `input_ids`,
    `labels` and `position_ids` are (r, s). With `features`, the batch holds cached features and the missing images, for
    `CachedTower.complete`.

    A batch without images gets a blank image whose tokens are masked padding. Thus every rank runs tower and projector
    in every step, and no ZeRO collective waits for a rank that has only text.
    """

    processor: LlavaProcessor
    packing: Packing = "none"
    features: FeatureStore | None = None

    def __call__(self, samples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """Collate samples with `ids`, `labels` and `images`."""
        blank = [] if any(sample["images"] for sample in samples) else [self._blank_sample()]
        pad = self.processor.tokenizer.pad_token_id
        if self.packing == "none":
            tokens = pad_samples(samples, blank, pad)
            samples = [*samples, *blank]
        else:
            samples = [*samples, *blank]
            lengths = [len(sample["ids"]) for sample in samples]
            layout = first_fit(lengths, sum(lengths) if self.packing == "one_row" else max(lengths))
            tokens = pack(samples, layout, pad)
            samples = [samples[index] for row in layout for index in row]  # images in the order of their tokens
        images = [image for sample in samples for image in sample["images"]]
        if self.features is not None:
            return tokens | visual_inputs(images, self.processor.image_processor)
        pixels = self.processor.image_processor(images=images, return_tensors="pt")
        return tokens | {name: pixels[name] for name in IMAGE_INPUTS if name in pixels}

    def _blank_sample(self) -> dict[str, Any]:
        image = Image.new("RGB", (32, 32))
        count = image_token_counts(self.processor, [image])[0]
        entry: Image.Image | ImageOrFeatures = image
        if self.features is not None:
            entry = self.features.look_up(BLANK, lambda _: image)
        return {"ids": [self.processor.image_token_id] * count, "labels": [IGNORED] * count, "images": [entry]}


def packing_for(recipe: InstructionRecipe, attention: str) -> Packing:
    """Choose the layout of packed rows. Flash attention separates samples within a single row only."""
    if not recipe.packing:
        return "none"
    return "one_row" if attention.startswith("flash_attention") else "rows"


def pad_samples(samples: list[dict[str, Any]], blank: list[dict[str, Any]], pad: int) -> dict[str, torch.Tensor]:
    """Pad on the right, one row per sample. The tokens of a blank image follow those of the first sample, masked."""
    ids = [list(sample["ids"]) for sample in samples]
    labels = [list(sample["labels"]) for sample in samples]
    masks = [[1] * len(row) for row in ids]
    for sample in blank:
        ids[0] += sample["ids"]
        labels[0] += sample["labels"]
        masks[0] += [0] * len(sample["ids"])
    return {
        "input_ids": _padded(ids, pad),
        "attention_mask": _padded(masks, 0),
        "labels": _padded(labels, IGNORED),
    }


def _padded(rows: list[list[int]], value: int) -> torch.Tensor:
    length = max(map(len, rows))
    return torch.tensor([row + [value] * (length - len(row)) for row in rows])


def first_fit(lengths: list[int], capacity: int) -> list[list[int]]:
    """Assign samples to rows of `capacity` tokens, by first-fit decreasing. Return the sample indices of each row."""
    rows: list[list[int]] = []
    space: list[int] = []
    for index in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
        row = next((row for row, left in enumerate(space) if left >= lengths[index]), len(rows))
        if row == len(rows):
            rows.append([])
            space.append(capacity)
        rows[row].append(index)
        space[row] -= lengths[index]
    return rows


def pack(samples: list[dict[str, Any]], layout: list[list[int]], pad: int) -> dict[str, torch.Tensor]:
    """Return `input_ids`, `labels` and `position_ids` (r, s).

    Args:
        samples: dicts with `ids` and `labels`.
        layout: sample indices of each row, from `first_fit`.
        pad: id of the padding token.
    """
    width = max(sum(len(samples[index]["ids"]) for index in row) for row in layout)
    ids, labels, positions = [], [], []
    for row in layout:
        parts = [samples[index] for index in row]
        space = width - sum(len(part["ids"]) for part in parts)
        if space:
            parts.append({"ids": [pad] * space, "labels": [IGNORED] * space})
        ids.append([token for part in parts for token in part["ids"]])
        labels.append([label for part in parts for label in part["labels"]])
        positions.append([position for part in parts for position in range(len(part["ids"]))])
    return {
        "input_ids": torch.tensor(ids),
        "labels": torch.tensor(labels),
        "position_ids": torch.tensor(positions),
    }
