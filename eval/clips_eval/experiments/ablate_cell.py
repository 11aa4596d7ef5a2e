"""One run of the grid: `pretrain`, then `retrieve`, in a process of its own.

Importing torch, transformers and what they bring along takes as long as many steps of a small run. So the processes are
forked from one that has done it once for the whole grid (`multiprocessing`'s fork server).
"""

from __future__ import annotations

import importlib
import json
import multiprocessing
import os
import signal
import sys
import threading
from multiprocessing.context import BaseContext
from pathlib import Path

from vision_tower.common.errors import run_command

ORDER = "cell.json"  # what the run was asked for
LOG = "log.txt"
PREPARED = [
    "vision_tower.pretraining.trainer",
    "vision_tower.data.pairs",
    "vision_tower.checkpoints.encoder",
    "torchvision.transforms.v2",
]


def cell_context() -> BaseContext:
    """How the processes start. Where CUDA is, they begin from nothing: it does not survive a fork."""
    import torch

    if torch.cuda.is_available():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PREPARED)
    return context


def run_cell(folder: Path, threads: int) -> None:
    """Do what the folder's `cell.json` says, with the exit code of a command; `retrieval.json` appears last."""
    import torch

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches it too, but it is to save first: SIGTERM follows
    threading.Thread(target=_end_with_the_command, daemon=True).start()
    log = os.open(folder / LOG, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    os.dup2(log, 1)
    os.dup2(log, 2)
    torch.set_num_threads(threads)
    code = run_command(_pretrain_and_retrieve, [str(folder)])
    for loader in multiprocessing.active_children():  # they forgive one SIGTERM; multiprocessing sends that, and waits
        loader.kill()
    sys.exit(code)


def _end_with_the_command() -> None:
    """Also where the command is killed: started again, it must not find the folder still in use."""
    command = multiprocessing.parent_process()
    assert command is not None
    command.join()
    os.kill(os.getpid(), signal.SIGTERM)


def _pretrain_and_retrieve(argv: list[str]) -> None:
    order = json.loads((Path(argv[0]) / ORDER).read_text())
    for name, module in (("pretrain", "vision_tower.pretrain"), ("retrieve", "clips_eval.retrieve")):
        importlib.import_module(module).main(order[name])
