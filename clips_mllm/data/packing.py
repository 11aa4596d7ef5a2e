"""Several samples in one row: what would have been padding is work instead.

A batch keeps its samples, so its loss and its place in the run are those of the unpacked batch; only the layout
changes. No row is longer than the longest sample, so attention costs no more either. Within a row `position_ids` start
again with each sample and there is no `attention_mask`: transformers then builds a block-diagonal mask for sdpa and
eager attention, and stock LLaVA needs no code for it. The rest of a row is one more block, that nothing is learnt from.

Shapes: r rows, s longest sample, in tokens.
"""

from __future__ import annotations

import dataclasses

import torch

from clips_mllm.prompts.conversation import IGNORED


@dataclasses.dataclass(frozen=True)
class Row:
    """Tokens in a row, with their labels."""

    ids: list[int]
    labels: list[int]


def fill(lengths: list[int], most: int) -> list[list[int]]:
    """Samples by row: longest first, each into the first row with space for it (first-fit decreasing)."""
    rows: list[list[int]] = []
    space: list[int] = []
    for at in sorted(range(len(lengths)), key=lambda at: -lengths[at]):
        row = next((row for row, left in enumerate(space) if left >= lengths[at]), len(rows))
        if row == len(rows):
            rows.append([])
            space.append(most)
        rows[row].append(at)
        space[row] -= lengths[at]
    return rows


def pack(samples: list[Row], layout: list[list[int]], pad: int) -> dict[str, torch.Tensor]:
    """`input_ids`, `labels`, `position_ids` (r, s).

    Args:
        layout: the samples of each row, as `fill` gives them.
        pad: id of padding.
    """
    width = max(sum(len(samples[at].ids) for at in row) for row in layout)
    ids, labels, positions = [], [], []
    for row in layout:
        parts = [samples[at] for at in row]
        space = width - sum(len(part.ids) for part in parts)
        if space:
            parts.append(Row([pad] * space, [IGNORED] * space))
        ids.append([token for part in parts for token in part.ids])
        labels.append([label for part in parts for label in part.labels])
        positions.append([place for part in parts for place in range(len(part.ids))])
    return {
        "input_ids": torch.tensor(ids),
        "labels": torch.tensor(labels),
        "position_ids": torch.tensor(positions),
    }
