"""Conversations to batches.

sources --row_store--> Example(messages, images) --render--> ids, labels --InstructionCollator--> tensors
"""

from __future__ import annotations

import dataclasses
import multiprocessing
import sys
from collections import Counter
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset
from transformers import LlavaProcessor

from clips_mllm.data.llava_json import Example
from clips_mllm.data.mixture import mix
from clips_mllm.data.packing import Row, fill, pack
from clips_mllm.data.recipe import InstructionRecipe
from clips_mllm.data.row_store import RowStore, say
from clips_mllm.model.feature_store import BLANK, FeatureStore, ImageOrFeatures, visual_inputs
from clips_mllm.model.processors import IMAGE_INPUTS, image_token_counts
from clips_mllm.prompts.chat_template import template_for
from clips_mllm.prompts.conversation import IGNORED, Unsupervised
from clips_mllm.prompts.render import Rendered, render
from vision_tower.common.errors import UserError
from vision_tower.common.launcher import is_main_process
from vision_tower.data.images import BadImage, decode_image

SETTLED = 200  # samples seen before the share of unusable ones may stop a run


class Examples(Sequence[Example]):
    """The conversations of an epoch, read from disk as they are asked for: one source after the other, or a mixture."""

    def __init__(self, recipe: InstructionRecipe) -> None:
        self.stores = [RowStore(source) for source in recipe.sources]
        for store in self.stores:
            say(store.source, store.report, len(store), recipe.max_bad_fraction, quiet=not is_main_process())
        sizes = [len(store) for store in self.stores]
        self.begins = np.cumsum([0, *sizes])
        self.places = mix(recipe.sources, sizes, recipe.seed)

    def __len__(self) -> int:
        return int(self.begins[-1]) if self.places is None else len(self.places)

    def where(self, index: int) -> tuple[RowStore, int]:
        """The source of a sample, and the place there."""
        if not 0 <= index < len(self):
            raise IndexError(index)
        at = index if self.places is None else int(self.places[index])
        number = int(np.searchsorted(self.begins, at, side="right")) - 1
        return self.stores[number], at - int(self.begins[number])

    def __getitem__(self, index: Any) -> Any:
        store, at = self.where(index)
        return store.example(at)

    def lengths(self) -> np.ndarray:
        """Rough lengths in words, int32; negative for text-only samples."""
        line = np.concatenate([store.lengths() for store in self.stores])
        return line if self.places is None else line[self.places]


class InstructionDataset(Dataset[dict[str, Any]]):
    """Rendered conversations with their pixels.

    Rows that cannot be used are dropped and counted when the set is opened; images that turn out corrupt are
    replaced by the next sample and counted. Above `max_bad_fraction` the run stops. `examples` are those of the
    recipe, where
    they are open.
    """

    def __init__(self, recipe: InstructionRecipe, processor: LlavaProcessor, examples: Examples | None = None) -> None:
        self.recipe = recipe
        self.processor = processor
        self.template = template_for(processor.tokenizer, recipe.template)
        self.examples = Examples(recipe) if examples is None else examples
        self.name = ", ".join(source.file for source in recipe.sources)
        self.dropped: Counter[str] = sum((Counter(store.report.dropped) for store in self.examples.stores), Counter())
        self.features: FeatureStore | None = None
        self.corrupt = multiprocessing.Value("l", 0)
        self.seen = multiprocessing.Value("l", 0)

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """`ids`, `labels` and `images`, a list of RGB images; with `features`, what looking them up there gave."""
        for step in range(len(self)):
            at = (index + step) % len(self)
            with self.seen.get_lock():
                self.seen.value += 1
            try:
                return self.load(at)[0]
            except (BadImage, OSError) as error:  # which name the file
                self._count_corrupt(str(error))
            except Unsupervised as error:
                names = ", ".join(map(str, self.examples[at].images))
                self._count_corrupt(f"{names or 'a text-only sample'}: {error}")
        raise UserError(
            "not one usable sample", file=self.name, remedy="every image is corrupt or nothing is supervised"
        )

    def load(self, index: int) -> tuple[dict[str, Any], Rendered]:
        """The sample at a place itself, and how it was rendered. Raises BadImage, OSError or Unsupervised."""
        store, at = self.examples.where(index)
        example = store.example(at)
        images = [self._image(store, at, name) for name in example.images]
        rendered = self.render(example, images)
        return {"ids": rendered.ids, "labels": rendered.labels, "images": images}, rendered

    def describe(self, index: int) -> str:
        """File and row of a sample."""
        store, at = self.examples.where(index)
        return f"{store.source.file}: row {store.number(at)}"

    def render(self, example: Example, images: Sequence[Image.Image | ImageOrFeatures]) -> Rendered:
        """Ids and labels of an example."""
        return render(
            example.messages,
            template=self.template,
            tokenizer=self.processor.tokenizer,
            image_tokens=image_token_counts(self.processor, images),
            max_length=self.recipe.max_length,
        )

    def _image(self, store: RowStore, at: int, name: str | int) -> Image.Image | ImageOrFeatures:
        content = store.image(at, name)
        try:
            return decode_image(content) if self.features is None else self.features.look_up(content, decode_image)
        except BadImage as error:
            place = store.images / name if isinstance(name, str) else f"in row {store.number(at)}"
            raise BadImage(f"corrupt image {place} ({error})") from error

    def _count_corrupt(self, what: str) -> None:
        with self.corrupt.get_lock():
            self.corrupt.value += 1
            bad = self.corrupt.value
        seen = self.seen.value
        if bad.bit_count() == 1:  # the 1st, 2nd, 4th, 8th ...: that there are more is told, and a log stays readable
            print(f"skipped: {self.name}: {what} ({bad} so far)", file=sys.stderr, flush=True)
        if seen >= SETTLED and bad > self.recipe.max_bad_fraction * seen:
            raise UserError(
                f"{bad} of {seen} samples could not be used (last: {what}), more than "
                f"data.max_bad_fraction={self.recipe.max_bad_fraction}; `clips-mllm data doctor` finds them",
                file=self.name,
                remedy="mend the data or raise the limit",
            )

    def lengths(self) -> np.ndarray:
        """Rough token counts for grouping: words of the conversation, negative for text-only samples."""
        return self.examples.lengths()


@dataclasses.dataclass(frozen=True)
class InstructionCollator:
    """Samples -> right-padded `input_ids`, `attention_mask`, `labels` (b, s) and `pixel_values` (images, 3, h, w).

    With tiles `pixel_values` is (images, tiles, 3, h, w), and `image_sizes` (images, 2) stands beside it.

    A batch without any image gets a blank one whose tokens are masked padding: then every rank always runs tower and
    projector, and no collective of ZeRO waits for a rank that has only text. With `packing`, samples share rows, and
    `position_ids` that start again stand in the place of `attention_mask` (packing.py). With `features`, images are
    what the store said of them, and the batch is one for `CachedTower.complete`.
    """

    processor: LlavaProcessor
    packing: Literal["none", "rows", "one_row"] = "none"
    features: FeatureStore | None = None

    def __call__(self, samples: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """See the class."""
        if any(sample["images"] for sample in samples):
            blank = []
        else:
            image = blank_image()
            count = image_token_counts(self.processor, [image])[0]
            ids, labels = [self.processor.image_token_id] * count, [IGNORED] * count
            blank = [{"ids": ids, "labels": labels, "images": [self._looked_up(image)]}]
        pad = self.processor.tokenizer.pad_token_id
        if self.packing == "none":
            samples, tokens = [*samples, *blank], self._padded(samples, blank, pad)
        else:
            samples, tokens = self._packed([*samples, *blank], pad)
        images = [image for sample in samples for image in sample["images"]]
        if self.features is not None:
            return tokens | visual_inputs(images, self.processor.image_processor)
        pixels = self.processor.image_processor(images=images, return_tensors="pt")
        return tokens | {name: pixels[name] for name in IMAGE_INPUTS if name in pixels}

    def _looked_up(self, blank: Image.Image) -> Image.Image | ImageOrFeatures:
        return blank if self.features is None else self.features.look_up(BLANK, lambda _: blank)

    @staticmethod
    def _padded(samples: list[dict[str, Any]], blank: list[dict[str, Any]], pad: int) -> dict[str, torch.Tensor]:
        """A row a sample; a blank image's tokens follow the first, masked."""
        ids = [list(sample["ids"]) for sample in samples]
        labels = [list(sample["labels"]) for sample in samples]
        masks = [[1] * len(row) for row in ids]
        for sample in blank:
            ids[0] += sample["ids"]
            labels[0] += sample["labels"]
            masks[0] += [0] * len(sample["ids"])
        longest = max(map(len, ids))
        return {
            "input_ids": _padded(ids, longest, pad),
            "attention_mask": _padded(masks, longest, 0),
            "labels": _padded(labels, longest, IGNORED),
        }

    def _packed(self, samples: list[dict[str, Any]], pad: int) -> tuple[list[dict[str, Any]], dict[str, torch.Tensor]]:
        """The samples in reading order of their rows, as the model takes their images, and the rows."""
        rows = [Row(list(sample["ids"]), list(sample["labels"])) for sample in samples]
        lengths = [len(row.ids) for row in rows]
        layout = fill(lengths, sum(lengths) if self.packing == "one_row" else max(lengths))
        return [samples[at] for row in layout for at in row], pack(rows, layout, pad)


def packing_for(recipe: InstructionRecipe, attention: str) -> Literal["none", "rows", "one_row"]:
    """How the collator packs: flash attention tells samples apart in a single row only (untested here, no GPU)."""
    if not recipe.packing:
        return "none"
    return "one_row" if attention.startswith("flash_attention") else "rows"


def blank_image() -> Image.Image:
    """What stands in where a batch has no image."""
    return Image.new("RGB", (32, 32))


def _padded(rows: list[list[int]], length: int, value: int) -> torch.Tensor:
    return torch.tensor([row + [value] * (length - len(row)) for row in rows])
