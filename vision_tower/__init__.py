"""The CLIPS vision encoder (arXiv 2411.16828): captions, model, losses, data, pretraining, retrieval.

from vision_tower import load_encoder, ClipsModel, ClipsConfig, ClipsTokenizer
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from vision_tower.common.lazy import lazy_exports

if TYPE_CHECKING:
    from vision_tower.checkpoints.encoder import load_encoder
    from vision_tower.model.config import ClipsConfig
    from vision_tower.model.modeling import ClipsModel
    from vision_tower.text.tokenizer import ClipsTokenizer

    __version__: str

__all__ = ["ClipsConfig", "ClipsModel", "ClipsTokenizer", "__version__", "load_encoder"]

__getattr__ = lazy_exports(
    __name__,
    {
        "load_encoder": "vision_tower.checkpoints.encoder",
        "ClipsConfig": "vision_tower.model.config",
        "ClipsModel": "vision_tower.model.modeling",
        "ClipsTokenizer": "vision_tower.text.tokenizer",
    },
)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
