"""Lengths of a recipe's samples in tokens: rendered as in training if the data exists, otherwise assumed.

data files --evenly spaced rows--> conversations --template and tokenizer of the recipe--> Lengths

Needs transformers only if the data files exist.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from clips_mllm.data.json_rows import read_rows
from clips_mllm.data.llava_json import BadRow, to_example
from clips_mllm.data.mixture import mix, share
from clips_mllm.data.recipe import InstructionRecipe, InstructionSource
from clips_mllm.data.row_source import is_json, matching, open_table, table_rows
from clips_mllm.model.recipe import MllmRecipe
from clips_mllm.planning.catalog import read_catalog
from clips_mllm.prompts.conversation import IGNORED, Unsupervised
from vision_tower.common.errors import UserError

if TYPE_CHECKING:
    from clips_mllm.checks.rendering import Renderer
    from clips_mllm.prompts.render import Rendered

MAX_RENDERED = 2000  # samples, about five seconds


@dataclasses.dataclass(frozen=True, kw_only=True)
class Lengths:
    """Lengths of samples, in tokens.

    Attributes:
        samples: number of samples in an epoch; 0 if unknown.
        longest, mean: with image tokens.
        supervised: mean number of tokens that have a label.
        images: mean number of images.
        assumed: reason why the lengths are assumed; empty if they were measured.
    """

    samples: int
    longest: int
    mean: float
    supervised: float
    images: float
    assumed: str = ""


def read_lengths(
    data: InstructionRecipe, model: MllmRecipe, image_tokens: int, *, text_tokens: int, samples: int
) -> Lengths:
    """Measure the lengths of a recipe's samples. Images are counted, not opened.

    Args:
        model: as `resolve_model` returns it.
        image_tokens: tokens of one image.
        text_tokens: mean tokens of a sample's text if lengths cannot be measured.
        samples: number of samples if a data file does not exist; 0 takes the size of LLaVA's files.
    Raises:
        UserError: a file cannot be read, or no row of it can be used.
    """
    assumed = Lengths(
        samples=samples or _catalog_samples(data),
        longest=data.max_length,
        mean=min(data.max_length, image_tokens + text_tokens),
        supervised=min(data.max_length - image_tokens, text_tokens),
        images=1.0,
    )
    missing = [source.file for source in data.sources if source.on_hub or not matching(source.file)]
    if missing:
        return dataclasses.replace(assumed, assumed=f"{missing[0]} is not on this machine")
    count, rows = sample_rows(data)
    renderer = _open_renderer(data, model, image_tokens)
    if renderer is None:
        reason = f"{model.checkpoint or model.llm} has no tokenizer on this machine"
        return dataclasses.replace(assumed, samples=count, assumed=reason)
    rendered = list(_render(rows, renderer))
    if not rendered:
        file = data.sources[0].file
        raise UserError("no usable conversation", file=file, remedy="run `clips-mllm data doctor` on it")
    lengths = [len(one.ids) for one, _ in rendered]
    return Lengths(
        samples=count,
        longest=max(lengths),
        mean=float(np.mean(lengths)),
        supervised=float(np.mean([sum(label != IGNORED for label in one.labels) for one, _ in rendered])),
        images=float(np.mean([images for _, images in rendered])),
    )


def sample_rows(data: InstructionRecipe) -> tuple[int, list[Any]]:
    """Return the number of samples in an epoch, and rows that are evenly spaced over it.

    JSON files are read twice, so that memory does not grow with their size.
    """
    sizes = [_count_rows(source) for source in data.sources]
    order = mix(data.sources, sizes, data.seed)
    places = np.arange(sum(sizes)) if order is None else order
    sampled = places[:: max(1, len(places) // MAX_RENDERED)]
    rows: list[Any] = []
    begin = 0
    for source, size in zip(data.sources, sizes, strict=True):
        inside = sampled[(sampled >= begin) & (sampled < begin + size)] - begin
        found = _read_rows(source, set(inside.tolist()))
        rows += [found[number] for number in inside.tolist()]  # a weight above 1 repeats rows
        begin += size
    return len(places), rows


def _count_rows(source: InstructionSource) -> int:
    return sum(1 for _ in read_rows(Path(source.file))) if is_json(source) else len(open_table(source))


def _read_rows(source: InstructionSource, numbers: set[int]) -> dict[int, Any]:
    if is_json(source):
        return {number: row for number, row in enumerate(read_rows(Path(source.file))) if number in numbers}
    table = open_table(source)
    return {number: table_rows(table, number)[0] for number in numbers}


def _catalog_samples(data: InstructionRecipe) -> int:
    """Samples in an epoch of the files that the catalog lists; 0 if it lists none."""
    known: dict[str, int] = read_catalog()["samples"]
    sizes = [(source, known.get(Path(source.file).name, 0)) for source in data.sources]
    return sum(share(source, size) for source, size in sizes if size)


def _open_renderer(data: InstructionRecipe, model: MllmRecipe, image_tokens: int) -> Renderer | None:
    """Return the renderer of the recipe; None if the tokenizer of a hub model or future folder is not available."""
    from clips_mllm.checks.recipe import DataRecipe
    from clips_mllm.checks.rendering import open_renderer

    name = model.checkpoint or model.llm
    assert name is not None, "MllmRecipe.check has run"
    file, template = data.sources[0].file, data.template
    recipe = DataRecipe(file=file, model=name, template=template, image_tokens=image_tokens, max_length=data.max_length)
    try:
        return open_renderer(recipe)
    except UserError:
        if Path(name).exists():
            raise
        return None


def _render(rows: list[Any], renderer: Renderer) -> Iterator[tuple[Rendered, int]]:
    """Yield rendered samples with their number of images; rows that training drops are left out."""
    for row in rows:
        try:
            example = to_example(row)
            yield renderer(example), len(example.images)
        except (BadRow, Unsupervised):
            continue  # `clips-mllm data doctor` reports them
