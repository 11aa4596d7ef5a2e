"""Several runs by one launch, because ranks spend most of a small test on importing: several_runs.py FILE.

FILE is a JSON list of {"command": "train" or "pretrain", "arguments": [...]} or {"remove": FOLDER}, which all ranks
execute in order.
"""

from __future__ import annotations

import gc
import importlib
import json
import shutil
import sys
from pathlib import Path

from vision_tower.common.errors import run_command

MODULES = {"train": "clips_mllm.train", "pretrain": "vision_tower.pretrain"}


def run_all(argv: list[str]) -> None:
    import torch.distributed as dist
    from accelerate.state import AcceleratorState, GradientState

    for entry in json.loads(Path(next(word for word in argv if not word.startswith("--local_rank"))).read_text()):
        if "remove" in entry:
            dist.barrier()
            shutil.rmtree(entry["remove"], ignore_errors=True)
            dist.barrier()
            continue
        importlib.import_module(MODULES[entry["command"]]).main(entry["arguments"])
        AcceleratorState._reset_state()
        GradientState._reset_state()
        gc.collect()  # transformers keeps ZeRO-3 on as long as its config is referenced


if __name__ == "__main__":
    sys.exit(run_command(run_all))
