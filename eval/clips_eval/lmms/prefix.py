"""What several questions about one image share is read once: its image tokens, and the words they all begin with.

Of a benchmark's prompt the image tokens are the larger part, and POPE asks 18 questions about each image. The keys
and values of the shared part are computed for each distinct one and repeated for its documents.

Shapes: N documents of a batch, U distinct beginnings, P tokens of a beginning, T of a whole prompt.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from clips_eval.lmms.batches import Document, left_pad

if TYPE_CHECKING:
    from transformers import LlavaForConditionalGeneration


@dataclass(frozen=True, kw_only=True)
class Beginnings:
    """`length` tokens that a batch's prompts begin with; `first` has a document of each distinct beginning."""

    length: int
    first: list[int]
    row_of: list[int]  # N, into `first`


def shared_beginnings(
    batch: Sequence[Document], prompts: Sequence[Sequence[int]], image_token: int, options: Mapping[str, Any]
) -> Beginnings | None:
    """What the batch shares, or None: no images, which end at different places, all distinct, or beams."""
    ends = {max((place + 1 for place, token in enumerate(ids) if token == image_token), default=0) for ids in prompts}
    if len(ends) > 1 or options["num_beams"] > 1:
        return None
    (end,) = ends
    names = [(tuple(ids[:end]), tuple(document.images)) for ids, document in zip(prompts, batch, strict=True)]
    groups: dict[Any, list[int]] = {}
    for place, name in enumerate(names):
        groups.setdefault(name, []).append(place)
    length = min(common_length([prompts[place] for place in group]) for group in groups.values())
    if not end or len(groups) == len(batch) or length < end:
        return None
    rows = {name: row for row, name in enumerate(groups)}
    return Beginnings(
        length=length, first=[group[0] for group in groups.values()], row_of=[rows[name] for name in names]
    )


def common_length(prompts: Sequence[Sequence[int]]) -> int:
    """Tokens that all of them begin with, but for the last of the shortest: something must be left to go on from."""
    shortest = min(map(len, prompts)) - 1
    differs = (place for place in range(shortest) if len({ids[place] for ids in prompts}) > 1)
    return next(differs, shortest)


def continued(
    model: LlavaForConditionalGeneration,
    prompts: Sequence[Sequence[int]],
    shared: Beginnings,
    encoder_output: Any,
    pad: int,
) -> dict[str, Any]:
    """Arguments of `generate` that go on from the shared beginnings: ids and mask (N, T), keys and values of P tokens.

    Padding stands between the beginning and the rest; the mask hides it, and positions count what is not hidden.

    Args:
        encoder_output: features of the images of the distinct beginnings, in their order.
    """
    device = model.device
    begin = torch.tensor([list(prompts[place][: shared.length]) for place in shared.first], device=device)
    read = model(input_ids=begin, mm_encoder_outputs={"image": encoder_output}, use_cache=True, logits_to_keep=1)
    rows = torch.tensor(shared.row_of, device=device)
    read.past_key_values.batch_select_indices(rows)
    ids, mask = left_pad([ids[shared.length :] for ids in prompts], pad)
    return {
        "input_ids": torch.cat([begin[rows], ids.to(device)], dim=1),
        "attention_mask": torch.cat([torch.ones_like(begin[rows]), mask.to(device)], dim=1),
        "past_key_values": read.past_key_values,
    }
