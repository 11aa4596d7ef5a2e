"""What `clips-mllm convert` is asked; apart from the code so that `--help` answers at once."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Literal

from clips_mllm.prompts.render import TemplateName


@dataclasses.dataclass(frozen=True, kw_only=True)
class ConvertRecipe:
    """Convert encoders and multimodal LLMs between the formats they are published, trained and used in.

    Args:
        source: an encoder (folder of `pretrain` or of open_clip); for llava an original LLaVA checkpoint (a whole one,
            a LoRA folder, or an mm_projector.bin); for llava_projector a checkpoint of `train`.
        destination: a new folder.
        to: clips (what `pretrain` leaves), tower (the stock image tower alone), open_clip, llava (the stock multimodal
            LLM) or llava_projector (an mm_projector.bin for the original code).
        tower: vision tower of an original LLaVA checkpoint, a folder or hub id; its config names one.
        llm: LLM that an original LoRA or mm_projector.bin was trained with; a LoRA's config names one.
        template: how conversations were written when an original LLaVA checkpoint was trained.
    """

    source: Path
    destination: Path
    to: Literal["clips", "tower", "open_clip", "llava", "llava_projector"]
    tower: str | None = None
    llm: str | None = None
    template: TemplateName = "vicuna_v1"
