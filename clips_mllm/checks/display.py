"""Text of a tokenized sample, with supervised tokens marked and image tokens abbreviated.

ids, labels --token_spans--> runs of text --as_text or HTML--> preview, log before step 1
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from clips_mllm.prompts.conversation import IGNORED

if TYPE_CHECKING:
    from transformers import LlavaProcessor, PreTrainedTokenizerFast

GREEN, RESET = "\x1b[32m", "\x1b[0m"


@dataclasses.dataclass(frozen=True)
class TokenSpan:
    """Consecutive tokens as text.

    Attributes:
        supervised: the tokens have labels.
        image_tokens: number of tokens, if they are an image's; 0 for text.
    """

    text: str
    supervised: bool
    image_tokens: int = 0


def token_spans(
    ids: Sequence[int], labels: Sequence[int], tokenizer: PreTrainedTokenizerFast, image_id: int
) -> list[TokenSpan]:
    """Split a sample into spans of image tokens, supervised tokens and other tokens, in order."""
    spans: list[TokenSpan] = []
    pairs = zip(ids, labels, strict=True)
    for (is_image, supervised), group in itertools.groupby(
        pairs, lambda pair: (pair[0] == image_id, pair[1] != IGNORED)
    ):
        run = [token for token, _ in group]
        text = f"<image x{len(run)}>" if is_image else tokenizer.decode(run)
        spans.append(TokenSpan(text, supervised, len(run) if is_image else 0))
    return spans


def as_text(spans: list[TokenSpan], color: bool = True) -> str:
    """Return text for a terminal: supervised tokens in green, or between ⟦ and ⟧ without color."""
    before, after = (GREEN, RESET) if color else ("⟦", "⟧")
    return "".join(f"{before}{span.text}{after}" if span.supervised else span.text for span in spans)


def show_batch(batch: dict[str, Any], processor: LlavaProcessor, color: bool = True, max_rows: int = 4) -> str:
    """Return the first rows of a collated batch as text, without padding, each with its token counts.

    Args:
        batch: `input_ids` and `labels` (b, s), and `attention_mask` (b, s) if rows are padded.
    """
    rows = []
    for number, (ids, labels) in enumerate(zip(batch["input_ids"][:max_rows], batch["labels"][:max_rows], strict=True)):
        kept = batch["attention_mask"][number].bool() if "attention_mask" in batch else slice(None)
        ids, labels = ids[kept].tolist(), labels[kept].tolist()
        supervised = sum(label != IGNORED for label in labels)
        text = as_text(token_spans(ids, labels, processor.tokenizer, processor.image_token_id), color)
        rows.append(f"[row {number}: {len(ids)} tokens, {supervised} supervised]\n{text}")
    return "\n".join(rows)
