"""From pictures and captions to embeddings, recall and example retrievals.

Apart from the command, because the option parser runs the `TYPE_CHECKING` imports of the module that holds a recipe:
torch among them would make `--help` take seconds.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vision_tower.errors import UserError
from vision_tower.karpathy import Pairs

if TYPE_CHECKING:
    from torch import Tensor

    from vision_tower.encoder import Encoder

KS = (1, 5, 10)
EXAMPLES = 4  # queries kept in each direction for the report


def embed(encoder: Encoder, pairs: Pairs, batch_size: int) -> tuple[Tensor, Tensor]:
    """Embeddings of all pictures (N, D) and captions (M, D), with a progress bar for each."""
    import torch
    from tqdm import trange

    images = []
    for start in trange(0, len(pairs.files), batch_size, desc="images", unit="batch"):
        images.append(encoder.embed_images([_open(file) for file in pairs.files[start : start + batch_size]]))
    texts = []
    for start in trange(0, len(pairs.texts), batch_size, desc="texts", unit="batch"):
        texts.append(encoder.embed_texts(pairs.texts[start : start + batch_size]))
    return torch.cat(images), torch.cat(texts)


def _open(file: Path) -> Any:
    from PIL import Image

    try:
        with Image.open(file) as image:
            return image.convert("RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise UserError(f"{file}: not a readable image ({error}); replace it or take it out of the JSON") from error


def score(encoder: Path, images: Tensor, texts: Tensor, pairs: Pairs) -> dict[str, float]:
    """Recall@k both ways, as fractions."""
    import torch

    from vision_tower.recall import recall_at_k

    if not (torch.isfinite(images).all() and torch.isfinite(texts).all()):
        raise UserError(f"{encoder}: its embeddings hold NaN or infinity; the training diverged, pretrain it again")
    return recall_at_k(images, texts, torch.tensor(pairs.owner, device=images.device), ks=KS)


def examples(images: Tensor, texts: Tensor, pairs: Pairs, folder: Path) -> dict[str, list[dict[str, Any]]]:
    """A few queries with their five best answers, evenly spaced over the data so that none is hand-picked.

    Picture paths are relative to `folder`, where the scores are written, so that a run can be moved.
    """
    files = [os.path.relpath(file, folder) for file in pairs.files]
    found: dict[str, list[dict[str, Any]]] = {"text_to_image": [], "image_to_text": []}
    for query in _spread(len(texts), EXAMPLES):
        best = (texts[query] @ images.T).topk(min(5, len(images))).indices.tolist()
        row = {"query": pairs.texts[query], "images": [files[i] for i in best]}
        found["text_to_image"].append(row | {"correct": [i == pairs.owner[query] for i in best]})
    for query in _spread(len(images), EXAMPLES):
        best = (images[query] @ texts.T).topk(min(5, len(texts))).indices.tolist()
        row = {"query": files[query], "texts": [pairs.texts[j] for j in best]}
        found["image_to_text"].append(row | {"correct": [pairs.owner[j] == query for j in best]})
    return found


def _spread(total: int, count: int) -> list[int]:
    """At most `count` places, evenly spaced in `range(total)`."""
    return sorted({(2 * i + 1) * total // (2 * count) for i in range(count)})
