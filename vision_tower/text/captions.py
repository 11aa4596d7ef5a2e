"""Sentence splitting and caption reduction: the text encoder reads only a short part of a synthetic caption.

The inverse effect of CLIPS (arXiv 2411.16828, section 3): short synthetic captions train a better encoder. The
functions work on sequences of any type; the callers pass word pieces of a tokenizer.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from typing import TypeVar

Piece = TypeVar("Piece")

# Full stops of abbreviations, initials and decimals do not end a sentence.
_ALWAYS = frozenset({"mr", "mrs", "ms", "dr", "prof", "st", "vs", "e.g", "i.e", "approx"})
_BEFORE_NUMBER = frozenset({"no", "fig"})  # otherwise a word that ends its sentence: "No.", "a fig."
_BEFORE_LOWER = frozenset({"etc", "jr", "sr", "inc", "ltd"})  # a capital after them opens a new sentence
_ACRONYM = re.compile(r"[a-z](\.[a-z])+")
_CANDIDATE = re.compile(r"[.!?]+[\"')\]”’»]*(?=\s|$)|[。！？]+[」』”’）]*|\n+")


def split_sentences(caption: str) -> list[str]:
    """Split a caption into sentences, stripped, in order, without blank ones.

    Splits at `.`, `!`, `?`, line ends and CJK stops, but not in decimals, abbreviations and initials.
    """
    sentences: list[str] = []
    start = 0
    for match in _CANDIDATE.finditer(caption):
        rest = caption[match.end() :].lstrip(" ")
        if match.group() == "." and _is_abbreviation(caption[start : match.start()], rest[:1]):
            continue
        sentences.append(caption[start : match.end()].strip())
        start = match.end()
    sentences.append(caption[start:].strip())
    return [sentence for sentence in sentences if any(character.isalnum() for character in sentence)]


def _is_abbreviation(before: str, after: str) -> bool:
    """Return True if a full stop between the words `before` and the letter `after` marks an abbreviation."""
    if not before.strip():
        return False
    last = before.rsplit(maxsplit=1)[-1].lstrip("(\"'").lower()
    if last in _BEFORE_NUMBER:
        return after.isdigit()
    if last in _BEFORE_LOWER or _ACRONYM.fullmatch(last):
        return last in _ALWAYS or after.islower() or after.isdigit()
    return last in _ALWAYS or (len(last) == 1 and last.isascii() and last.isalpha() and last not in "ai")


def truncation(pieces: Sequence[Piece], budget: int) -> list[Piece]:
    """Return the first `budget` pieces."""
    return list(pieces[:budget])


def random_mask(pieces: Sequence[Piece], budget: int, rng: random.Random) -> list[Piece]:
    """Return `budget` uniformly random pieces, in order."""
    kept = sorted(rng.sample(range(len(pieces)), min(budget, len(pieces))))
    return [pieces[index] for index in kept]


def block_mask(pieces: Sequence[Piece], budget: int, rng: random.Random) -> list[Piece]:
    """Return a uniformly random block of `budget` consecutive pieces."""
    start = rng.randrange(max(len(pieces) - budget, 0) + 1)
    return list(pieces[start : start + budget])


def sub_caption(sentences: Sequence[Sequence[Piece]], budget: int, rng: random.Random) -> list[Piece]:
    """Draw random sentences until the budget is full, in the caption's order; the last one drawn is truncated."""
    kept: dict[int, Sequence[Piece]] = {}
    for index in rng.sample(range(len(sentences)), len(sentences)):
        kept[index] = sentences[index][:budget]
        budget -= len(kept[index])
        if not budget:
            break
    return [piece for index in sorted(kept) for piece in kept[index]]


def draw_sentences(sentences: Sequence[str], count: int, rng: random.Random) -> list[str]:
    """Return `count` uniformly random sentences, or all if there are fewer, in order."""
    return [sentences[index] for index in sorted(rng.sample(range(len(sentences)), min(count, len(sentences))))]
