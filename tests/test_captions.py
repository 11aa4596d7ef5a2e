"""Sentences of captions, and the one that is drawn."""

from __future__ import annotations

import collections
import random

import pytest

from vision_tower.captions import draw_sentence, split_sentences


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


def test_no_text_is_lost_and_none_is_blank() -> None:
    rng = random.Random(0)
    for _ in range(500):
        caption = "".join(rng.choices(["a", "Dog", " ", ".", "!", "?", "\n", "。", "3.5", "e.g.", '"', ")"], k=30))
        sentences = split_sentences(caption)
        assert all(any(letter.isalnum() for letter in sentence) for sentence in sentences)
        kept = [letter for letter in "".join(sentences) if letter.isalnum()]
        assert kept == [letter for letter in caption if letter.isalnum()]


def test_every_sentence_is_drawn_equally_often() -> None:
    caption = "One dog. Two cats!  Three birds?\nFour 4.5 m trees."
    rng = random.Random(1)
    drawn = collections.Counter(draw_sentence(caption, rng) for _ in range(8000))
    assert set(drawn) == set(split_sentences(caption)) and len(drawn) == 4
    # Four cells of 2,000 with deviation 39: five deviations.
    assert all(abs(count - 2000) < 195 for count in drawn.values())


@pytest.mark.parametrize(("caption", "drawn"), [("", ""), ("  ", ""), ("🐶🐱", "🐶🐱"), (" ... ", "...")])
def test_a_caption_without_sentence_stands_for_itself(caption: str, drawn: str) -> None:
    assert draw_sentence(caption, random.Random(0)) == drawn
