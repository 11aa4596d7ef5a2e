"""Shared prompt prefixes: keys and values of an image's tokens are computed once for all questions about it.

Image tokens are most of a benchmark's prompt, and POPE asks 18 questions about each image. The prefix also contains the
first words that all questions have in common. Its keys and values are repeated for its documents.

Shapes: N documents of a batch, U distinct prefixes, P tokens of a prefix, T tokens of a prompt.
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
class Prefixes:
    """Prefixes of P = `length` tokens of a batch's prompts.

    Args:
        first: U indices, one document of each distinct prefix.
        row_of: N indices into `first`, the prefix of each document.
    """

    length: int
    first: list[int]
    row_of: list[int]


def shared_prefixes(
    batch: Sequence[Document], prompts: Sequence[Sequence[int]], image_token: int, options: Mapping[str, Any]
) -> Prefixes | None:
    """Return the shared prefixes; None without images, if their tokens end at different positions, or with beams.

    Also None if no two documents share a prefix.
    """
    ends = {max((index + 1 for index, token in enumerate(ids) if token == image_token), default=0) for ids in prompts}
    if len(ends) > 1 or options["num_beams"] > 1:
        return None
    (end,) = ends
    names = [(tuple(ids[:end]), tuple(document.images)) for ids, document in zip(prompts, batch, strict=True)]
    groups: dict[Any, list[int]] = {}
    for index, name in enumerate(names):
        groups.setdefault(name, []).append(index)
    length = min(common_length([prompts[index] for index in group]) for group in groups.values())
    if not end or len(groups) == len(batch) or length < end:
        return None
    rows = {name: row for row, name in enumerate(groups)}
    return Prefixes(length=length, first=[group[0] for group in groups.values()], row_of=[rows[name] for name in names])


def common_length(prompts: Sequence[Sequence[int]]) -> int:
    """Count the common first tokens, at most all but the last of the shortest: `generate` needs one new token."""
    shortest = min(map(len, prompts)) - 1
    differs = (index for index in range(shortest) if len({ids[index] for ids in prompts}) > 1)
    return next(differs, shortest)


def generate_inputs(
    model: LlavaForConditionalGeneration,
    prompts: Sequence[Sequence[int]],
    shared: Prefixes,
    encoder_output: Any,
    pad: int,
) -> dict[str, Any]:
    """Return arguments of `generate` that continue the prefixes: ids and mask (N, T), keys and values of P tokens.

    Padding is between the prefix and the rest; the mask hides it, and position ids skip it.

    Args:
        encoder_output: image features of the distinct prefixes, in their order.
    """
    device = model.device
    prefix = torch.tensor([list(prompts[index][: shared.length]) for index in shared.first], device=device)
    output = model(input_ids=prefix, mm_encoder_outputs={"image": encoder_output}, use_cache=True, logits_to_keep=1)
    rows = torch.tensor(shared.row_of, device=device)
    output.past_key_values.batch_select_indices(rows)
    ids, mask = left_pad([ids[shared.length :] for ids in prompts], pad)
    return {
        "input_ids": torch.cat([prefix[rows], ids.to(device)], dim=1),
        "attention_mask": torch.cat([torch.ones_like(prefix[rows]), mask.to(device)], dim=1),
        "past_key_values": output.past_key_values,
    }
