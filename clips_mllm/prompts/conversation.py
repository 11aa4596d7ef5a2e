"""What a conversation is made of: messages, the image placeholder, the label that trains nothing."""

from __future__ import annotations

from typing import Any

IGNORED = -100


IMAGE = "<image>"


# What Qwen3's template opens the last answer with where it has no thoughts. The model learns to say it, since prompts
# end before it; readers and scorers want the answer.
EMPTY_THOUGHTS = "<think>\n\n</think>\n\n"


Message = dict[str, Any]


class Unsupervised(ValueError):
    """A sample without a supervised token, whose images do not fit the context, or that the template refuses."""
