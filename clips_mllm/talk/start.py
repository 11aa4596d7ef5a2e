"""From a recipe to a running engine."""

from __future__ import annotations

from typing import TYPE_CHECKING

from clips_mllm.talk.recipes import ModelRecipe

if TYPE_CHECKING:
    from clips_mllm.talk.engine import Engine


def start_engine(model: str, recipe: ModelRecipe, *, most_rows: int = 1, most_waiting: int = 64) -> Engine:
    """Load a full, adapter or merged checkpoint, from a folder or a hub, and start a worker on it."""
    from clips_mllm.checkpoint import load_mllm
    from clips_mllm.talk.engine import Engine

    mllm = load_mllm(model, device=recipe.device, dtype=recipe.dtype, quantize=recipe.quantize)
    return Engine(mllm, context=recipe.context, most_rows=most_rows, most_waiting=most_waiting)
