"""A look at a sample of the data before step 1: what the doctor would say of it, in seconds."""

from __future__ import annotations

import dataclasses
from collections import Counter
from typing import TYPE_CHECKING

from clips_mllm.prompts.conversation import IGNORED, Unsupervised
from vision_tower.common.errors import UserError
from vision_tower.data.images import BadImage

if TYPE_CHECKING:
    from clips_mllm.data.dataset import InstructionDataset


@dataclasses.dataclass(frozen=True)
class SampleCheck:
    """What was found.

    Attributes:
        seen: samples that were looked at, evenly spread over the set.
        causes: how many of them cannot be used, by cause.
        first: the first unusable one, in words; empty where all are fine.
        tokens: mean length of the usable ones, images included.
        learnt: mean number of supervised tokens.
        cut: how many are longer than max_length and lose their end.
        images: mean number of images.
    """

    seen: int
    causes: dict[str, int]
    first: str
    tokens: float
    learnt: float
    cut: int
    images: float

    def line(self) -> str:
        """For the log."""
        bad = sum(self.causes.values())
        told = ", ".join(f"{count} x {cause}" for cause, count in self.causes.items())
        return (
            f"{self.seen} samples looked at: {self.tokens:.0f} tokens and {self.learnt:.0f} learnt on average, "
            f"{self.images:.2f} images, {self.cut} cut at max_length, {bad} unusable" + (f" ({told})" if told else "")
        )


def check_sample(dataset: InstructionDataset, count: int = 64) -> SampleCheck:
    """Render and decode `count` samples, evenly spread; counts nothing against `max_bad_fraction` of the run.

    Raises:
        UserError: more than `max_bad_fraction` of the sample, and more than one, cannot be used.
    """
    places = sorted({at * len(dataset) // count for at in range(min(count, len(dataset)))})
    if len(dataset) <= count:
        places = list(range(len(dataset)))
    causes: Counter[str] = Counter()
    first = ""
    tokens, learnt, images, cut = 0, 0, 0, 0
    for at in places:
        try:
            sample, rendered = dataset.load(at)
        except (BadImage, OSError, Unsupervised) as error:
            cause = "nothing to learn" if isinstance(error, Unsupervised) else "unreadable image"
            causes[cause] += 1
            first = first or f"{dataset.describe(at)}: {error}"
            continue
        tokens += len(rendered.ids)
        learnt += sum(label != IGNORED for label in rendered.labels)
        images += len(sample["images"])
        cut += rendered.whole > len(rendered.ids)
    good = max(len(places) - causes.total(), 1)
    found = SampleCheck(len(places), dict(causes), first, tokens / good, learnt / good, cut, images / good)
    if causes.total() > max(1, dataset.recipe.max_bad_fraction * len(places)) or causes.total() == len(places):
        raise UserError(
            f"{causes.total()} of {len(places)} samples looked at cannot be used (first: {first}), more "
            f"than data.max_bad_fraction={dataset.recipe.max_bad_fraction}",
            file=dataset.name,
            remedy="run `clips-mllm data doctor` on it",
        )
    return found
