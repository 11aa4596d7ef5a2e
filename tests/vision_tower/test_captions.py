"""Sentence splitting and the caption reductions."""

from __future__ import annotations

import collections
import itertools
import random
from collections.abc import Callable

import pytest

from vision_tower.text.captions import block_mask, draw_sentences, random_mask, split_sentences, sub_caption, truncation


@pytest.mark.parametrize(
    ("caption", "sentences"),
    [
        ("A dog runs. A cat sleeps!", ["A dog runs.", "A cat sleeps!"]),
        ("Is it red? Yes. Surely...", ["Is it red?", "Yes.", "Surely..."]),
        ("It is 3.5 m high. It costs $1.99.", ["It is 3.5 m high.", "It costs $1.99."]),
        ("Dr. Smith met Mr. Jones, e.g. at noon. They ate.", ["Dr. Smith met Mr. Jones, e.g. at noon.", "They ate."]),
        ("J. K. Rowling signs a book. It is new.", ["J. K. Rowling signs a book.", "It is new."]),
        ("The U.S. flag waves. It is 5 p.m. The sun sets.", ["The U.S. flag waves.", "It is 5 p.m.", "The sun sets."]),
        ("Pears, plums etc. lie here. Figs etc. The end.", ["Pears, plums etc. lie here.", "Figs etc.", "The end."]),
        ("Is it wet? No. It is a fig. See No. 5.", ["Is it wet?", "No.", "It is a fig.", "See No. 5."]),
        ("Vitamin A. Then I. Then more.", ["Vitamin A.", "Then I.", "Then more."]),
        ('He says "stop." She goes. (Both smile.)', ['He says "stop."', "She goes.", "(Both smile.)"]),
        ("He says “stop.” She goes.", ["He says “stop.”", "She goes."]),
        ("一只狗在跑。一只猫！还有？“好。”完", ["一只狗在跑。", "一只猫！", "还有？", "“好。”", "完"]),
        ("first line\nsecond line\n\n\nthird", ["first line", "second line", "third"]),
        ("no stop at all", ["no stop at all"]),
        (" . .. ! \n ? 。 ", []),
        ("", []),
        ("see example.com/a.png now", ["see example.com/a.png now"]),
    ],
)
def test_split(caption: str, sentences: list[str]) -> None:
    assert split_sentences(caption) == sentences


def test_split_loses_no_text_and_returns_no_blank() -> None:
    rng = random.Random(0)
    for _ in range(500):
        caption = "".join(rng.choices(["a", "Dog", " ", ".", "!", "?", "\n", "。", "3.5", "e.g.", '"', ")"], k=30))
        sentences = split_sentences(caption)
        assert all(any(letter.isalnum() for letter in sentence) for sentence in sentences)
        kept = [letter for letter in "".join(sentences) if letter.isalnum()]
        assert kept == [letter for letter in caption if letter.isalnum()]


def pieces_of(sentences: list[list[int]]) -> list[int]:
    return [piece for sentence in sentences for piece in sentence]


def in_order(pieces: list[int]) -> bool:
    """Pieces are numbered by their index in the caption."""
    return all(a < b for a, b in itertools.pairwise(pieces))


REDUCTIONS: dict[str, Callable[[list[list[int]], int, random.Random], list[int]]] = {
    "truncation": lambda sentences, budget, rng: truncation(pieces_of(sentences), budget),
    "random": lambda sentences, budget, rng: random_mask(pieces_of(sentences), budget, rng),
    "block": lambda sentences, budget, rng: block_mask(pieces_of(sentences), budget, rng),
    "sub-caption": sub_caption,
}


@pytest.mark.parametrize("name", REDUCTIONS)
def test_reduction_fills_its_budget_and_keeps_the_order(name: str) -> None:
    """Never blank, never longer than the budget, and as long as the caption allows."""
    rng = random.Random(0)
    for _ in range(2000):
        lengths = [rng.randint(1, 9) for _ in range(rng.randint(1, 6))]
        starts = [sum(lengths[:place]) for place in range(len(lengths))]
        sentences = [list(range(start, start + length)) for start, length in zip(starts, lengths, strict=True)]
        budget = rng.randint(1, 60)
        kept = REDUCTIONS[name](sentences, budget, rng)
        assert len(kept) == min(budget, sum(lengths)) and in_order(kept) and set(kept) <= set(range(sum(lengths)))


def even(counts: collections.Counter[int], draws: int, chance: float) -> bool:
    """Return True if every count is within five standard deviations of its expectation."""
    deviation = (draws * chance * (1 - chance)) ** 0.5
    return all(abs(count - draws * chance) < 5 * deviation for count in counts.values())


def test_truncation_keeps_the_start() -> None:
    assert truncation([1, 2, 3, 4], 3) == [1, 2, 3] and truncation([1], 3) == [1]


def test_every_piece_is_masked_equally_often() -> None:
    rng = random.Random(1)
    pieces = collections.Counter(piece for _ in range(4000) for piece in random_mask(range(10), 4, rng))
    assert len(pieces) == 10 and even(pieces, 4000, 0.4)
    pairs = collections.Counter(tuple(random_mask(range(4), 2, rng)) for _ in range(6000))
    assert len(pairs) == 6 and even(pairs, 6000, 1 / 6)  # any two, not neighbors only


def test_every_block_is_equally_likely() -> None:
    rng = random.Random(2)
    blocks = collections.Counter(tuple(block_mask(range(10), 4, rng)) for _ in range(7000))
    assert set(blocks) == {tuple(range(start, start + 4)) for start in range(7)} and even(blocks, 7000, 1 / 7)


def test_sub_captions_are_made_of_sentences() -> None:
    """Complete ones except the last drawn, which is truncated; any sentence can be complete or truncated."""
    sentences = [[1, 2, 3], [4, 5, 6], [7, 8, 9], [10, 11, 12]]
    rng = random.Random(3)
    whole: collections.Counter[int] = collections.Counter()
    cut: collections.Counter[int] = collections.Counter()
    for _ in range(6000):
        kept = sub_caption(sentences, 5, rng)
        whole.update(place for place, sentence in enumerate(sentences) if set(sentence) <= set(kept))
        cut.update(place for place, sentence in enumerate(sentences) if set(sentence) & set(kept) == set(sentence[:2]))
    assert set(whole) == set(cut) == set(range(4)) and even(whole, 6000, 1 / 4) and even(cut, 6000, 1 / 4)
    assert sum(whole.values()) == sum(cut.values()) == 6000


@pytest.mark.parametrize("count", [1, 2, 4, 9])
def test_every_sentence_is_drawn_equally_often(count: int) -> None:
    sentences = split_sentences("One dog. Two cats!  Three birds?\nFour 4.5 m trees.")
    rng = random.Random(4)
    drawn: collections.Counter[int] = collections.Counter()
    for _ in range(4000):
        places = [sentences.index(sentence) for sentence in draw_sentences(sentences, count, rng)]
        assert in_order(places) and len(places) == min(count, 4)
        drawn.update(places)
    assert set(drawn) == {0, 1, 2, 3} and (even(drawn, 4000, count / 4) if count < 4 else len(set(drawn.values())) == 1)
