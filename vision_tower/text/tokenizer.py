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
UNUSED = {"[unused0]": BOS, "[unused1]": EOS}  # pieces that BERT reserves for its users
IGNORED = -100

_WORD = re.compile(r"[a-z0-9]+|[^a-z0-9 ]")  # BERT's split of plain lower-case text into words
CACHE_SIZE = 2**16  # words


def clean(text: str) -> str:
    """Fix mojibake and HTML entities and collapse white space, as open_clip's `whitespace` cleaning does."""
    if is_plain(text):
        return text  # nothing to fix, and ftfy takes longer than the tokenizer
    import html

    import ftfy

    return " ".join(html.unescape(html.unescape(ftfy.fix_text(text))).split())


def is_plain(text: str) -> bool:
    """Return True for printable ASCII without HTML entities, as most captions are."""
    return text.isascii() and text.isprintable() and "&" not in text


class WordCache(dict[str, list[int]]):
    """Pieces of plain words; they do not depend on the context, so each word is tokenized once."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        super().__init__()
        self.tokenizer = tokenizer

    def __missing__(self, word: str) -> list[int]:
        if len(self) == CACHE_SIZE:
            self.clear()
        self[word] = pieces = self.tokenizer.encode(word, add_special_tokens=False).ids
        return pieces


class ClipsTokenizer:
    """Tokenizes captions to the two layouts. Wraps a fast tokenizer whose vocabulary has the five special pieces."""

    def __init__(self, fast: PreTrainedTokenizerFast) -> None:
        vocabulary = fast.get_vocab()
        for piece in (PAD, BOS, EOS, UNK, CLS):
            if piece not in vocabulary:
                remedy = f"CLIPS needs {', '.join((PAD, BOS, EOS, UNK, CLS))}"
                raise UserError(f"no piece '{piece}'", file=fast.name_or_path or "tokenizer", remedy=remedy)
        self.fast = fast
        self._encode = fast.backend_tokenizer  # the wrapper of transformers takes as long as a short caption
        self._encode.encode_special_tokens = True
        self._words = WordCache(self._encode) if _is_berts(self._encode) else None
        self.pad, self.bos, self.eos, self.cls = (vocabulary[piece] for piece in (PAD, BOS, EOS, CLS))

    def __len__(self) -> int:
        return len(self.fast)

    def pieces(self, texts: list[str]) -> list[list[int]]:
        """Tokenize the cleaned texts, without special pieces.

        Unlike in open_clip, a caption with the text `[CLS]` gets ordinary pieces: web text cannot inject special ids.
        """
        words = self._words
        if words is None or not all(map(is_plain, texts)):
            encoded = self._encode.encode_batch_fast([clean(text) for text in texts], add_special_tokens=False)
            return [encoding.ids for encoding in encoded]
        return [[piece for word in _WORD.findall(text.lower()) for piece in words[word]] for text in texts]

    def contrastive(self, texts: list[str], length: int) -> torch.Tensor:
        """Return ids for the text tower, (texts, length), int64."""
        return self.contrastive_layout(self.pieces(texts), length)

    def contrastive_layout(self, captions: list[list[int]], length: int) -> torch.Tensor:
        """Return ids for the text tower of tokenized captions, (captions, length), int64."""
        import torch

        rows = [self._padded(self._framed(pieces, length - 1), length - 1, self.pad) for pieces in captions]
        return torch.tensor([[*row, self.cls] for row in rows], dtype=torch.long).view(len(rows), length)

    def target_layout(self, captions: list[list[int]], length: int) -> torch.Tensor:
        """Return labels of the captioner's queries, (captions, longest of them up to `length`), int64.

        `IGNORED` after `[eos]`.
        """
        import torch

        kept = [self._framed(pieces, length)[1:] for pieces in captions]  # the one place where targets are shifted
        longest = max(map(len, kept))
        return torch.tensor([self._padded(pieces, longest, IGNORED) for pieces in kept])

    def _framed(self, pieces: list[int], length: int) -> list[int]:
        """Return `[bos] pieces [eos]`, truncated to `length` with `[eos]` at the end."""
        return [self.bos, *pieces[: length - 2], self.eos]

    @staticmethod
    def _padded(ids: list[int], length: int, by: int) -> list[int]:
        return ids + [by] * (length - len(ids))

    def save_pretrained(self, folder: str | Path) -> None:
        """Write `tokenizer.json` to the folder."""
        self.fast.save_pretrained(folder)

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> ClipsTokenizer:
        """Load the tokenizer that `save_pretrained` wrote."""
        from transformers import PreTrainedTokenizerFast

        file = Path(folder) / "tokenizer.json"
        if not file.is_file():
            raise UserError("no such file", file=file, remedy="give a `pretrain` run")
        try:
            return cls(PreTrainedTokenizerFast.from_pretrained(str(folder)))
        except UserError:
            raise
        except Exception as error:  # the tokenizers library raises plain Exception
            raise UserError(f"not a readable tokenizer ({error})", file=file, remedy="download it again") from error

    @classmethod
    def from_vocabulary(cls, file: str | Path, renamed: Mapping[str, str] = UNUSED) -> ClipsTokenizer:
        """Load the published layout: BERT's uncased `vocab.txt` with `[unused0]`, `[unused1]` as `[bos]`, `[eos]`."""
        if not Path(file).is_file():
            raise UserError("no such file", file=file, remedy="give a WordPiece vocab.txt, or omit it to train one")
        # Not splitlines(): ids are line numbers, and a piece may be U+2028.
        lines = read_text(Path(file)).rstrip("\n").split("\n")
        return cls.from_pieces({piece: index for index, piece in enumerate(lines)}, file, renamed)

    @classmethod
    def from_pieces(cls, pieces: dict[str, int], file: str | Path, renamed: Mapping[str, str]) -> ClipsTokenizer:
        """Build a tokenizer of the pieces in `file`; `renamed` maps unused pieces to `[bos]` and `[eos]`."""
        vocabulary = {renamed.get(piece, piece): index for piece, index in pieces.items()}
        for piece in (PAD, BOS, EOS, UNK, CLS):  # the fast tokenizer would silently append a missing one
            if piece not in vocabulary:
                raise UserError(
                    f"no piece '{piece}'", file=file, remedy="give BERT's uncased vocab.txt, or one like it"
                )
        return cls(_wordpiece(vocabulary))

    @classmethod
    def train(cls, captions: Iterable[str], size: int) -> ClipsTokenizer:
        """Train a small vocabulary on captions: the most frequent words, and single letters for all others.

        Words are ranked by (count, spelling), which makes the result deterministic.
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
    """Return True if the tokenizer splits text into words as BERT's uncased one does."""
    from tokenizers import normalizers, pre_tokenizers

    lower = isinstance(tokenizer.normalizer, normalizers.BertNormalizer) and tokenizer.normalizer.lowercase
    added = tokenizer.get_added_tokens_decoder().values()  # special ones are encoded as plain text (see __init__)
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
