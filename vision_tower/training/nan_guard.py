"""A loss or gradient that is not finite stops the run, and leaves what is needed to replay the step."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from vision_tower.common.errors import UserError
from vision_tower.common.files import write_text
from vision_tower.common.ranks import rank, world
from vision_tower.training.run_folder import latest_checkpoint

FILE = "bad_step.json"


def refuse(values: dict[str, torch.Tensor], step: int, keys: list[str] | Callable[[], list[str]], folder: Path) -> None:
    """Stop all ranks where a value is NaN or infinite on any of them.

    Called before anything of this step is saved, so the last checkpoint is from before it.

    Args:
        values: this rank's scalars, such as loss and gradient norm.
        step: the optimiser step, from 1.
        keys: this rank's samples of the step, or what finds them out.
        folder: the run folder; `bad_step.json` is written there.
    Raises:
        UserError: with the step, the file and the remedy.
    """
    device = next(iter(values.values())).device
    numbers = torch.stack([value.detach().to(device, torch.float32) for value in values.values()])
    bad = (~torch.isfinite(numbers)).any().float()
    if world() > 1:
        dist.all_reduce(bad, op=dist.ReduceOp.MAX)
    if not bad.item():  # the one place in a step where the host waits for the device
        return
    said = {name: repr(number) for name, number in zip(values, numbers.tolist(), strict=True)}
    mine: dict[str, Any] = {"rank": rank(), **said, "keys": keys() if callable(keys) else keys}
    ranks = [mine]
    if world() > 1:
        ranks = [{}] * world()
        dist.all_gather_object(ranks, mine)
    if mine["rank"] == 0:
        folder.mkdir(parents=True, exist_ok=True)
        write_text(folder / FILE, json.dumps({"step": step, "ranks": ranks}, indent=1) + "\n")
    back = latest_checkpoint(folder)
    resume = f"go on from {back} with the same command" if back else "start again"
    what = ", ".join(f"{name} {number}" for name, number in said.items())
    raise UserError(
        f"step {step}: {what} on rank {mine['rank']}",
        remedy=f"samples listed in {folder / FILE}: mend what is wrong with them and {resume}, or lower "
        f"training.learning_rate in another output_dir",
    )
