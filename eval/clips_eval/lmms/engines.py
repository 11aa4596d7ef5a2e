"""Whose code answers: this project's, or one of lmms-eval's own models for a cross-check."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from clips_eval.lmms.model import load_own
from clips_eval.lmms.recipe import EvaluateRecipe
from vision_tower.common.errors import UserError

if TYPE_CHECKING:
    from lmms_eval.api.model import lmms

    from clips_eval.lmms.journal import Journal
    from clips_eval.lmms.recipe import Variant
    from clips_mllm.model.checkpoint import Mllm


def load(recipe: EvaluateRecipe) -> Mllm | lmms:
    """The checkpoint for our engine, a ready model for the others. Called once an evaluation.

    Raises:
        UserError: a checkpoint that cannot be loaded, or a package that an engine needs.
    """
    if recipe.model == "clips_mllm":
        return load_own(recipe.checkpoint, device=recipe.device, dtype=recipe.dtype, quantize=recipe.quantize)
    return _stock(recipe)


def model_for(recipe: EvaluateRecipe, loaded: Mllm | lmms, variant: Variant, journal: Journal) -> lmms:
    """The model of one pass over the tasks."""
    from clips_eval.lmms.model import ClipsMllm, ClipsMllmSimple
    from clips_mllm.model.checkpoint import Mllm

    if not isinstance(loaded, Mllm):
        return loaded
    kind = ClipsMllm if recipe.mode == "chat" else ClipsMllmSimple
    model = kind(
        recipe.checkpoint,
        mllm=loaded,
        batch_size=recipe.batch_size,
        control=variant.control,
        seed=recipe.seed,
        journal=journal,
    )
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        from accelerate import Accelerator

        # lmms-eval would make one itself, which on CPUs takes every process for the only one unless it is told.
        model.accelerator = Accelerator(cpu=model.device.type == "cpu")
    return model


def one_line(error: BaseException) -> str:
    """What it says: the hub's errors are several lines, of which the last give the remedy."""
    return " ".join(str(error).split())


def _stock(recipe: EvaluateRecipe) -> lmms:
    """One of lmms-eval's. `llava_hf` wants its device map spelled out and takes one document at a time."""
    from lmms_eval.models import get_model

    from vision_tower.checkpoints.encoder import choose_device

    place = str(choose_device(recipe.device))
    arguments, batch = {
        "llava_hf": (f"pretrained={recipe.checkpoint},device_map={place},dtype={recipe.dtype}", 1),
        "vllm": (f"model={recipe.checkpoint}", recipe.batch_size),
        "openai": (f"model_version={recipe.checkpoint}", recipe.batch_size),
    }[recipe.model]
    words = ",".join(part for part in (arguments, recipe.model_args) if part)
    try:
        kind = get_model(recipe.model, force_simple=recipe.mode == "simple")
        model: lmms = kind.create_from_arg_string(words, {"batch_size": batch, "device": place})
    except (ImportError, NameError, TypeError) as error:
        raise UserError(
            f"--model {recipe.model}: cannot be used here ({one_line(error)})",
            remedy="check --model_args and its package",
        ) from error
    except (OSError, ValueError) as error:
        raise UserError(
            f"--model {recipe.model}: {recipe.checkpoint} cannot be loaded ({one_line(error)})",
            remedy="check its name and the network",
        ) from error
    model.clean = lambda: None  # type: ignore[method-assign]  # it would delete the weights after the first task
    return model
