"""The vocabulary beside published weights: BERT's files, in which two pieces serve as `[bos]` and `[eos]`."""

from __future__ import annotations

from pathlib import Path

from vision_tower.common.errors import UserError
from vision_tower.common.files import read_object
from vision_tower.text.tokenizer import BOS, EOS, UNUSED, ClipsTokenizer


def read_tokenizer(folder: Path) -> ClipsTokenizer | None:
    """The tokenizer of `vocab.txt` or `tokenizer.json` in an open_clip folder; none where there is neither.

    Raises:
        UserError: a file that is no WordPiece vocabulary of the CLIPS layout.
    """
    vocabulary, whole = folder / "vocab.txt", folder / "tokenizer.json"
    if vocabulary.is_file():
        return ClipsTokenizer.from_vocabulary(vocabulary, _special_names(folder))
    if not whole.is_file():
        return None
    try:
        pieces = {str(piece): int(index) for piece, index in read_object(whole)["model"]["vocab"].items()}
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{whole}: not a WordPiece tokenizer", remedy="put the model's vocab.txt beside it") from error
    return ClipsTokenizer.from_pieces(pieces, whole, _special_names(folder))


def _special_names(folder: Path) -> dict[str, str]:
    """What `tokenizer_config.json` calls the two, if it does: published vocabularies do not agree on a name."""
    file = folder / "tokenizer_config.json"
    settings = read_object(file) if file.is_file() else {}
    names: dict[str, str] = {}
    for key, own in (("bos_token", BOS), ("eos_token", EOS)):
        name = settings.get(key)
        name = name.get("content") if isinstance(name, dict) else name
        if isinstance(name, str):
            names[name] = own
    return names or UNUSED
