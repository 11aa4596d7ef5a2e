"""Validate the parts of retrieval.json and zeroshot.json beyond the scores."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from clips_eval.stats.json_files import count_in, number_in
from vision_tower.common.errors import UserError

GEOMETRY = ("modality_gap", "alignment", "uniformity_images", "uniformity_texts")
WAYS = ("i2t", "t2i")
SHARES = ("r1", "r5", "r10", "r_precision", "map_at_r")  # of several right answers
AGAIN = "run the step that writes this file again"


def check_hits(file: Path, tree: dict[str, Any], recalls: Sequence[str], n_images: int, n_texts: int | None) -> None:
    """Check the intervals of the recalls, and the string of one 0 or 1 per query.

    Raises:
        UserError: an interval without bounds, other characters than 0 and 1, or too few or many.
    """
    for key, ends in read_spans(file, tree, recalls).items():
        if ends is None:
            raise UserError(f"'intervals.{key}' has no bounds", file=file, remedy=AGAIN)
    if "hits" not in tree:
        return
    n_queries = {"i2t": n_images, "t2i": _count_captions(file, tree, n_images, n_texts)}
    hits = _object(file, tree, "hits")
    for key in recalls:
        queries, text = n_queries[key[:3]], hits.get(key)
        if not isinstance(text, str) or set(text) - {"0", "1"} or len(text) != queries:
            raise UserError(f"'hits.{key}' must have {queries} characters 0 or 1", file=file, remedy=AGAIN)


def _count_captions(file: Path, tree: dict[str, Any], n_images: int, n_texts: int | None) -> int:
    counts = tree.get("captions_per_image")
    if not isinstance(counts, list) or not all(isinstance(count, int) and count > 0 for count in counts):
        raise UserError("'captions_per_image' is not a list of counts", file=file, remedy=AGAIN)
    total = sum(counts)
    if len(counts) != n_images or total != (n_texts or total):
        texts = "" if n_texts is None else f" and {n_texts} texts"
        raise UserError(
            f"'captions_per_image' has {total} captions of {len(counts)} images, expected {n_images} images{texts}",
            file=file,
            remedy=AGAIN,
        )
    return total


def check_geometry(file: Path, tree: dict[str, Any]) -> None:
    """Check median ranks, mAP@R and embedding geometry.

    Raises:
        UserError: a number is missing or not finite.
    """
    if not {"geometry", "median_rank", "map_at_r"} & set(tree):
        return
    for key in GEOMETRY:
        number_in(file, _object(file, tree, "geometry"), key, "geometry")
    for name in ("median_rank", "map_at_r"):
        found = _object(file, tree, name)
        for way in WAYS:
            number_in(file, found, way, name, fraction=name == "map_at_r")
        read_spans(file, found, WAYS, name)


def check_breakdowns(file: Path, tree: dict[str, Any]) -> None:
    """Check multi-positive scores, and recalls by caption length and by object.

    Raises:
        UserError: a malformed part, or a number that is missing or not finite.
    """
    if tree.get("multi_positive") is not None:
        several = _object(file, tree, "multi_positive")
        for way in WAYS:
            found, place = _object(file, several, way, "multi_positive"), f"multi_positive.{way}"
            _check_shares(file, found, SHARES, place)
            number_in(file, found, "n", place)  # 0 if the annotations have no query in this direction
    for place, row in _rows(file, tree, "by_length"):
        words = row.get("words")
        if not isinstance(words, list) or len(words) != 2 or not all(isinstance(number, int) for number in words):
            raise UserError(f"'{place}.words' is {words!r}, expected two integers", file=file, remedy=AGAIN)
        count_in(file, row, "n", place)
        _check_shares(file, row, [f"t2i_r{k}" for k in (1, 5, 10)], place)
    for place, row in _rows(file, tree, "by_object"):
        if not isinstance(row.get("object"), str):
            raise UserError(f"'{place}.object' is {row.get('object')!r}, expected a name", file=file, remedy=AGAIN)
        count_in(file, row, "n_images", place)
        count_in(file, row, "n_texts", place)
        _check_shares(file, row, [f"{way}_r{k}" for way in WAYS for k in (1, 5, 10)], place)


def read_spans(
    file: Path, tree: dict[str, Any], keys: Iterable[str], place: str = ""
) -> dict[str, tuple[float, float] | None]:
    """Return the (low, high) bounds in `tree["intervals"]` for the keys that have one; None if undefined.

    Raises:
        UserError: a malformed interval.
    """
    if "intervals" not in tree:
        return {}
    found = _object(file, tree, "intervals", place)
    inside = f"{place}.intervals" if place else "intervals"
    return {key: _ends(file, _object(file, found, key, inside), f"{inside}.{key}") for key in keys if key in found}


def _ends(file: Path, span: dict[str, Any], place: str) -> tuple[float, float] | None:
    if [span.get("low", place), span.get("high", place)] == [None, None]:
        return None
    return number_in(file, span, "low", place), number_in(file, span, "high", place)


def _check_shares(file: Path, tree: dict[str, Any], keys: Sequence[str], place: str) -> None:
    for key in keys:
        number_in(file, tree, key, place, fraction=True)
    read_spans(file, tree, keys, place)


def _rows(file: Path, tree: dict[str, Any], key: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield (JSON path, object) for each object of a list; nothing if the key is absent."""
    rows = tree.get(key, [])
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise UserError(f"'{key}' is not a list of objects", file=file, remedy=AGAIN)
    yield from ((f"{key}[{number}]", row) for number, row in enumerate(rows))


def _object(file: Path, tree: dict[str, Any], key: str, place: str = "") -> dict[str, Any]:
    found = tree.get(key)
    if not isinstance(found, dict):
        name = f"{place}.{key}" if place else key
        raise UserError(f"'{name}' is {type(found).__name__}, expected an object", file=file, remedy=AGAIN)
    return found
