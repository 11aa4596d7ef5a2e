"""What `retrieve` and `zeroshot` left beside their scores, checked: damage is named, older files may lack a part."""

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
    """The intervals of the recalls, and a 0 or 1 for each query where the file has them.

    Raises:
        UserError: an interval without its ends, other text than 0 and 1, or of another length than there are queries.
    """
    for key, ends in read_spans(file, tree, recalls).items():
        if ends is None:
            raise UserError(f"'intervals.{key}' has no ends", file=file, remedy=f"{AGAIN}")
    if "hits" not in tree:
        return
    n_queries = {"i2t": n_images, "t2i": _count_captions(file, tree, n_images, n_texts)}
    hits = _object(file, tree, "hits")
    for key in recalls:
        queries, text = n_queries[key[:3]], hits.get(key)
        if not isinstance(text, str) or set(text) - {"0", "1"} or len(text) != queries:
            raise UserError(f"'hits.{key}' is not a 0 or 1 for each of {queries} queries", file=file, remedy=f"{AGAIN}")


def _count_captions(file: Path, tree: dict[str, Any], n_images: int, n_texts: int | None) -> int:
    counts = tree.get("captions_per_image")
    if not isinstance(counts, list) or not all(isinstance(count, int) and count > 0 for count in counts):
        raise UserError("'captions_per_image' is not a list of counts", file=file, remedy=f"{AGAIN}")
    total = sum(counts)
    if len(counts) != n_images or total != (n_texts or total):
        told = "" if n_texts is None else f" and {n_texts} texts"
        raise UserError(
            f"'captions_per_image' are {total} captions of {len(counts)} images, not of {n_images} images{told}",
            file=file,
            remedy=f"{AGAIN}",
        )
    return total


def check_geometry(file: Path, tree: dict[str, Any]) -> None:
    """Ranks, mAP@R and how the embeddings lie: all or none.

    Raises:
        UserError: one of their numbers is missing or is none.
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
    """Several right answers, and recalls by caption length and by object.

    Raises:
        UserError: a part of another form, a number that is missing or is none.
    """
    if tree.get("multi_positive") is not None:
        several = _object(file, tree, "multi_positive")
        for way in WAYS:
            found, place = _object(file, several, way, "multi_positive"), f"multi_positive.{way}"
            _check_shares(file, found, SHARES, place)
            number_in(file, found, "n", place)  # 0 where the file annotates no query of this way
    for place, row in _rows(file, tree, "by_length"):
        words = row.get("words")
        if not isinstance(words, list) or len(words) != 2 or not all(isinstance(number, int) for number in words):
            raise UserError(
                f"'{place}.words' is {words!r}, two whole numbers are expected", file=file, remedy=f"{AGAIN}"
            )
        count_in(file, row, "n", place)
        _check_shares(file, row, [f"t2i_r{k}" for k in (1, 5, 10)], place)
    for place, row in _rows(file, tree, "by_object"):
        if not isinstance(row.get("object"), str):
            raise UserError(
                f"'{place}.object' is {row.get('object')!r}, a name is expected", file=file, remedy=f"{AGAIN}"
            )
        count_in(file, row, "n_images", place)
        count_in(file, row, "n_texts", place)
        _check_shares(file, row, [f"{way}_r{k}" for way in WAYS for k in (1, 5, 10)], place)


def read_spans(
    file: Path, tree: dict[str, Any], keys: Iterable[str], place: str = ""
) -> dict[str, tuple[float, float] | None]:
    """The ends of the `intervals` that stand beside numbers, for those keys that have one.

    None where nothing can be said of a number.

    Raises:
        UserError: an interval of another form.
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
    """The objects of a list with their places; none where the file has no such list."""
    rows = tree.get(key, [])
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise UserError(f"'{key}' is not a list of objects", file=file, remedy=f"{AGAIN}")
    yield from ((f"{key}[{number}]", row) for number, row in enumerate(rows))


def _object(file: Path, tree: dict[str, Any], key: str, place: str = "") -> dict[str, Any]:
    found = tree.get(key)
    if not isinstance(found, dict):
        name = f"{place}.{key}" if place else key
        raise UserError(f"'{name}' is {type(found).__name__}, an object is expected", file=file, remedy=f"{AGAIN}")
    return found
