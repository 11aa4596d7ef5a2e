"""Stops a run at a NaN or infinite loss or gradient, and writes what is needed to replay the step."""

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


def stop_if_not_finite(
    values: dict[str, torch.Tensor], step: int, samples: Callable[[], list[str]], folder: Path
) -> None:
    """Stop all ranks if a value is NaN or infinite on any of them. Every rank must call this.

    Called before the optimizer step, so the last checkpoint is from before the bad step.

    Args:
        values: scalars of this rank, such as loss and gradient norm.
        step: the optimizer step, from 1.
        samples: returns identifiers of this rank's samples of the step; called only on failure.
        folder: the run folder; `bad_step.json` is written there.

    Raises:
        UserError: naming the step, the file and the remedy.
    """
    device = next(iter(values.values())).device
    numbers = torch.stack([value.detach().to(device, torch.float32) for value in values.values()])
    bad = (~torch.isfinite(numbers)).any().float()
    if world() > 1:
        dist.all_reduce(bad, op=dist.ReduceOp.MAX)
    if not bad.item():  # the only place in a step at which the host waits for the device
        return
    texts = {name: repr(number) for name, number in zip(values, numbers.tolist(), strict=True)}
    _write_report(folder, step, {"rank": rank(), **texts, "keys": samples()})
    summary = ", ".join(f"{name} {number}" for name, number in texts.items())
    checkpoint = latest_checkpoint(folder)
    resume = f"resume from {checkpoint} with the same command" if checkpoint else "start again"
    remedy = f"fix the samples listed there and {resume}, or lower training.learning_rate in another output_dir"
    raise UserError(f"step {step}: {summary} on rank {rank()}", file=folder / FILE, remedy=remedy)


def _write_report(folder: Path, step: int, report: dict[str, Any]) -> None:
    """Gather the reports of all ranks and write them on rank 0."""
    ranks = [report]
    if world() > 1:
        ranks = [{}] * world()
        dist.all_gather_object(ranks, report)
    if rank() == 0:
        folder.mkdir(parents=True, exist_ok=True)
        write_text(folder / FILE, json.dumps({"step": step, "ranks": ranks}, indent=1) + "\n")
