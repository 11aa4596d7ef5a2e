"""Operations on a model that trains: compilation, parameter groups, sizes, the full state dict."""

from __future__ import annotations

import os
import shutil
import sys
import sysconfig
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vision_tower.common.errors import UserError

if TYPE_CHECKING:
    import torch
    from torch import nn
    from transformers import Trainer


def final_state(trainer: Trainer) -> dict[str, torch.Tensor] | None:
    """Return the full state dict on the main process and None elsewhere. Collective: ZeRO-3 gathers the weights."""
    state = trainer.accelerator.get_state_dict(trainer.model_wrapped)
    return state if trainer.is_world_process_zero() else None


def size(parameter: nn.Parameter) -> int:
    """Return the number of elements of a parameter, which under ZeRO-3 holds an empty tensor."""
    return int(getattr(parameter, "ds_numel", parameter.numel()))


def compile_blocks(model: nn.Module) -> None:
    """Compile every transformer block in place: blocks of one class share a compilation, and names do not change.

    Raises:
        UserError: on a CPU without a C++ compiler or Python headers, which torch.compile needs there.
    """
    import torch
    from transformers.modeling_layers import GradientCheckpointingLayer

    if not torch.cuda.is_available():
        check_cpp()
    for module in model.modules():
        if isinstance(module, GradientCheckpointingLayer):
            module.compile()


def check_cpp() -> None:
    """Raise UserError if the C++ code of torch.compile could not be built; otherwise the first step would fail."""
    compiler = os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++")  # the default of torch inductor
    if shutil.which(compiler) is None:
        remedy = "install it, set CXX to another compiler, or set training.compile to false"
        raise UserError(f"needs a C++ compiler, but '{compiler}' was not found", key="training.compile", remedy=remedy)
    header = Path(sysconfig.get_path("include")) / "Python.h"
    if not header.is_file():
        remedy = "install them (python3-dev), or set training.compile to false"
        raise UserError(f"needs Python's headers, but {header} does not exist", key="training.compile", remedy=remedy)


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Split trainable parameters into decayed weight matrices and the rest, which is not decayed.

    The rest: biases, norms, embeddings, learnable queries, and the temperature.
    """
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
