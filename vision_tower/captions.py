"""Sentences and sub-captions: only a short part of a synthetic caption goes to the text encoder.

The inverse effect of CLIPS (arXiv 2411.16828, section 3): short synthetic captions train a better encoder.
"""

from __future__ import annotations

import random
import re

# Full stops of abbreviations, initials and decimals do not end a sentence.
_ABBREVIATIONS = frozenset(
    {"mr", "mrs", "ms", "dr", "prof", "st", "vs", "etc", "e.g", "i.e", "no", "fig", "jr", "sr", "inc", "ltd", "approx"}
)
_CANDIDATE = re.compile(r"[.!?]+[\"')\]]*(?=\s|$)|[。！？]+|\n+")


def split_sentences(caption: str) -> list[str]:
    """The sentences of a caption, stripped, in order, none of them blank.

    Splits at `.`, `!`, `?`, line ends and CJK stops; decimals, abbreviations and initials stay whole.
    """
    sentences: list[str] = []
    start = 0
    for match in _CANDIDATE.finditer(caption):
        if match.group().startswith(".") and _is_abbreviation(caption[start : match.start()]):
            continue
        sentences.append(caption[start : match.end()].strip())
        start = match.end()
    sentences.append(caption[start:].strip())
    return [sentence for sentence in sentences if any(character.isalnum() for character in sentence)]


def _is_abbreviation(before: str) -> bool:
    words = before.split()
    if not words:
        return False
    last = words[-1].lstrip("(\"'").lower()
    return last in _ABBREVIATIONS or (len(last) == 1 and last.isalpha() and len(words) > 1 and last not in "ai")


def draw_sentence(caption: str, rng: random.Random) -> str:
    """One sentence, uniformly; the caption itself where it has no sentence (an empty caption stays empty)."""
    sentences = split_sentences(caption)
    return rng.choice(sentences) if sentences else caption.strip()
