"""The multimodal LLM: prompts, data, model, the two LLaVA stages, checkpoints, chat.

from clips_mllm import load_mllm, build_mllm
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from vision_tower.common.lazy import lazy_exports

if TYPE_CHECKING:
    from clips_mllm.model.build import build_mllm
    from clips_mllm.model.checkpoint import load_mllm

    __version__: str

__all__ = ["__version__", "build_mllm", "load_mllm"]

__getattr__ = lazy_exports(
    __name__, {"build_mllm": "clips_mllm.model.build", "load_mllm": "clips_mllm.model.checkpoint"}
)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
