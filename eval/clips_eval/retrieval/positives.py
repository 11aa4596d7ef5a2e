"""Further right answers of a retrieval set: COCO's captions fit more images than their own.

ECCV Caption (Chun et al. 2022) and CxC give, for COCO's test split, all images that a caption describes and all
captions of an image. Here as JSON, by the ids of the Karpathy file ("cocoid" or else "imgid"; "sentid"):

    {"images_of_caption": {"SENTID": [IMAGE ID, ...]}, "captions_of_image": {"IMAGE ID": [SENTID, ...]}}
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from clips_eval.retrieval.measures import Positives, Way, several
from vision_tower.common.errors import UserError
from vision_tower.common.files import read_object

if TYPE_CHECKING:
    from vision_tower.evaluation.embedding import EmbeddedPairs

SECTIONS = ("images_of_caption", "captions_of_image")


def multi_positive(file: Path, data: Path, split: str, found: EmbeddedPairs) -> dict[str, Any]:
    """Recall@k, R-precision and mAP@R in both directions, over the queries that the file annotates.

    Raises:
        UserError: a file of another form, ids that are unknown, or images that could not be read.
    """
    tree = read_object(file)
    for section in SECTIONS:
        if not isinstance(tree.get(section), dict):
            raise UserError(f"no '{section}' of ids to lists of ids", file=file, remedy="see docs/evaluation.md")
    images, texts = _ids(data, split)
    if (len(images), len(texts)) != (len(found.images), len(found.texts)):
        raise UserError("some of its images cannot be read", file=data, remedy=f"mend them to measure with {file}")
    of_caption = _positives(file, "images_of_caption", tree, texts, images)
    of_image = _positives(file, "captions_of_image", tree, images, texts)
    places, owner = range(len(found.images)), found.owner.tolist()
    t2i = Way(queries=found.texts, candidates=found.images, positives=of_caption, images=owner)
    i2t = Way(queries=found.images, candidates=found.texts, positives=of_image, images=places)
    return {"t2i": several(t2i), "i2t": several(i2t), "source": str(file)}


def _ids(data: Path, split: str) -> tuple[list[str], list[str]]:
    """Ids of the split's images and captions, in the order in which they are embedded."""
    rows = [row for row in read_object(data)["images"] if row.get("split") == split]
    try:
        images = [str(row["cocoid"] if "cocoid" in row else row["imgid"]) for row in rows]
        return images, [str(sentence["sentid"]) for row in rows for sentence in row["sentences"]]
    except KeyError as error:
        raise UserError(
            f"no {error} in its images", file=data, remedy="further right answers are named by these ids"
        ) from error


def _positives(file: Path, section: str, tree: dict[str, Any], queries: list[str], candidates: list[str]) -> Positives:
    """Rows of the candidates for each query; an empty list for one that is not annotated."""
    row_of = {name: row for row, name in enumerate(candidates)}
    known = set(queries)
    found: dict[str, list[int]] = {}
    for query, names in tree[section].items():
        if query not in known:
            raise UserError(
                f"{section}: '{query}' is no id of this split", file=file, remedy="choose the split with --split"
            )
        missing = [name for name in map(str, names) if name not in row_of]
        if missing:
            raise UserError(
                f"{section}.{query}: '{missing[0]}' is no id of this split", file=file, remedy="mend the file"
            )
        found[query] = [row_of[str(name)] for name in names]
    return [found.get(query, []) for query in queries]
