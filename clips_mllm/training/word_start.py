"""The projector's start by words: patches come to lie at the words of their captions before the LLM is asked anything.

The LLM already reads word embeddings, so image tokens that resemble the right ones are half read. Which patch shows
what, no caption says. That is translation without alignments, and IBM's Model 1 (Brown et al. 1993) solves it: each
word of a caption comes from some position of the image, p(word | image) = mean over patches of p(word | patch).
Here p(word | patch) falls with the squared distance between projected patch and word embedding, among the rarer pieces
of all captions, and a piece counts by its rarity. Measured in docs/log.md; only the starting values differ.
"""

from __future__ import annotations

import copy
import dataclasses
import math
from collections import Counter
from typing import TYPE_CHECKING

import torch
from torch import nn
from tqdm import tqdm
from transformers.integrations import is_deepspeed_zero3_enabled

from clips_mllm.prompts.conversation import IGNORED
from clips_mllm.training.projector import read_features
from vision_tower.common.launcher import is_main_process

if TYPE_CHECKING:
    from clips_mllm.data.dataset import InstructionCollator, InstructionDataset
    from clips_mllm.model.tiles import AnyModel

IMAGES = 16_384  # looked at, at most
FEATURE_BYTES = 4 * 2**30  # of their features, which stay in memory: with a large tower, fewer images
READ_AT_ONCE = 128
BATCH = 32
LEARNING_RATE, WEIGHT_DECAY = 2e-3, 0.05
SEEN = 3  # captions that a piece must stand in
RARITY = 1.0  # least log(captions / captions with the piece), in nats
SHARPNESS = 10.0  # of p(word | patch), for distances in units of the mean squared length of a word embedding
PULL = 0.2  # towards the nearest word, in the same units


@dataclasses.dataclass(frozen=True)
class Captioned:
    """Images with the rare words of their captions.

    Args:
        features: (n, patches, w) what the projector reads.
        words: (v,) ids of the rare pieces.
        weights: (n, v) a piece's share of its caption; rows add up to 1, or 0 where a caption has no rare piece.
    """

    features: torch.Tensor
    words: torch.Tensor
    weights: torch.Tensor


def start_by_words(
    model: AnyModel, dataset: InstructionDataset, collator: InstructionCollator, *, steps: int, device: torch.device
) -> None:
    """Fit the projector to the captions' words in `steps` steps of 32 images; every rank does the same.

    Under ZeRO-3 the weights are in pieces before training starts, and the projector stays as it is.
    """
    if is_deepspeed_zero3_enabled():
        return
    model.to(device)
    captioned = read_captions(model, dataset, collator)
    if not len(captioned.words):  # the captions are too few, or all alike
        return
    embeddings = model.get_input_embeddings().weight[captioned.words].detach().float()
    projector = model.model.multi_modal_projector
    trained = copy.deepcopy(projector).float()  # its own masters, where the model is in 16 bits
    fit_to_words(trained, captioned, embeddings, steps)
    projector.load_state_dict(trained.state_dict())


def fit_to_words(projector: nn.Module, captioned: Captioned, embeddings: torch.Tensor, steps: int) -> None:
    """AdamW on `word_loss`, the learning rate falling by a cosine; the draws are the same on every rank."""
    draws = torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(projector.parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    projector.requires_grad_(True)
    for _ in tqdm(range(steps), desc="projector: words", unit="step", disable=not is_main_process()):
        chosen = torch.randint(len(captioned.features), (BATCH,), generator=draws).to(captioned.features.device)
        loss = word_loss(projector(captioned.features[chosen]), embeddings, captioned.weights[chosen])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()


def word_loss(patches: torch.Tensor, embeddings: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Minus the mean log-likelihood of the captions' rare words, and the pull to the nearest word.

    Args:
        patches: (b, p, d) projected patches.
        embeddings: (v, d) of the words.
        weights: (b, v) of the words in each caption.
    """
    unit = embeddings.square().sum(dim=1).mean()
    lengths = patches.square().sum(dim=-1, keepdim=True) + embeddings.square().sum(dim=1)
    distances = (lengths - 2 * patches @ embeddings.T) / unit  # (b, p, v)
    by_patch = (-SHARPNESS * distances).log_softmax(dim=-1)
    by_image = by_patch.logsumexp(dim=1) - math.log(patches.shape[1])
    likelihood = (weights * by_image).sum(dim=1).mean()
    return PULL * distances.amin(dim=-1).mean() - likelihood


@torch.no_grad()
def read_captions(model: AnyModel, dataset: InstructionDataset, collator: InstructionCollator) -> Captioned:
    """Features and supervised words of the samples with one image, evenly taken from the whole set."""
    features, captions = [], []
    a_image = 4 * model.config.image_seq_length * model.model.multi_modal_projector.linear_1.in_features
    images = max(min(IMAGES, FEATURE_BYTES // a_image), 1)
    taken = range(0, len(dataset), math.ceil(len(dataset) / images))
    starts = range(0, len(taken), READ_AT_ONCE)
    for start in tqdm(starts, desc="projector: captions", unit="batch", disable=not is_main_process()):
        samples = [dataset[index] for index in taken[start : start + READ_AT_ONCE]]
        samples = [sample for sample in samples if len(sample["images"]) == 1]
        if samples:
            pixels = collator(samples)["pixel_values"].to(model.device)
            features.append(read_features(model, pixels).float().unflatten(0, (len(samples), -1)))
            captions += [set(sample["labels"]) - {IGNORED} for sample in samples]
    words, weights = rare_words(captions)
    return Captioned(
        torch.cat(features) if features else torch.empty(0), words.to(model.device), weights.to(model.device)
    )


def rare_words(captions: list[set[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids (v,) of the pieces that are neither too rare to learn nor too common to tell images apart, and their
    weights in each caption (n, v), in proportion to log(n / captions with the piece)."""
    counts = Counter(piece for caption in captions for piece in caption)
    rarity = {piece: math.log(len(captions) / count) for piece, count in counts.items() if count >= SEEN}
    words = sorted(piece for piece, nats in rarity.items() if nats > RARITY)
    column = {piece: at for at, piece in enumerate(words)}
    weights = torch.zeros(len(captions), len(words))
    for row, caption in enumerate(captions):
        for piece in caption & column.keys():
            weights[row, column[piece]] = rarity[piece]
    return torch.tensor(words, dtype=torch.long), weights / weights.sum(dim=1, keepdim=True).clamp_min(1e-6)
