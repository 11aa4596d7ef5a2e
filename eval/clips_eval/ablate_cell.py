"""One run of the grid: `pretrain`, then `retrieve`, in a process of its own.

python -m clips_eval.ablate_cell RUN_FOLDER
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from vision_tower.errors import run_command

ORDER = "cell.json"  # what the run was asked for


def main(argv: list[str]) -> None:
    """Do what the folder's `cell.json` says; the last file that appears is `retrieval.json`."""
    folder = Path(argv[0])
    order = json.loads((folder / ORDER).read_text())

    from clips_eval.retrieve import main as retrieve
    from vision_tower.pretrain import main as pretrain

    pretrain(order["pretrain"])
    retrieve(order["retrieve"])


if __name__ == "__main__":
    sys.exit(run_command(main))
