"""Fields that terminal, browser and endpoint share, and the engine they make. Imports no torch by itself."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from clips_mllm.talk.engine import Engine

Dtype = Literal["auto", "float32", "bfloat16", "float16"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelRecipe:
    """How a model is loaded.

    Args:
        device: auto, cpu, cuda or mps.
        dtype: auto (as saved), float32, bfloat16 or float16.
        context: most tokens of a conversation; the model's own limit if not given.
    """

    device: str = "auto"
    dtype: Dtype = "auto"
    context: int | None = None


def start_engine(model: str, recipe: ModelRecipe, *, most_rows: int = 1, most_waiting: int = 64) -> Engine:
    """Load a full or merged checkpoint, from a folder or a hub, and start a worker on it."""
    from clips_mllm.checkpoint import load_mllm
    from clips_mllm.talk.engine import Engine

    mllm = load_mllm(model, device=recipe.device, dtype=recipe.dtype)
    return Engine(mllm, context=recipe.context, most_rows=most_rows, most_waiting=most_waiting)
