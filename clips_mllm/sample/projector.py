"""Write the projector that stage 1 of the sample world starts from: standardized, then fitted to the captions' words.

python -m clips_mllm.sample.projector --config configs/mllm/quickstart_align.yaml

The sample world has too few captions for a small LLM to teach the projector which words its image tokens should
resemble. A caption does not say which patch shows which word. That is translation without alignments, solved by IBM's
Model 1 (Brown et al. 1993): each word of a caption comes from some position of the image,
p(word | image) = mean over patches of p(word | patch). Here p(word | patch) falls with the squared distance between
projected patch and word embedding, over the rarer pieces of all captions; a piece is weighted by its rarity.
Measured in docs/log.md.
"""

from __future__ import annotations

import copy
import dataclasses
import logging
import math
import sys
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn
from tqdm import tqdm

from clips_mllm.prompts.conversation import IGNORED
from clips_mllm.training.projector import read_features, standardize
from clips_mllm.training.recipe import TrainRecipe
from vision_tower.common.errors import UserError, run_command
from vision_tower.common.recipe import check_ranges, parse_recipe

if TYPE_CHECKING:
    from clips_mllm.data.collator import InstructionCollator
    from clips_mllm.data.dataset import InstructionDataset
    from clips_mllm.model.tiles import AnyModel

logger = logging.getLogger(__name__)

MAX_IMAGES = 16_384
MAX_FEATURE_BYTES = 4 * 2**30  # features stay in memory: with a large tower, fewer images
READ_BATCH = 128
BATCH = 32
LEARNING_RATE, WEIGHT_DECAY = 2e-3, 0.05
MIN_CAPTIONS = 3  # with a piece, for it to count as a word
MIN_RARITY = 1.0  # log(captions / captions with the piece), in nats
SHARPNESS = 10.0  # of p(word | patch), for distances in units of the mean squared length of a word embedding
PULL = 0.2  # weight of the distance to the nearest word, in the same units


@dataclasses.dataclass(frozen=True, kw_only=True)
class WordProjectorRecipe(TrainRecipe):
    """Write the file of `model.projector` for a recipe of stage 1.

    Args:
        output_dir: of stage 1; not used.
        model: tower and LLM; `projector` is the file to write.
        data: captions.
        stage: not used.
        training: seed, precision and DeepSpeed, which decide the dtype of the weights.
        evaluation: not used.
        projector_init_steps: optimizer steps of 32 images.
    """

    projector_init_steps: int = 3000

    def check(self) -> None:
        """Raise UserError unless this is a recipe of stage 1 without tiles that names the file."""
        super().check()
        if self.model.projector is None:
            raise UserError("names the file to write", key="model.projector", remedy="set it in the recipe of stage 1")
        if self.model.tiles is not None:
            raise UserError("not supported here", key="model.tiles", value=self.model.tiles, remedy="leave it out")
        check_ranges(self, projector_init_steps="[1, inf)")


def main(argv: list[str]) -> None:
    """Build the MLLM as stage 1 does, fit its projector, save it."""
    recipe = parse_recipe(WordProjectorRecipe, argv, command="sample.projector")
    recipe.check()

    from safetensors.torch import save_file
    from transformers import set_seed

    from clips_mllm.data.dataset import Examples
    from clips_mllm.training.setup import first_images, load_or_build, open_data, prepare, with_precision

    recipe = with_precision(recipe)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    set_seed(recipe.training.seed)
    examples = Examples(recipe.data)
    model, processor = load_or_build(recipe)
    prepare(model, processor, recipe, device)
    dataset, collator = open_data(recipe, model, processor, examples)
    model.to(device)
    standardize(model, **first_images(dataset, collator))
    initialize_by_words(model, dataset, collator, recipe.projector_init_steps)
    assert recipe.model.projector is not None, "WordProjectorRecipe.check has run"
    file = Path(recipe.model.projector)
    file.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: value.cpu() for name, value in model.model.multi_modal_projector.state_dict().items()}, file)
    logger.info("projector in %s", file)


@dataclasses.dataclass(frozen=True)
class Captioned:
    """Images with the rare words of their captions.

    Args:
        features: (n, patches, w), input of the projector.
        words: (v,), ids of the rare pieces.
        weights: (n, v), weight of each piece in a caption; a row sums to 1, or to 0 if its caption has no rare piece.
    """

    features: torch.Tensor
    words: torch.Tensor
    weights: torch.Tensor


def initialize_by_words(
    model: AnyModel, dataset: InstructionDataset, collator: InstructionCollator, steps: int
) -> None:
    """Fit the projector to the words of the captions; leave it as it is if no word is rare enough."""
    captioned = read_captions(model, dataset, collator)
    if not len(captioned.words):
        return
    embeddings = model.get_input_embeddings().weight[captioned.words].detach().float()
    projector = model.model.multi_modal_projector
    trained = copy.deepcopy(projector).float()  # fp32 master weights for a model in 16 bits
    fit_to_words(trained, captioned, embeddings, steps)
    projector.load_state_dict(trained.state_dict())


def fit_to_words(projector: nn.Module, captioned: Captioned, embeddings: torch.Tensor, steps: int) -> None:
    """Minimize `word_loss` with AdamW and a cosine schedule."""
    draws = torch.Generator().manual_seed(0)
    optimizer = torch.optim.AdamW(projector.parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    projector.requires_grad_(True)
    for _ in tqdm(range(steps), desc="fit projector to words", unit="step", disable=None):
        chosen = torch.randint(len(captioned.features), (BATCH,), generator=draws).to(captioned.features.device)
        loss = word_loss(projector(captioned.features[chosen]), embeddings, captioned.weights[chosen])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()


def word_loss(patches: torch.Tensor, embeddings: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Negative log-likelihood of the captions' rare words, plus the distance to the nearest word.

    Args:
        patches: (b, p, d), projected patches.
        embeddings: (v, d), embeddings of the words.
        weights: (b, v), weights of the words in each caption.
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
    """Read features and supervised words of the samples with one image, evenly spaced over the data set."""
    features, captions = [], []
    image_bytes = 4 * model.config.image_seq_length * model.model.multi_modal_projector.linear_1.in_features
    images = max(min(MAX_IMAGES, MAX_FEATURE_BYTES // image_bytes), 1)
    taken = range(0, len(dataset), math.ceil(len(dataset) / images))
    starts = range(0, len(taken), READ_BATCH)
    for start in tqdm(starts, desc="read captions", unit="batch", disable=None):
        samples = [dataset[index] for index in taken[start : start + READ_BATCH]]
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
    """Return ids (v,) of the pieces neither too rare to learn nor too common to distinguish images, and their weights
    in each caption (n, v), proportional to log(n / captions with the piece)."""
    counts = Counter(piece for caption in captions for piece in caption)
    rarity = {piece: math.log(len(captions) / count) for piece, count in counts.items() if count >= MIN_CAPTIONS}
    words = sorted(piece for piece, nats in rarity.items() if nats > MIN_RARITY)
    column = {piece: at for at, piece in enumerate(words)}
    weights = torch.zeros(len(captions), len(words))
    for row, caption in enumerate(captions):
        for piece in caption & column.keys():
            weights[row, column[piece]] = rarity[piece]
    return torch.tensor(words, dtype=torch.long), weights / weights.sum(dim=1, keepdim=True).clamp_min(1e-6)


if __name__ == "__main__":
    sys.exit(run_command(main))
