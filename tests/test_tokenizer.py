"""The CLIPS text layout: where every special piece stands, what is cut, what the captioner learns."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from vision_tower.errors import UserError
from vision_tower.tokenizer import BOS, CLS, EOS, IGNORED, PAD, UNK, ClipsTokenizer

WORDS = ["the", "a", "dog", "cat", "runs", "##ning"]


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> ClipsTokenizer:
    """The ids of the published vocabulary in small: specials 0, 1, 2, 100, 101, words from 110."""
    lines = [f"[unused{index - 1}]" for index in range(110)]
    lines[0], lines[100], lines[101] = PAD, UNK, CLS
    # U+2028 ends a line for str.splitlines, but not in a vocab.txt.
    file = tmp_path_factory.mktemp("vocabulary") / "vocab.txt"
    file.write_text("\n".join([*lines, *WORDS, "\u2028", "last"]) + "\n", encoding="utf-8")
    return ClipsTokenizer.from_vocabulary(file)


def test_published_ids(published: ClipsTokenizer) -> None:
    assert (published.pad, published.bos, published.eos, published.cls) == (0, 1, 2, 101)
    assert published.pieces(["The DOG running", "zebra", "last"]) == [[110, 112, 100], [100], [117]]
    assert len(published) == 118


def test_contrastive_layout(published: ClipsTokenizer) -> None:
    ids = published.contrastive(["the dog runs", "", "a cat " * 250], 8)
    assert ids.dtype == torch.long
    assert ids.tolist() == [
        [1, 110, 112, 114, 2, 0, 0, 101],
        [1, 2, 0, 0, 0, 0, 0, 101],
        [1, 111, 113, 111, 113, 111, 2, 101],  # [eos] is forced into the last kept slot
    ]


@pytest.mark.parametrize("words", [4, 5, 6])
def test_truncation_at_its_edge(published: ClipsTokenizer, words: int) -> None:
    row = published.contrastive(["dog " * words], 8)[0].tolist()
    assert row == [1, *[112] * min(words, 5), 2, *[0] * max(5 - words, 0), 101]


def test_targets_are_shifted_and_end_with_eos(published: ClipsTokenizer) -> None:
    labels = published.targets(["the dog runs", "", "cat " * 500], 6)
    ignored = IGNORED
    assert labels.tolist() == [
        [110, 112, 114, 2, ignored, ignored],
        [2, ignored, ignored, ignored, ignored, ignored],
        [113, 113, 113, 113, 2, ignored],  # [bos] and 128 - 2 pieces and [eos], shifted left by one
    ]


def test_any_text_keeps_the_layout(sample_world: Path) -> None:
    tokenizer = ClipsTokenizer.train(["a dog on a red background", "two cats"], 100)
    texts = ["", " ", "🐶🐱👩‍👩‍👧", "\x00\x07\x1b\u200b\ufeff", "一只狗", "word " * 500, "x" * 5000, "a\tdog\r\ncat"]
    ids = tokenizer.contrastive(texts, 16)
    specials = {tokenizer.pad, tokenizer.bos, tokenizer.eos, tokenizer.cls}
    for row in ids.tolist():
        end = row.index(tokenizer.eos)
        assert row[0] == tokenizer.bos and row[-1] == tokenizer.cls
        assert not specials & set(row[1:end])
        assert set(row[end + 1 : -1]) <= {tokenizer.pad}
    assert ids.max() < len(tokenizer)


def test_special_pieces_in_a_caption_are_only_text(published: ClipsTokenizer) -> None:
    specials = {published.pad, published.bos, published.eos, published.cls}
    for text in ("[CLS] dog", "dog [eos]", "[PAD][bos]"):
        assert not specials & set(published.pieces([text])[0])


def test_trained_vocabulary_is_a_function_of_the_captions_and_survives_saving(tmp_path: Path) -> None:
    captions = ["a dog and a cat", "a dog", "émile's cat!"]
    first, second = ClipsTokenizer.train(captions, 60), ClipsTokenizer.train(iter(captions), 60)
    assert first.fast.get_vocab() == second.fast.get_vocab()
    first.save_pretrained(tmp_path)
    loaded = ClipsTokenizer.from_pretrained(tmp_path)
    texts = ["A DOG, and émile!", "unseen words", "[CLS]", ""]
    assert torch.equal(first.contrastive(texts, 20), loaded.contrastive(texts, 20))
    assert (loaded.pad, loaded.bos, loaded.eos, loaded.cls) == (first.pad, first.bos, first.eos, first.cls)


def test_frequent_words_come_first_and_letters_spell_the_rest() -> None:
    tokenizer = ClipsTokenizer.train(["dog dog dog cat cat bird"], 5 + 2 * 9 + 2)
    vocabulary = tokenizer.fast.get_vocab()
    assert {"dog", "cat"} <= set(vocabulary) and "bird" not in vocabulary
    assert len(tokenizer.pieces(["bird"])[0]) == 4


def test_bad_vocabularies(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such vocabulary"):
        ClipsTokenizer.from_vocabulary(tmp_path / "none.txt")
    (tmp_path / "vocab.txt").write_text("\n".join([PAD, BOS, EOS, UNK, "dog"]))
    with pytest.raises(UserError, match=r"no piece '\[CLS\]'"):
        ClipsTokenizer.from_vocabulary(tmp_path / "vocab.txt")
    with pytest.raises(UserError, match=r"tokenizer\.json: missing"):
        ClipsTokenizer.from_pretrained(tmp_path)
