"""What the three training stages share of the engine: its arguments, and what is done to a model before it trains.

`transformers.Trainer` is the engine; `TrainingRecipe` is put into its words here.
"""

from __future__ import annotations

import dataclasses
import os
import shutil
import sys
import sysconfig
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vision_tower.common.errors import UserError
from vision_tower.common.files import read_object
from vision_tower.common.launcher import become_the_only_rank, is_main_process
from vision_tower.training.recipe import TrainingRecipe

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import Trainer, TrainingArguments

# Fields of TrainingArguments that a recipe says in its own words; said twice, batch and resolved recipe would disagree.
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
    "resume_from_checkpoint": "output_dir, from whose newest checkpoint a run goes on by itself",
}


def training_arguments(recipe: TrainingRecipe, output_dir: Path, **more: Any) -> TrainingArguments:
    """The recipe in transformers' words, and `more` of them. What it does not take of `extra`, and a missing DeepSpeed
    file, are UserErrors."""
    import torch
    from transformers import TrainingArguments

    from vision_tower.training.cpu_memory import spare_memory

    _check_extra(recipe, {field.name for field in dataclasses.fields(TrainingArguments)})
    if recipe.deepspeed is not None and not Path(recipe.deepspeed).is_file():
        raise UserError("no such DeepSpeed configuration", file=recipe.deepspeed, remedy="see configs/deepspeed/")
    if recipe.deepspeed is not None:
        read_object(Path(recipe.deepspeed))  # one line where it is damaged, before DeepSpeed reads it
        become_the_only_rank()
    assert recipe.precision != "auto", "settle_precision has run"
    values: dict[str, Any] = {
        "output_dir": str(output_dir),
        "per_device_train_batch_size": recipe.device_batch_size,
        "gradient_accumulation_steps": recipe.accumulation(int(os.environ.get("WORLD_SIZE", "1"))),
        "learning_rate": recipe.learning_rate,
        "lr_scheduler_type": recipe.schedule,
        "warmup_steps": recipe.warmup_steps or recipe.warmup_ratio,  # below 1 transformers reads it as a share
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
        "logging_nan_inf_filter": False,  # it would hide what must stop the run
        "dataloader_num_workers": recipe.workers,
        "report_to": _back_ends(recipe),
        "seed": recipe.seed,
        "remove_unused_columns": False,
        "use_cpu": not torch.cuda.is_available(),
    }
    if recipe.gradient_checkpointing:  # transformers 5.23 warns of the name even where it is off
        values["gradient_checkpointing"] = True
    try:
        arguments = TrainingArguments(**(values | more | recipe.extra))
    except (ValueError, TypeError) as error:
        if not recipe.extra:
            raise
        raise UserError(f"{' '.join(str(error).split())}", key="training.extra") from error
    _join_ranks(arguments)
    _take_one_device(arguments)
    check_one_precision(recipe.precision)
    if arguments.device.type == "cpu":
        spare_memory()
    return arguments


def _take_one_device(arguments: TrainingArguments) -> None:
    """A process trains on one GPU: where it sees several, transformers would cut every batch over all of them by
    nn.DataParallel, and the batch would not be the recipe's."""
    if arguments.n_gpu > 1:
        print(f"one of {arguments.n_gpu} GPUs is used; the scripts and torchrun take all of them", file=sys.stderr)
        arguments._n_gpu = 1


def check_one_precision(precision: str) -> None:
    """Raise UserError on all ranks where `auto` came out differently on machines of several kinds."""
    other = other_rank(precision)
    if other is not None:
        rank, first, theirs = other
        raise UserError(
            f"rank 0 computes in {first} and rank {rank} in {theirs}",
            key="training.precision",
            remedy="name one of them in the recipe",
        )


def other_rank(value: Any) -> tuple[int, Any, Any] | None:
    """The first rank whose value is not rank 0's, with rank 0's and its own; None where all agree. Every rank asks."""
    import torch.distributed as dist

    if not (dist.is_initialized() and dist.get_world_size() > 1):
        return None
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, value)
    return next(((rank, found[0], one) for rank, one in enumerate(found) if one != found[0]), None)


def _join_ranks(arguments: TrainingArguments) -> None:
    """Before there is a model: ZeRO-3 divides it among the ranks while it is built, and asks DeepSpeed how many."""
    assert arguments.device is not None  # being asked, transformers joins the process group
    import torch.distributed as dist

    if arguments.deepspeed is not None and dist.is_initialized():
        import deepspeed
        from deepspeed import comm

        # An all-reduce for inference. DeepSpeed compiles it at the first start on a CPU: a minute, with a C++ compiler.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        comm.init_distributed(verbose=False)  # on CPUs accelerate leaves DeepSpeed out


def _check_extra(recipe: TrainingRecipe, known: set[str]) -> None:
    import difflib

    for name in recipe.extra:
        if name in OWN_FIELDS:
            raise UserError(
                f"training.extra.{name}: a recipe has its own field for it", remedy=f"set {OWN_FIELDS[name]}"
            )
        if name not in known:
            near = difflib.get_close_matches(name, sorted(known), n=1)
            remedy = f"did you mean '{near[0]}'?" if near else "see transformers.TrainingArguments"
            raise UserError(f"training.extra.{name}: not a field of TrainingArguments", remedy=f"{remedy}")


def _back_ends(recipe: TrainingRecipe) -> list[str]:
    from importlib.util import find_spec

    packages = {"tensorboard": ("tensorboard", "tensorboardX"), "wandb": ("wandb",)}
    for name in recipe.report_to:
        if not any(find_spec(package) for package in packages[name]):
            raise UserError(
                f"{name} is not installed", key="training.report_to", remedy=f"pip install {packages[name][-1]}"
            )
    if "wandb" in recipe.report_to and is_main_process():
        _require_login()
    return list(recipe.report_to)


def _require_login() -> None:
    """Else the first step would ask for a key, or raise."""
    import wandb

    if wandb.api.api_key:
        return
    settings = wandb.setup().settings  # of the environment and of the file that `wandb offline` writes
    if settings.mode in ("online", "run", "shared") and not settings.identity_token_file:
        raise UserError(
            "wandb is not logged in", key="training.report_to", remedy="`wandb login`, or set WANDB_MODE=offline"
        )


def final_state(trainer: Trainer) -> dict[str, torch.Tensor] | None:
    """The whole state dict on the main process (ZeRO-3 gathers it there); None elsewhere."""
    state = trainer.accelerator.get_state_dict(trainer.model_wrapped)
    return state if trainer.is_world_process_zero() else None


def size(parameter: nn.Parameter) -> int:
    """Its number of weights; ZeRO-3 leaves an empty tensor in place of what it has divided."""
    return int(getattr(parameter, "ds_numel", parameter.numel()))


def compile_blocks(model: nn.Module) -> None:
    """torch.compile every transformer block in place: one compilation for all blocks of a kind, names unchanged.

    Raises:
        UserError: on a CPU, for which the compiler writes C++, without what compiles that.
    """
    import torch
    from transformers.modeling_layers import GradientCheckpointingLayer

    if not torch.cuda.is_available():
        check_cpp()
    for module in model.modules():
        if isinstance(module, GradientCheckpointingLayer):
            module.compile()


def check_cpp() -> None:
    """Raise UserError where torch.compile's C++ could not be compiled: it would end the run in its first step."""
    compiler = os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++")  # as torch's inductor chooses
    if shutil.which(compiler) is None:
        raise UserError(
            f"needs a C++ compiler, and '{compiler}' is not there",
            key="training.compile",
            remedy="install it, name another in CXX, or leave training.compile out",
        )
    header = Path(sysconfig.get_path("include")) / "Python.h"
    if not header.is_file():
        raise UserError(
            f"{header} is not there",
            key="training.compile",
            remedy="install Python's headers (python3-dev), or leave training.compile out",
        )


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Decay on weight matrices only: not on biases, norms, embeddings, learnable queries or the temperature."""
    from torch import nn

    matrices: set[int] = set()
    for module in model.modules():
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            matrices.add(id(module.weight))
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return [
        {"params": [p for p in trainable if id(p) in matrices], "weight_decay": weight_decay},
        {"params": [p for p in trainable if id(p) not in matrices], "weight_decay": 0.0},
    ]
