"""From embeddings to recall and example retrievals.

Apart from the command, because the option parser runs the `TYPE_CHECKING` imports of the module that holds a recipe:
torch among them would make `--help` take seconds.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from clips_eval.provenance import diverged
from vision_tower.errors import NotFinite

if TYPE_CHECKING:
    from vision_tower.embedding import EmbeddedPairs

KS = (1, 5, 10)
EXAMPLES = 4  # queries kept in each direction for the report


def score(encoder: Path, found: EmbeddedPairs) -> dict[str, float]:
    """Recall@k both ways, as fractions. Raises UserError on an encoder whose embeddings are not finite."""
    from vision_tower.recall import recall_at_k

    try:
        return recall_at_k(found.images, found.texts, found.owner, ks=KS)
    except NotFinite as error:
        raise diverged(encoder) from error


def examples(found: EmbeddedPairs, folder: Path) -> dict[str, list[dict[str, Any]]]:
    """A few queries with their five best answers, evenly spaced over the data so that none is hand-picked.

    Picture files are named relative to `folder`, where the scores are written, so that a run can be moved.
    """
    owner = found.owner.tolist()
    rows: dict[str, list[dict[str, Any]]] = {"text_to_image": [], "image_to_text": []}
    for query in _spread(len(found.texts), EXAMPLES):
        best = (found.texts[query] @ found.images.T).topk(min(5, len(found.images))).indices.tolist()
        row = {"query": found.captions[query], "images": [_place(found.names[i], folder) for i in best]}
        rows["text_to_image"].append(row | {"correct": [i == owner[query] for i in best]})
    for query in _spread(len(found.images), EXAMPLES):
        best = (found.images[query] @ found.texts.T).topk(min(5, len(found.texts))).indices.tolist()
        row = {"query": _place(found.names[query], folder), "texts": [found.captions[j] for j in best]}
        rows["image_to_text"].append(row | {"correct": [owner[j] == query for j in best]})
    return rows


def _place(name: str, folder: Path) -> str:
    """A picture inside a shard has no file of its own and keeps its name."""
    return os.path.relpath(name, folder) if os.path.isfile(name) else name


def _spread(total: int, count: int) -> list[int]:
    """At most `count` places, evenly spaced in `range(total)`."""
    return sorted({(2 * i + 1) * total // (2 * count) for i in range(count)})
