"""Model implementations: ours, or one of lmms-eval's as a reference."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from clips_eval.lmms.model import load_own
from clips_eval.lmms.recipe import EvaluateRecipe
from vision_tower.common.errors import UserError

if TYPE_CHECKING:
    from lmms_eval.api.model import lmms

    from clips_eval.lmms.answer_cache import AnswerCache
    from clips_eval.lmms.recipe import Variant
    from clips_mllm.model.checkpoint import Mllm


def load(recipe: EvaluateRecipe) -> Mllm | lmms:
    """Load the checkpoint for our engine, or an lmms-eval model. Called once per evaluation.

    Raises:
        UserError: a checkpoint that cannot be loaded, or a missing package.
    """
    if recipe.model == "clips_mllm":
        return load_own(recipe.checkpoint, device=recipe.device, dtype=recipe.dtype, quantize=recipe.quantize)
    return _load_stock(recipe)


def model_for(recipe: EvaluateRecipe, loaded: Mllm | lmms, variant: Variant, answers: AnswerCache) -> lmms:
    """Return the lmms-eval model of one variant."""
    from clips_eval.lmms.model import ClipsMllm, ClipsMllmSimple
    from clips_mllm.model.checkpoint import Mllm

    if not isinstance(loaded, Mllm):
        return loaded
    model_class = ClipsMllm if recipe.mode == "chat" else ClipsMllmSimple
    model = model_class(
        recipe.checkpoint,
        mllm=loaded,
        batch_size=recipe.batch_size,
        control=variant.control,
        seed=recipe.seed,
        answers=answers,
    )
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        from accelerate import Accelerator

        # lmms-eval uses the model's accelerator. The one that it would create ignores other CPU processes.
        model.accelerator = Accelerator(cpu=model.device.type == "cpu")
    return model


def _load_stock(recipe: EvaluateRecipe) -> lmms:
    """Load one of lmms-eval's models. `llava_hf` needs an explicit device map and supports only batch size 1."""
    from lmms_eval.models import get_model

    from vision_tower.checkpoints.encoder import choose_device

    device = str(choose_device(recipe.device))
    arguments, batch_size = {
        "llava_hf": (f"pretrained={recipe.checkpoint},device_map={device},dtype={recipe.dtype}", 1),
        "vllm": (f"model={recipe.checkpoint}", recipe.batch_size),
        "openai": (f"model_version={recipe.checkpoint}", recipe.batch_size),
    }[recipe.model]
    arguments = ",".join(part for part in (arguments, recipe.model_args) if part)
    try:
        stock_class: type[lmms] = get_model(recipe.model, force_simple=recipe.mode == "simple")

        class Reusable(stock_class):  # type: ignore[valid-type, misc]
            """The same model, kept for the next task."""

            def clean(self) -> None:
                """Keep the weights, which lmms-eval deletes after every `simple_evaluate`."""

        model: lmms = Reusable.create_from_arg_string(arguments, {"batch_size": batch_size, "device": device})
    except (ImportError, NameError, TypeError) as error:
        raise UserError(
            f"not usable ({_one_line(error)})", key="model", value=recipe.model, remedy="check package and --model_args"
        ) from error
    except (OSError, ValueError) as error:
        raise UserError(
            f"--model {recipe.model} cannot load it ({_one_line(error)})",
            file=recipe.checkpoint,
            remedy="check its name and the network",
        ) from error
    return model


def _one_line(error: BaseException) -> str:
    """Return the whole message in one line: the hub's errors have several, and the last ones are the remedy."""
    return " ".join(str(error).split())
