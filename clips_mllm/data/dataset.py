"""Data set of tokenized conversations with their images.

sources --row_store--> Example(messages, images) --render--> ids, labels --InstructionCollator--> tensors
"""

from __future__ import annotations

import logging
import multiprocessing
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image
from torch.utils.data import Dataset, Subset
from transformers import LlavaProcessor

from clips_mllm.data.llava_json import Example
from clips_mllm.data.mixture import mix
from clips_mllm.data.recipe import InstructionRecipe
from clips_mllm.data.row_store import RowStore, report_skipped
from clips_mllm.model.feature_store import FeatureStore, ImageOrFeatures
from clips_mllm.model.processors import image_token_counts
from clips_mllm.prompts.chat_template import template_for
from clips_mllm.prompts.conversation import Unsupervised
from clips_mllm.prompts.render import Rendered, render
from vision_tower.common.errors import UserError
from vision_tower.data.images import BadImage, decode_image

logger = logging.getLogger(__name__)

MIN_SAMPLES = 200  # samples read before `max_bad_fraction` can stop a run


class Examples(Sequence[Example]):
    """Conversations of one epoch: all sources one after the other, or a mixture. Rows are read on access."""

    def __init__(self, recipe: InstructionRecipe) -> None:
        self.stores = [RowStore(source) for source in recipe.sources]
        for store in self.stores:
            report_skipped(store, recipe.max_bad_fraction)
        sizes = [len(store) for store in self.stores]
        self.begins = np.cumsum([0, *sizes])
        self.indices = mix(recipe.sources, sizes, recipe.seed)

    def __len__(self) -> int:
        return int(self.begins[-1]) if self.indices is None else len(self.indices)

    def locate(self, index: int) -> tuple[RowStore, int]:
        """Return the store of a sample and its index there."""
        if not 0 <= index < len(self):
            raise IndexError(index)
        row = int(index if self.indices is None else self.indices[index])
        source = int(np.searchsorted(self.begins, row, side="right")) - 1
        return self.stores[source], row - int(self.begins[source])

    def __getitem__(self, index: Any) -> Any:
        store, row = self.locate(index)
        return store.example(row)

    def lengths(self) -> np.ndarray:
        """Return approximate lengths in words, int32; negative for text-only samples."""
        lengths = np.concatenate([store.lengths() for store in self.stores])
        return lengths if self.indices is None else lengths[self.indices]


class InstructionDataset(Dataset[dict[str, Any]]):
    """Tokenized conversations with their images.

    Unusable rows are dropped and counted when the data set is opened. A sample with a corrupt image is replaced by the
    next one and counted. The run stops if the fraction of either exceeds `max_bad_fraction`.

    Args:
        examples: the recipe's examples, if they are already open.
    """

    def __init__(self, recipe: InstructionRecipe, processor: LlavaProcessor, examples: Examples | None = None) -> None:
        self.recipe = recipe
        self.processor = processor
        self.template = template_for(processor.tokenizer, recipe.template)
        self.examples = Examples(recipe) if examples is None else examples
        self.name = ", ".join(source.file for source in recipe.sources)
        self.dropped: Counter[str] = sum((Counter(store.report.dropped) for store in self.examples.stores), Counter())
        self.features: FeatureStore | None = None
        # Shared with the loader workers.
        self.corrupt = multiprocessing.Value("l", 0)
        self.seen = multiprocessing.Value("l", 0)

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Return `ids`, `labels` and `images`: RGB images, or results of the cache lookup if `features` is set."""
        for step in range(len(self)):
            candidate = (index + step) % len(self)
            with self.seen.get_lock():
                self.seen.value += 1
            try:
                return self.load(candidate)[0]
            except (BadImage, OSError) as error:  # its message names the file
                self._count_corrupt(str(error))
            except Unsupervised as error:
                names = ", ".join(map(str, self.examples[candidate].images))
                self._count_corrupt(f"{names or 'a text-only sample'}: {error}")
        raise UserError(
            "every image is corrupt, or no sample has a label", file=self.name, remedy="run `clips-mllm data doctor`"
        )

    def load(self, index: int) -> tuple[dict[str, Any], Rendered]:
        """Return exactly this sample and its rendering. Raises BadImage, OSError or Unsupervised."""
        store, row = self.examples.locate(index)
        example = store.example(row)
        images = [self._image(store, row, name) for name in example.images]
        rendered = self.render(example, images)
        return {"ids": rendered.ids, "labels": rendered.labels, "images": images}, rendered

    def describe(self, index: int) -> str:
        """Return file and row number of a sample, for messages."""
        store, row = self.examples.locate(index)
        return f"{store.source.file}: row {store.number(row)}"

    def render(self, example: Example, images: Sequence[Image.Image | ImageOrFeatures]) -> Rendered:
        """Return ids and labels of an example."""
        return render(
            example.messages,
            template=self.template,
            tokenizer=self.processor.tokenizer,
            image_tokens=image_token_counts(self.processor, images),
            max_length=self.recipe.max_length,
        )

    def lengths(self) -> np.ndarray:
        """Return approximate lengths in words, int32; negative for text-only samples."""
        return self.examples.lengths()

    def _image(self, store: RowStore, row: int, name: str | int) -> Image.Image | ImageOrFeatures:
        content = store.image(row, name)
        try:
            return decode_image(content) if self.features is None else self.features.look_up(content, decode_image)
        except BadImage as error:
            file = store.images / name if isinstance(name, str) else f"in row {store.number(row)}"
            raise BadImage(f"corrupt image {file} ({error})") from error

    def _count_corrupt(self, problem: str) -> None:
        with self.corrupt.get_lock():
            self.corrupt.value += 1
            bad = self.corrupt.value
        seen = self.seen.value
        if bad.bit_count() == 1:  # log the 1st, 2nd, 4th, 8th, … so that the log stays short
            logger.warning("skipped: %s: %s (%d so far)", self.name, problem, bad)
        if seen >= MIN_SAMPLES and bad > self.recipe.max_bad_fraction * seen:
            raise UserError(
                f"{bad} of {seen} samples are unusable (last: {problem}), more than "
                f"data.max_bad_fraction={self.recipe.max_bad_fraction}",
                file=self.name,
                remedy="find them with `clips-mllm data doctor` and fix them, or raise the limit",
            )


class InstructionSubset(Subset[dict[str, Any]]):
    """Samples of a data set by index, with their lengths for grouping."""

    dataset: InstructionDataset

    def lengths(self) -> np.ndarray:
        """Return the lengths of the subset's samples."""
        return self.dataset.lengths()[self.indices]


def train_eval_split(
    dataset: InstructionDataset, fraction: float, seed: int
) -> tuple[InstructionSubset, InstructionSubset]:
    """Split into training and held-out samples, both in the order of the data set.

    Rows are drawn, not samples: with a source of weight 2, both samples of a row are on the same side.
    """
    indices = dataset.examples.indices
    rows = np.arange(len(dataset)) if indices is None else indices
    distinct, first = np.unique(rows, return_index=True)
    order = np.random.default_rng(seed).permutation(len(distinct))
    count = max(round(fraction * len(distinct)), 1)
    if count >= len(distinct):
        raise UserError(
            f"leaves none of {len(distinct)} samples", key="evaluation.share", value=fraction, remedy="lower it"
        )
    held_out = order[:count]
    train = np.flatnonzero(~np.isin(rows, distinct[held_out]))
    # Arrays, not lists: 8 bytes per sample.
    return InstructionSubset(dataset, train), InstructionSubset(dataset, np.sort(first[held_out]))  # type: ignore[arg-type]
