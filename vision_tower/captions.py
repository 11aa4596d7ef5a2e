"""Sentences and sub-captions: only a short part of a synthetic caption goes to the text encoder.

The inverse effect of CLIPS (arXiv 2411.16828, section 3): short synthetic captions train a better encoder.
"""

from __future__ import annotations

import random
import re

# Full stops of abbreviations, initials and decimals do not end a sentence.
_ALWAYS = frozenset({"mr", "mrs", "ms", "dr", "prof", "st", "vs", "e.g", "i.e", "approx"})
_BEFORE_NUMBER = frozenset({"no", "fig"})  # elsewhere an answer, or a fruit
_BEFORE_LOWER = frozenset({"etc", "jr", "sr", "inc", "ltd"})  # a capital after them opens a new sentence
_ACRONYM = re.compile(r"[a-z](\.[a-z])+")
_CANDIDATE = re.compile(r"[.!?]+[\"')\]”’»]*(?=\s|$)|[。！？]+[」』”’）]*|\n+")


def split_sentences(caption: str) -> list[str]:
    """The sentences of a caption, stripped, in order, none of them blank.

    Splits at `.`, `!`, `?`, line ends and CJK stops; decimals, abbreviations and initials stay whole.
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
    """Whether a full stop between the words `before` it and the letter `after` it only shortens the last word."""
    if not before.strip():
        return False
    last = before.split()[-1].lstrip("(\"'").lower()
    if last in _BEFORE_NUMBER:
        return after.isdigit()
    if last in _BEFORE_LOWER or _ACRONYM.fullmatch(last):
        return last in _ALWAYS or after.islower() or after.isdigit()
    return last in _ALWAYS or (len(last) == 1 and last.isascii() and last.isalpha() and last not in "ai")


def draw_sentence(caption: str, rng: random.Random) -> str:
    """One sentence, uniformly; the caption itself where it has no sentence (an empty caption stays empty)."""
    sentences = split_sentences(caption)
    return rng.choice(sentences) if sentences else caption.strip()
