"""Conversations to batches.

LLaVA JSON --llava_json--> Example(messages, images) --render--> ids, labels --InstructionCollator--> tensors
"""

from __future__ import annotations

import dataclasses
import multiprocessing
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import torch
from PIL import Image
from torch.utils.data import Dataset
from transformers import LlavaImageProcessor, LlavaProcessor

from clips_mllm.llava_json import BadRow, Example, read_rows, to_example
from clips_mllm.prompts import IGNORED, Rendered, Unsupervised, load_template, render
from clips_mllm.train_recipe import InstructionRecipe
from vision_tower.errors import UserError
from vision_tower.images import BadImage, decode_image

SETTLED = 200  # samples seen before the share of unusable ones may stop a run


class InstructionDataset(Dataset[dict[str, Any]]):
    """Rendered conversations with their pixels.

    Rows that cannot be used are dropped and counted when the set is opened; pictures that turn out corrupt are
    replaced by the next sample and counted. Above `most_bad` the run stops.
    """

    def __init__(self, recipe: InstructionRecipe, processor: LlavaProcessor) -> None:
        self.recipe = recipe
        self.processor = processor
        self.template = load_template(recipe.template)
        self.file = Path(recipe.file)
        self.folder = Path(recipe.images)
        rows = read_rows(self.file)
        self.dropped: Counter[str] = Counter()
        self.examples = list(self._usable(rows))
        self._report(len(rows))
        self.corrupt = multiprocessing.Value("l", 0)
        self.seen = multiprocessing.Value("l", 0)

    def _usable(self, rows: list[dict[str, Any]]) -> Iterator[Example]:
        for number, row in enumerate(rows):
            try:
                example = to_example(row)
            except BadRow as error:
                self._drop(str(error), number, row)
                continue
            missing = next((name for name in example.images if not (self.folder / name).is_file()), None)
            if missing is not None:
                self._drop("missing image", number, row, f" {self.folder / missing}")
                continue
            yield example

    def _drop(self, cause: str, number: int, row: Any, detail: str = "") -> None:
        if not self.dropped[cause]:
            name = row.get("id", "") if isinstance(row, dict) else ""
            print(f"skipped: {self.file}: row {number} ({name}): {cause}{detail}", file=sys.stderr, flush=True)
        self.dropped[cause] += 1

    def _report(self, rows: int) -> None:
        if not self.dropped:
            return
        causes = ", ".join(f"{count} x {cause}" for cause, count in self.dropped.most_common())
        if self.dropped.total() > self.recipe.most_bad * rows or not self.examples:
            raise UserError(
                f"{self.file}: {self.dropped.total()} of {rows} rows are unusable ({causes}), more than data.most_bad="
                f"{self.recipe.most_bad}; mend the file or raise the limit"
            )
        print(f"skipped: {self.file}: {self.dropped.total()} of {rows} rows: {causes}", file=sys.stderr, flush=True)

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """`ids`, `labels` and `images`, a list of RGB pictures."""
        for step in range(len(self)):
            example = self.examples[(index + step) % len(self)]
            with self.seen.get_lock():
                self.seen.value += 1
            try:
                pictures = [self._picture(name) for name in example.images]
                rendered = self.render(example)
            except (BadImage, OSError) as error:  # which name the file
                self._count_corrupt(str(error))
                continue
            except Unsupervised as error:
                self._count_corrupt(f"{', '.join(example.images) or 'a text-only sample'}: {error}")
                continue
            return {"ids": rendered.ids, "labels": rendered.labels, "images": pictures}
        raise UserError(f"{self.file}: not one usable sample; every picture is corrupt or nothing is supervised")

    def render(self, example: Example) -> Rendered:
        """Ids and labels of an example."""
        return render(
            example.messages,
            template=self.template,
            tokenizer=self.processor.tokenizer,
            image_tokens=image_tokens(self.processor),
            max_length=self.recipe.max_length,
        )

    def _picture(self, name: str) -> Image.Image:
        try:
            return decode_image((self.folder / name).read_bytes())
        except BadImage as error:
            raise BadImage(f"corrupt image {self.folder / name} ({error})") from error

    def _count_corrupt(self, what: str) -> None:
        with self.corrupt.get_lock():
            self.corrupt.value += 1
        bad, seen = self.corrupt.value, self.seen.value
        print(f"skipped: {self.file}: {what} ({bad} so far)", file=sys.stderr, flush=True)
        if seen >= SETTLED and bad > self.recipe.most_bad * seen:
            raise UserError(
                f"{self.file}: {bad} of {seen} samples could not be used (last: {what}), more than data.most_bad="
                f"{self.recipe.most_bad}; mend the data or raise the limit"
            )

    def lengths(self) -> list[int]:
        """Rough token counts for grouping: words of the conversation, negative for text-only samples."""
        found: list[int] = []
        for example in self.examples:
            words = sum(
                len(part["text"].split()) + 8 for m in example.messages for part in m["content"] if "text" in part
            )
            found.append(words if example.images else -words)
        return found


def image_tokens(processor: LlavaProcessor) -> int:
    """Positions that one picture takes in the sequence."""
    size = processor.image_processor.size
    crop = getattr(processor.image_processor, "crop_size", None)
    side = (crop or size).get("height") or size["shortest_edge"]
    count = (side // processor.patch_size) ** 2 + processor.num_additional_image_tokens
    return int(count) - (processor.vision_feature_select_strategy == "default")


def make_square(processor: LlavaProcessor, square: Literal["squash", "pad"]) -> None:
    """Let the processor squash pictures, or first centre them on a square of its mean colour, as LLaVA-1.5 does.

    Padding is the stock processor's, and so is saved with the checkpoint: whoever loads it prepares pictures in the
    way that it was trained with.
    """
    own = processor.image_processor
    if square == "pad":
        processor.image_processor = LlavaImageProcessor(
            do_pad=True,
            size=own.size,
            do_center_crop=bool(getattr(own, "do_center_crop", False)),
            crop_size=getattr(own, "crop_size", None) or own.size,
            resample=own.resample,
            image_mean=own.image_mean,
            image_std=own.image_std,
            do_convert_rgb=True,
        )
    elif isinstance(own, LlavaImageProcessor):
        own.do_pad = False


@dataclasses.dataclass(frozen=True)
class InstructionCollator:
    """Samples -> right-padded `input_ids`, `attention_mask`, `labels` (b, s) and `pixel_values` (images, 3, h, w).

    A batch without any picture gets a blank one whose tokens are masked padding: then every rank always runs tower and
    projector, and no collective of ZeRO waits for a rank that has only text.
    """

    processor: LlavaProcessor

    def __call__(self, samples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """See the class."""
        ids = [list(sample["ids"]) for sample in samples]
        labels = [list(sample["labels"]) for sample in samples]
        masks = [[1] * len(row) for row in ids]
        pictures = [picture for sample in samples for picture in sample["images"]]
        if not pictures:
            pictures = [blank_picture()]
            blank = image_tokens(self.processor)
            ids[0] += [self.processor.image_token_id] * blank
            labels[0] += [IGNORED] * blank
            masks[0] += [0] * blank
        longest = max(map(len, ids))
        pad = self.processor.tokenizer.pad_token_id
        pixels = self.processor.image_processor(images=pictures, return_tensors="pt")["pixel_values"]
        return {
            "input_ids": _padded(ids, longest, pad),
            "attention_mask": _padded(masks, longest, 0),
            "labels": _padded(labels, longest, IGNORED),
            "pixel_values": pixels,
        }


def blank_picture() -> Image.Image:
    """What stands in where a batch has no picture."""
    return Image.new("RGB", (32, 32))


def _padded(rows: list[list[int]], length: int, value: int) -> torch.Tensor:
    return torch.tensor([row + [value] * (length - len(row)) for row in rows])
