"""Check of a sample of the training data before step 1, in seconds. `data doctor` checks all of it."""

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
    """Result of `check_sample`. Means are over usable samples.

    Attributes:
        checked: number of checked samples.
        causes: number of unusable samples by cause.
        first: position and error of the first unusable sample; empty if all are usable.
        tokens: mean length, with image tokens.
        supervised: mean number of supervised tokens.
        cut: number of samples longer than max_length, which lose their end.
        images: mean number of images.
    """

    checked: int
    causes: dict[str, int]
    first: str
    tokens: float
    supervised: float
    cut: int
    images: float

    def line(self) -> str:
        """Return a line for the log."""
        unusable = sum(self.causes.values())
        causes = ", ".join(f"{count} x {cause}" for cause, count in self.causes.items())
        return (
            f"{self.checked} samples checked: mean {self.tokens:.0f} tokens, {self.supervised:.0f} supervised, "
            f"{self.images:.2f} images; {self.cut} cut at max_length, {unusable} unusable"
            + (f" ({causes})" if causes else "")
        )


def check_sample(dataset: InstructionDataset, count: int = 64) -> SampleCheck:
    """Render and decode `count` evenly spaced samples. They do not count for the run's own `max_bad_fraction`.

    Raises:
        UserError: more than one sample, and more than `max_bad_fraction` of them, cannot be used.
    """
    count = min(count, len(dataset))
    causes: Counter[str] = Counter()
    first = ""
    tokens, supervised, images, cut = 0, 0, 0, 0
    for index in (number * len(dataset) // count for number in range(count)):
        try:
            sample, rendered = dataset.load(index)
        except (BadImage, OSError, Unsupervised) as error:
            causes["no supervised token" if isinstance(error, Unsupervised) else "unreadable image"] += 1
            first = first or f"{dataset.describe(index)}: {error}"
            continue
        tokens += len(rendered.ids)
        supervised += sum(label != IGNORED for label in rendered.labels)
        images += len(sample["images"])
        cut += rendered.full_length > len(rendered.ids)
    bad = causes.total()
    if bad > max(1, dataset.recipe.max_bad_fraction * count) or bad == count:
        raise UserError(
            f"{bad} of {count} checked samples cannot be used (first: {first})",
            file=dataset.name,
            key="data.max_bad_fraction",
            value=dataset.recipe.max_bad_fraction,
            remedy="run `clips-mllm data doctor` on the file",
        )
    good = count - bad
    return SampleCheck(count, dict(causes), first, tokens / good, supervised / good, cut, images / good)
