"""Retrieval and zero-shot scores of a model during training, computed as the commands do.

karpathy.load_pairs, image_folder.load_task   once, so that bad data stops the run before training starts
evaluate_retrieval, evaluate_zeroshot         every N steps; training or evaluation mode is restored
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from vision_tower.checkpoints.encoder import Encoder
from vision_tower.data.image_batches import CaptionedImage, SkipCounter
from vision_tower.data.image_folder import ZeroShotTask
from vision_tower.data.images import evaluation_processor
from vision_tower.evaluation.embedding import embed_pairs
from vision_tower.evaluation.recall import recall_at_k
from vision_tower.evaluation.zeroshot import classify
from vision_tower.model.modeling import ClipsModel
from vision_tower.text.tokenizer import ClipsTokenizer


@contextmanager
def evaluating(model: ClipsModel, tokenizer: ClipsTokenizer) -> Iterator[Encoder]:
    """Yield the model as an encoder in evaluation mode, and restore its mode."""
    training = model.training
    try:
        yield Encoder(model, tokenizer, evaluation_processor(model.config.vision_config.image_size))
    finally:
        model.train(training)


def evaluate_retrieval(
    model: ClipsModel,
    tokenizer: ClipsTokenizer,
    pairs: list[CaptionedImage],
    batch_size: int = 64,
    *,
    progress: bool = False,
) -> dict[str, float]:
    """Return recall@1, 5 and 10 in both directions as fractions, `i2t_r1` to `t2i_r10`.

    Args:
        pairs: what `load_pairs` returned.
    Raises:
        UserError: too many unreadable images.
        NotFinite: an embedding is not finite.
    """
    with evaluating(model, tokenizer) as encoder:
        found = embed_pairs(encoder, pairs, batch_size, SkipCounter("retrieval"), total=len(pairs), progress=progress)
    return recall_at_k(found.images, found.texts, found.owner)


def evaluate_zeroshot(
    model: ClipsModel, tokenizer: ClipsTokenizer, task: ZeroShotTask, batch_size: int = 64, *, progress: bool = False
) -> dict[str, float]:
    """Return `top1`, `mean_per_class` and, with at least five classes, `top5`, as fractions.

    Args:
        task: what `load_task` returned.
    Raises:
        UserError: too many unreadable images.
        NotFinite: an embedding is not finite.
    """
    with evaluating(model, tokenizer) as encoder:
        scores = classify(encoder, task, batch_size, SkipCounter(str(task.root)), progress=progress)
    found = {"top1": scores.top1, "top5": scores.top5, "mean_per_class": scores.mean_per_class}
    return {name: share for name, share in found.items() if share is not None}
