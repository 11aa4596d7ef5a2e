"""A sample as people read it: which tokens are learnt, images as one sign.

ids, labels --pieces--> runs of text, learnt or not --terminal or HTML--> preview, preflight
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from clips_mllm.prompts.conversation import IGNORED

if TYPE_CHECKING:
    from transformers import LlavaProcessor, PreTrainedTokenizerFast

LEARNT, RESET = "\x1b[32m", "\x1b[0m"


@dataclasses.dataclass(frozen=True)
class Piece:
    """A run of tokens as text.

    Attributes:
        learnt: whether they are supervised.
        images: positions of an image; 0 for text.
    """

    text: str
    learnt: bool
    images: int = 0


def pieces(ids: Sequence[int], labels: Sequence[int], tokenizer: PreTrainedTokenizerFast, image_id: int) -> list[Piece]:
    """Runs of image positions, of learnt tokens, and of other tokens, in order."""
    found: list[Piece] = []
    pairs = zip(ids, labels, strict=True)
    for (is_image, learnt), group in itertools.groupby(pairs, lambda pair: (pair[0] == image_id, pair[1] != IGNORED)):
        run = [token for token, _ in group]
        text = f"<image x{len(run)}>" if is_image else tokenizer.decode(run)
        found.append(Piece(text, learnt, len(run) if is_image else 0))
    return found


def as_text(found: list[Piece], color: bool = True) -> str:
    """For a terminal: learnt text in green, or between ⟦ and ⟧ where there is no colour."""
    before, after = (LEARNT, RESET) if color else ("⟦", "⟧")
    return "".join(f"{before}{piece.text}{after}" if piece.learnt else piece.text for piece in found)


def show_batch(batch: dict[str, Any], processor: LlavaProcessor, color: bool = True, most: int = 4) -> str:
    """The first rows of a collated batch, with what is learnt marked, padding left out, and counts.

    Args:
        batch: `input_ids`, `labels` (b, s), and `attention_mask` where rows are padded.
    """
    rows = []
    for at, (ids, labels) in enumerate(zip(batch["input_ids"][:most], batch["labels"][:most], strict=True)):
        kept = batch["attention_mask"][at].bool() if "attention_mask" in batch else slice(None)
        ids, labels = ids[kept].tolist(), labels[kept].tolist()
        learnt = sum(label != IGNORED for label in labels)
        shown = as_text(pieces(ids, labels, processor.tokenizer, processor.image_token_id), color)
        rows.append(f"[row {at}: {len(ids)} tokens, {learnt} learnt]\n{shown}")
    return "\n".join(rows)
