"""Several runs of `clips-mllm train` in one launch, for tests with ranks: what is imported is paid for once.

deepspeed --num_gpus 2 tests/train_twice.py --output_dir a ... --- --output_dir b ...
"""

from __future__ import annotations

import sys

from clips_mllm.train import main
from vision_tower.training import drop_launcher_arguments


def runs(argv: list[str]) -> list[list[str]]:
    """The command lines between the `---`."""
    found: list[list[str]] = [[]]
    for word in drop_launcher_arguments(argv):
        if word == "---":
            found.append([])
        else:
            found[-1].append(word)
    return found


if __name__ == "__main__":
    for words in runs(sys.argv[1:]):
        main(words)
