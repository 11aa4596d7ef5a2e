"""The CLIPS text layout over any WordPiece vocabulary.

    contrastive   [bos] w w w [eos] pad pad ... [CLS]      the tower pools the last position
    target              w w w [eos] ignored ...             position t predicts piece t + 1

Source: the published CLIPS tokenizer (UCSC-VLAA/CLIPS), see also `tokenizer_mode="clips"` in open_clip.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from vision_tower.common.errors import UserError
from vision_tower.common.files import read_text

if TYPE_CHECKING:
    import torch
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

PAD, BOS, EOS, UNK, CLS = "[PAD]", "[bos]", "[eos]", "[UNK]", "[CLS]"
UNUSED = {"[unused0]": BOS, "[unused1]": EOS}  # BERT leaves these pieces to others
IGNORED = -100


_WORD = re.compile(r"[a-z0-9]+|[^a-z0-9 ]")  # how BERT cuts plain text in lower case
REMEMBERED = 2**16  # words


def clean(text: str) -> str:
    """Mojibake and HTML entities mended, white space squeezed: open_clip's `whitespace` cleaning, before any pieces."""
    if is_plain(text):
        return text  # nothing to mend, and looking for it would cost more than the pieces
    import html

    import ftfy

    return " ".join(html.unescape(html.unescape(ftfy.fix_text(text))).split())


def is_plain(text: str) -> bool:
    """Printable ASCII without entities: most captions."""
    return text.isascii() and text.isprintable() and "&" not in text


class Words(dict[str, list[int]]):
    """Pieces of plain words, which do not depend on what stands around them: each is asked of the tokenizer once."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        super().__init__()
        self.tokenizer = tokenizer

    def __missing__(self, word: str) -> list[int]:
        if len(self) == REMEMBERED:
            self.clear()
        self[word] = pieces = self.tokenizer.encode(word, add_special_tokens=False).ids
        return pieces


class ClipsTokenizer:
    """Turns captions into the two layouts. Wraps a fast tokenizer that knows the five special pieces."""

    def __init__(self, fast: PreTrainedTokenizerFast) -> None:
        vocabulary = fast.get_vocab()
        for piece in (PAD, BOS, EOS, UNK, CLS):
            if piece not in vocabulary:
                raise UserError(
                    f"no piece '{piece}'", file=fast.name_or_path or "tokenizer", remedy="CLIPS needs all five specials"
                )
        self.fast = fast
        self._encode = fast.backend_tokenizer  # transformers' call around it costs as much as a short caption
        self._encode.encode_special_tokens = True
        self._words = Words(self._encode) if _is_berts(self._encode) else None
        self.pad, self.bos, self.eos, self.cls = (vocabulary[piece] for piece in (PAD, BOS, EOS, CLS))

    def __len__(self) -> int:
        return len(self.fast)

    def pieces(self, texts: list[str]) -> list[list[int]]:
        """Word pieces of the cleaned texts, without special ones.

        A caption that spells out `[CLS]` gets ordinary pieces, so that no web page can write special ids into its
        caption: the one difference from open_clip.
        """
        words = self._words
        if words is None or not all(map(is_plain, texts)):
            encoded = self._encode.encode_batch_fast([clean(text) for text in texts], add_special_tokens=False)
            return [encoding.ids for encoding in encoded]
        return [[piece for word in _WORD.findall(text.lower()) for piece in words[word]] for text in texts]

    def contrastive(self, texts: list[str], length: int) -> torch.Tensor:
        """Ids for the text tower, (texts, length), int64."""
        return self.contrastive_layout(self.pieces(texts), length)

    def contrastive_layout(self, captions: list[list[int]], length: int) -> torch.Tensor:
        """The same of word pieces that are there already."""
        import torch

        rows = [self._padded(self._framed(pieces, length - 1), length - 1, self.pad) for pieces in captions]
        return torch.tensor([[*row, self.cls] for row in rows], dtype=torch.long).view(len(rows), length)

    def target_layout(self, captions: list[list[int]], length: int) -> torch.Tensor:
        """Labels of the captioner's queries, (captions, longest of them, at most `length`), int64.

        `IGNORED` after `[eos]`.
        """
        import torch

        kept = [self._framed(pieces, length)[1:] for pieces in captions]  # the one place where targets are shifted
        longest = max(map(len, kept))
        return torch.tensor([self._padded(pieces, longest, IGNORED) for pieces in kept])

    def _framed(self, pieces: list[int], length: int) -> list[int]:
        """`[bos] pieces [eos]` cut to `length`; the last kept slot is always `[eos]`."""
        return [self.bos, *pieces[: length - 2], self.eos]

    @staticmethod
    def _padded(ids: list[int], length: int, by: int) -> list[int]:
        return ids + [by] * (length - len(ids))

    def save_pretrained(self, folder: str | Path) -> None:
        """Leave `tokenizer.json` in the folder."""
        self.fast.save_pretrained(folder)

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> ClipsTokenizer:
        """Read what `save_pretrained` wrote."""
        from transformers import PreTrainedTokenizerFast

        file = Path(folder) / "tokenizer.json"
        if not file.is_file():
            raise UserError(
                "missing", file=file, remedy=f"{folder} is not a CLIPS checkpoint (point to the folder of `pretrain`)"
            )
        try:
            return cls(PreTrainedTokenizerFast.from_pretrained(str(folder)))
        except UserError:
            raise
        except Exception as error:  # the tokenizers library has no narrower one
            raise UserError(
                f"not a readable tokenizer ({error})", file=file, remedy="save or fetch it again"
            ) from error

    @classmethod
    def from_vocabulary(cls, file: str | Path, renamed: Mapping[str, str] = UNUSED) -> ClipsTokenizer:
        """The published layout: BERT's uncased `vocab.txt` with `[unused0]`, `[unused1]` as `[bos]`, `[eos]`."""
        if not Path(file).is_file():
            raise UserError(
                "no such vocabulary", file=file, remedy="give a WordPiece vocab.txt, or leave it out to train one"
            )
        # Not splitlines(): ids are line numbers, and a piece may be U+2028.
        lines = read_text(Path(file)).rstrip("\n").split("\n")
        return cls.from_pieces({piece: index for index, piece in enumerate(lines)}, file, renamed)

    @classmethod
    def from_pieces(cls, pieces: dict[str, int], file: str | Path, renamed: Mapping[str, str]) -> ClipsTokenizer:
        """Pieces and ids out of `file`; `renamed` says which serve as `[bos]` and `[eos]`. Raises UserError."""
        vocabulary = {renamed.get(piece, piece): index for piece, index in pieces.items()}
        for piece in (PAD, BOS, EOS, UNK, CLS):  # else the fast tokenizer would add them at the end, unasked
            if piece not in vocabulary:
                raise UserError(
                    f"no piece '{piece}'", file=file, remedy="give BERT's uncased vocab.txt or one of its layout"
                )
        return cls(_wordpiece(vocabulary))

    @classmethod
    def train(cls, captions: Iterable[str], size: int) -> ClipsTokenizer:
        """A small vocabulary of the captions themselves: the most frequent words whole, the rest by letters.

        Words are ranked by (count, spelling), so the result is a function of the captions.
        """
        from collections import Counter

        from tokenizers import normalizers, pre_tokenizers

        normalizer, splitter = normalizers.BertNormalizer(lowercase=True), pre_tokenizers.BertPreTokenizer()
        words: Counter[str] = Counter()
        for caption in captions:
            words.update(word for word, _ in splitter.pre_tokenize_str(normalizer.normalize_str(clean(caption))))
        letters = sorted({letter for word in words for letter in word})
        pieces = [PAD, BOS, EOS, UNK, CLS, *letters, *(f"##{letter}" for letter in letters)]
        ranked = sorted(words, key=lambda word: (-words[word], word))
        pieces += [word for word in ranked if len(word) > 1][: max(size - len(pieces), 0)]
        return cls(_wordpiece({piece: index for index, piece in enumerate(pieces)}))


def _is_berts(tokenizer: Tokenizer) -> bool:
    """Whether it cuts text into words as BERT's uncased one does, before it looks for pieces."""
    from tokenizers import normalizers, pre_tokenizers

    lower = isinstance(tokenizer.normalizer, normalizers.BertNormalizer) and tokenizer.normalizer.lowercase
    added = tokenizer.get_added_tokens_decoder().values()  # special ones are words like others here
    return (
        lower
        and isinstance(tokenizer.pre_tokenizer, pre_tokenizers.BertPreTokenizer)
        and all(token.special for token in added)
    )


def _wordpiece(vocabulary: dict[str, int]) -> PreTrainedTokenizerFast:
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token=UNK))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=PAD, bos_token=BOS, eos_token=EOS, unk_token=UNK, cls_token=CLS
    )
