"""Maps a `TrainingRecipe` to the arguments of `transformers.Trainer`."""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any

from vision_tower.common.errors import UserError
from vision_tower.common.files import read_object
from vision_tower.common.launcher import is_main_process
from vision_tower.training.recipe import TrainingRecipe

# TrainingArguments fields that a recipe sets by its own fields. Set by `extra` too, they would contradict the recipe.
OWN_FIELDS = {
    "output_dir": "output_dir",
    "per_device_train_batch_size": "training.device_batch_size",
    "gradient_accumulation_steps": "training.global_batch_size",
    "learning_rate": "training.learning_rate",
    "warmup_steps": "training.warmup_steps",
    "warmup_ratio": "training.warmup_ratio",
    "max_steps": "training.max_steps",
    "num_train_epochs": "training.epochs",
    "weight_decay": "training.weight_decay",
    "adam_beta1": "training.beta1",
    "adam_beta2": "training.beta2",
    "max_grad_norm": "training.clip_norm",
    "bf16": "training.precision",
    "gradient_checkpointing": "training.gradient_checkpointing",
    "deepspeed": "training.deepspeed",
    "save_steps": "training.save_every",
    "save_total_limit": "training.keep_checkpoints",
    "logging_steps": "training.log_every",
    "dataloader_num_workers": "training.workers",
    "report_to": "training.report_to",
    "seed": "training.seed",
    "resume_from_checkpoint": "output_dir: a run resumes from its newest checkpoint automatically",
}


def training_arguments(recipe: TrainingRecipe, output_dir: Path, **more: Any) -> dict[str, Any]:
    """Map a recipe to keyword arguments of transformers.TrainingArguments. `set_up_process` constructs them.

    Args:
        recipe: the optimization recipe, with a settled precision.
        output_dir: the run folder.
        more: further TrainingArguments fields, which override the recipe's.

    Raises:
        UserError: an unknown field in `training.extra`, a missing or damaged DeepSpeed file, or a `report_to` package
            that is not installed.
    """
    import torch

    assert recipe.precision != "auto", "settle_precision has run"
    _check_extra(recipe)
    _check_deepspeed(recipe)
    values: dict[str, Any] = {
        "output_dir": str(output_dir),
        "per_device_train_batch_size": recipe.device_batch_size,
        "gradient_accumulation_steps": recipe.accumulation(int(os.environ.get("WORLD_SIZE", "1"))),
        "learning_rate": recipe.learning_rate,
        "lr_scheduler_type": recipe.schedule,
        "warmup_steps": recipe.warmup_steps or recipe.warmup_ratio,  # transformers: a value below 1 is a ratio
        "max_steps": recipe.max_steps or -1,
        "num_train_epochs": recipe.epochs,
        "weight_decay": recipe.weight_decay,
        "adam_beta1": recipe.beta1,
        "adam_beta2": recipe.beta2,
        "max_grad_norm": recipe.clip_norm,
        "bf16": recipe.precision == "bf16",
        "deepspeed": recipe.deepspeed,
        "save_strategy": "steps" if recipe.save_every else "no",
        "save_steps": recipe.save_every or 500,
        "save_total_limit": recipe.keep_checkpoints,
        "logging_steps": recipe.log_every,
        "logging_nan_inf_filter": False,  # the filter would hide the NaN that nan_guard stops at
        "dataloader_num_workers": recipe.workers,
        "report_to": _loggers(recipe),
        "seed": recipe.seed,
        "remove_unused_columns": False,
        "use_cpu": not torch.cuda.is_available(),
    }
    if recipe.gradient_checkpointing:  # transformers 5.23 warns if it is passed at all, even as False
        values["gradient_checkpointing"] = True
    return values | more | recipe.extra


def _check_extra(recipe: TrainingRecipe) -> None:
    import difflib

    from transformers import TrainingArguments

    known = {field.name for field in dataclasses.fields(TrainingArguments)}
    for name in recipe.extra:
        if name in OWN_FIELDS:
            raise UserError("has its own field", key=f"training.extra.{name}", remedy=f"set {OWN_FIELDS[name]}")
        if name not in known:
            near = difflib.get_close_matches(name, sorted(known), n=1)
            remedy = f"did you mean '{near[0]}'?" if near else "see transformers.TrainingArguments"
            raise UserError("not a field of TrainingArguments", key=f"training.extra.{name}", remedy=remedy)


def _check_deepspeed(recipe: TrainingRecipe) -> None:
    if recipe.deepspeed is None:
        return
    if not Path(recipe.deepspeed).is_file():
        raise UserError(
            "no such file", file=recipe.deepspeed, key="training.deepspeed", remedy="choose one of configs/deepspeed/"
        )
    read_object(Path(recipe.deepspeed))  # a damaged file becomes a UserError here, before DeepSpeed reads it


def _loggers(recipe: TrainingRecipe) -> list[str]:
    from importlib.util import find_spec

    packages = {"tensorboard": ("tensorboard", "tensorboardX"), "wandb": ("wandb",)}
    for name in recipe.report_to:
        if not any(find_spec(package) for package in packages[name]):
            package = packages[name][-1]
            raise UserError("not installed", key="training.report_to", value=name, remedy=f"pip install {package}")
    if "wandb" in recipe.report_to and is_main_process():
        _require_login()
    return list(recipe.report_to)


def _require_login() -> None:
    """Raise UserError if wandb is online without an API key: the first step would prompt for one, or raise."""
    import wandb

    if wandb.api.api_key:
        return
    settings = wandb.setup().settings  # from the environment and from the file that `wandb offline` writes
    if settings.mode in ("online", "run", "shared") and not settings.identity_token_file:
        raise UserError(
            "not logged in", key="training.report_to", value="wandb", remedy="`wandb login`, or WANDB_MODE=offline"
        )
