"""What `clips-mllm convert` is asked; apart from the code so that `--help` answers at once."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Literal


@dataclasses.dataclass(frozen=True, kw_only=True)
class ConvertRecipe:
    """Convert a CLIPS encoder between the formats it is published, trained and used in.

    Args:
        source: folder of a `clips-mllm pretrain` run, or of an open_clip model (open_clip_config.json and its weights).
        destination: a new folder.
        to: clips (what `pretrain` leaves), tower (the stock image tower alone) or open_clip.
    """

    source: Path
    destination: Path
    to: Literal["clips", "tower", "open_clip"]
