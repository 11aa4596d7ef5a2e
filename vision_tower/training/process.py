"""Process-wide setup of a training run. The commands call `set_up_process` once, before anything else of the run.

The order matters: ZeRO-3 shards a model while it is built, so the process group and the DeepSpeed config must exist
before the model does.
"""

from __future__ import annotations

import logging
import os
import socket
from typing import TYPE_CHECKING, Any

from vision_tower.common.errors import UserError
from vision_tower.training.recipe import TrainingRecipe

if TYPE_CHECKING:
    from transformers import TrainingArguments

logger = logging.getLogger(__name__)


def set_up_process(values: dict[str, Any], recipe: TrainingRecipe) -> TrainingArguments:
    """Join the process group, choose the device, and check that all ranks agree.

    Args:
        values: of `training_arguments`.
        recipe: the recipe they come from.

    Returns:
        The arguments of this process's trainer.
    """
    if recipe.deepspeed is not None:
        _set_single_rank_environment()
    arguments = _join_process_group(values, recipe)
    if recipe.deepspeed is not None:
        if arguments.device.type == "cpu":
            _skip_shm_compilation()
        _init_deepspeed_comm()
    _use_one_device(arguments)
    check_same_precision(recipe.precision)
    return arguments


def _set_single_rank_environment() -> None:
    """Describe a world of one rank, because DeepSpeed needs a process group also without a launcher."""
    if "RANK" in os.environ:
        return
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))


def _skip_shm_compilation() -> None:
    """Disable DeepSpeed's shared-memory all-reduce, an inference kernel that training does not need.

    DeepSpeed 0.19 compiles it on the first start on a CPU, which takes a minute and needs a C++ compiler. Its table of
    compatible ops is the only switch.
    """
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def _join_process_group(values: dict[str, Any], recipe: TrainingRecipe) -> TrainingArguments:
    """Construct TrainingArguments: its constructor joins the process group and registers the DeepSpeed config."""
    from transformers import TrainingArguments

    try:
        return TrainingArguments(**values)
    except (ValueError, TypeError) as error:
        if not recipe.extra:
            raise
        raise UserError(" ".join(str(error).split()), key="training.extra", remedy="correct or remove it") from error


def _init_deepspeed_comm() -> None:
    """Initialize `deepspeed.comm`, which accelerate does on GPUs only."""
    from deepspeed import comm

    comm.init_distributed(verbose=False)


def _use_one_device(arguments: TrainingArguments) -> None:
    """Use one GPU per process: with several, transformers splits each batch over them by nn.DataParallel."""
    if arguments.n_gpu > 1:
        logger.warning("using one of %d GPUs; launch with scripts/ or torchrun to use all", arguments.n_gpu)
        arguments._n_gpu = 1  # n_gpu is a read-only property


def check_same_precision(precision: str) -> None:
    """Raise UserError on all ranks if `precision: auto` was resolved differently on different machines."""
    mismatch = first_mismatch(precision)
    if mismatch is not None:
        rank, first, other = mismatch
        raise UserError(
            f"auto is {first} on rank 0 and {other} on rank {rank}", key="training.precision", remedy="set bf16 or fp32"
        )


def first_mismatch(value: Any) -> tuple[int, Any, Any] | None:
    """Compare a value over all ranks; every rank must call this.

    Returns:
        (rank, value of rank 0, value of that rank) of the first rank that differs from rank 0; None if all agree.
    """
    import torch.distributed as dist

    if not (dist.is_initialized() and dist.get_world_size() > 1):
        return None
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return next(((rank, values[0], other) for rank, other in enumerate(values) if other != values[0]), None)
