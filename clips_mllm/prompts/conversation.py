"""Constants and types of conversations: message, image placeholder, ignored label."""

from __future__ import annotations

from typing import Any

IGNORED = -100  # label without loss
IMAGE = "<image>"

# Prefix of an answer without reasoning in Qwen3's template. The prompt ends before it, so the model generates it; chat
# and evaluation remove it.
EMPTY_THOUGHTS = "<think>\n\n</think>\n\n"

Message = dict[str, Any]


class Unsupervised(ValueError):
    """The sample has no supervised token, its images exceed the context, or the template refuses it."""
