"""The CLIPS text layout: special pieces, truncation, the captioner's targets."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.helpers.errors import raises_user_error
from vision_tower.text.tokenizer import BOS, CLS, EOS, IGNORED, PAD, UNK, ClipsTokenizer, clean

WORDS = ["the", "a", "dog", "cat", "runs", "##ning"]


@pytest.fixture(scope="module")
def published(tmp_path_factory: pytest.TempPathFactory) -> ClipsTokenizer:
    """A small vocabulary with the published ids: special pieces 0, 1, 2, 100, 101, words from 110."""
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
def test_truncation_at_the_exact_length(published: ClipsTokenizer, words: int) -> None:
    row = published.contrastive(["dog " * words], 8)[0].tolist()
    assert row == [1, *[112] * min(words, 5), 2, *[0] * max(5 - words, 0), 101]


def test_targets_are_shifted_and_end_with_eos(published: ClipsTokenizer) -> None:
    labels = published.target_layout(published.pieces(["the dog runs", "", "cat " * 500]), 6)
    ignored = IGNORED
    assert labels.tolist() == [
        [110, 112, 114, 2, ignored],
        [2, ignored, ignored, ignored, ignored],
        [113, 113, 113, 113, 2],  # [bos] and 6 - 2 pieces and [eos], shifted left by one
    ]
    assert published.target_layout(published.pieces(["dog", "the dog"]), 6).shape == (2, 3)  # no longer than needed


def test_layout_holds_for_any_text(sample_world: Path) -> None:
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


def test_special_pieces_in_a_caption_are_plain_text(published: ClipsTokenizer) -> None:
    specials = {published.pad, published.bos, published.eos, published.cls}
    for text in ("[CLS] dog", "dog [eos]", "[PAD][bos]"):
        assert not specials & set(published.pieces([text])[0])


def test_trained_vocabulary_is_deterministic_and_round_trips(tmp_path: Path) -> None:
    captions = ["a dog and a cat", "a dog", "émile's cat!"]
    first, second = ClipsTokenizer.train(captions, 60), ClipsTokenizer.train(iter(captions), 60)
    assert first.fast.get_vocab() == second.fast.get_vocab()
    first.save_pretrained(tmp_path)
    loaded = ClipsTokenizer.from_pretrained(tmp_path)
    texts = ["A DOG, and émile!", "unseen words", "[CLS]", ""]
    assert torch.equal(first.contrastive(texts, 20), loaded.contrastive(texts, 20))
    assert (loaded.pad, loaded.bos, loaded.eos, loaded.cls) == (first.pad, first.bos, first.eos, first.cls)


def test_rare_words_are_split_into_letters() -> None:
    tokenizer = ClipsTokenizer.train(["dog dog dog cat cat bird"], 5 + 2 * 9 + 2)
    vocabulary = tokenizer.fast.get_vocab()
    assert {"dog", "cat"} <= set(vocabulary) and "bird" not in vocabulary
    assert len(tokenizer.pieces(["bird"])[0]) == 4


def test_bad_vocabularies(tmp_path: Path) -> None:
    with raises_user_error(file=tmp_path / "none.txt"):
        ClipsTokenizer.from_vocabulary(tmp_path / "none.txt")
    (tmp_path / "vocab.txt").write_text("\n".join([PAD, BOS, EOS, UNK, "dog"]))
    with raises_user_error(file=tmp_path / "vocab.txt"):
        ClipsTokenizer.from_vocabulary(tmp_path / "vocab.txt")
    with raises_user_error(file=tmp_path / "tokenizer.json"):
        ClipsTokenizer.from_pretrained(tmp_path)


SCRIPTS = {
    "latin": "abcdefghijklmnopqrstuvwxyzABCXYZ0123456789",
    "accents": "éèüñçßøåİıŁœﬁﬃ",
    "punctuation": ".,;:!?'\"()[]{}<>/\\|@#$%^&*-_=+`~«»“”‘’…–—",
    "cjk": "一丁七万三上下不世中日本語漢字かなカナ한국어",
    "emoji": "😀🐶🎈👩\u200d👩\u200d👧❤\ufe0f🇩🇪👍🏽",
    "controls": "".join(map(chr, [*range(32), *range(0x7F, 0xA0), 0xAD, 0x200B, 0x2028, 0xFEFF, 0xFFFD])),
    "spaces": " \t\n\r\u00a0\u2003\u3000",
    "others": "абвгдЖЯαβγΩעבאرسทहि𝔘𝒻ｆｕｌｌ①½",
}
ODD = [
    "",
    " ",
    "\n\t ",
    "a " * 250 + "dog " * 250,
    "&amp;amp; &lt;b&gt; &#39;it&#x27;s&#39; &nbsp; AT&T",
    "donâ€™t and schÃ¶n and voilÃ\xa0",
    "x" * 101,
    "x" * 100,
    "\x1b[31mred\x1b[0m",
    "\ud7ff\ue000\U0010ffff",
    "[bos",
]


def varied_strings(count: int) -> list[str]:
    """Return texts of mixed scripts with 0 to 500 words, the edge cases first."""
    import random

    rng = random.Random(0)
    texts = list(ODD)
    while len(texts) < count:
        kinds = rng.sample(list(SCRIPTS), rng.randint(1, len(SCRIPTS)))
        words = [
            "".join(rng.choices(SCRIPTS[rng.choice(kinds)], k=rng.randint(1, 9))) for _ in range(rng.randint(0, 60))
        ]
        texts.append(rng.choice([" ", "", "\n"]).join(words) if len(texts) % 25 else " ".join(words * 9)[:4000])
    return texts


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> tuple[ClipsTokenizer, Path]:
    """A vocabulary with most of these letters, as our tokenizer and as a folder for open_clip."""
    letters = sorted({letter for text in SCRIPTS.values() for letter in text.lower() if not letter.isspace()})
    lines = [f"[unused{index - 1}]" for index in range(110)]
    lines[0], lines[100], lines[101] = PAD, UNK, CLS
    pieces = [letter for letter in letters if letter.isprintable()]
    # Letters that occur only at the start of words make some words unknown, as many are to BERT's vocabulary.
    lines += [*WORDS, *pieces, *(f"##{piece}" for piece in pieces[::2]), "&", "<", ">", "'"]
    folder = tmp_path_factory.mktemp("wide")
    file = folder / "vocab.txt"
    file.write_text("\n".join(dict.fromkeys(lines)) + "\n", encoding="utf-8")
    # As the published repositories hold it: BERT's own tokenizer class with two of its unused pieces named.
    from transformers import BertTokenizerFast

    theirs = BertTokenizerFast(vocab=str(file), bos_token="[unused0]", eos_token="[unused1]")
    theirs.save_pretrained(folder / "theirs")
    return ClipsTokenizer.from_vocabulary(file), folder / "theirs"


def test_ids_equal_open_clip(wide: tuple[ClipsTokenizer, Path]) -> None:
    from open_clip.tokenizer import HFTokenizer

    ours, folder = wide
    theirs = HFTokenizer(str(folder), context_length=80, tokenizer_mode="clips")
    texts = varied_strings(1000)
    assert len(texts) == 1000 and sum(len(text.split()) > 300 for text in texts) > 10
    expected, found = theirs(texts), ours.contrastive(texts, 80)
    wrong = [text for text, a, b in zip(texts, expected, found, strict=True) if not torch.equal(a, b)]
    assert not wrong, (len(wrong), wrong[0])
    assert (found == ours.eos).any(dim=1).all() and len(found.unique()) > 150


def test_special_pieces_in_a_text_differ_from_open_clip(wide: tuple[ClipsTokenizer, Path]) -> None:
    """The only intended difference: in open_clip a caption can contain special ids."""
    from open_clip.tokenizer import HFTokenizer

    ours, folder = wide
    theirs = HFTokenizer(str(folder), context_length=12, tokenizer_mode="clips")
    assert 101 in theirs(["a [CLS] dog"])[0, :-1] and 101 not in ours.contrastive(["a [CLS] dog"], 12)[0, :-1]


def test_plain_text_skips_cleaning(monkeypatch: pytest.MonkeyPatch) -> None:
    import ftfy

    plain = "A dog's ball, 3.5 m away (not far)!  Really? [CLS] <b> #1 @home 50% ~ ^ _ `a` {b} $5 a/b a\\b"
    assert " ".join(ftfy.fix_text(plain).split()) == " ".join(plain.split())
    monkeypatch.setattr(ftfy, "fix_text", None)
    assert clean(plain) == plain


def test_cached_words_equal_the_tokenizers(wide: tuple[ClipsTokenizer, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """Every pair of printable ASCII characters, in known and unknown words, with a cache of a few words."""
    import random

    monkeypatch.setattr("vision_tower.text.tokenizer.CACHE_SIZE", 50)
    ours, rng = wide[0], random.Random(1)
    plain = [chr(code) for code in range(32, 127) if chr(code) != "&"]
    texts = ["".join(pair) for first in plain for pair in (f"{first}{second}" for second in plain)]
    texts += ["".join(rng.choices(plain, k=rng.randint(0, 120))) for _ in range(300)]
    texts += [" ".join(rng.choices(["The", "dog's", "[CLS]", "x" * 101, "x" * 100, "RUNNING", "3.5"], k=9))]
    expected = ours.fast.backend_tokenizer.encode_batch_fast(texts, add_special_tokens=False)
    assert ours.pieces(texts) == [encoding.ids for encoding in expected]
    assert ours.pieces([*texts, "é"])[:-1] == ours.pieces(texts), "one caption that is not plain changes no other"


def test_other_pre_tokenizers_are_not_cached(published: ClipsTokenizer) -> None:
    from tokenizers import Tokenizer, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    other = Tokenizer.from_str(published.fast.backend_tokenizer.to_str())
    other.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    names = {"pad_token": PAD, "bos_token": BOS, "eos_token": EOS, "unk_token": UNK, "cls_token": CLS}
    tokenizer = ClipsTokenizer(PreTrainedTokenizerFast(tokenizer_object=other, **names))
    assert tokenizer.pieces(["the dog,"]) == [[110, 100]] and published.pieces(["the dog,"]) == [[110, 112, 100]]
