"""Image-text pairs from WebDataset shards to batches.

tar files -> rows {image bytes, texts} -> CaptionSample -> PairCollator -> {pixel_values, web_ids, sub_ids, labels}
"""

from __future__ import annotations

import collections
import dataclasses
import glob
import json
import random
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import IterableDataset, get_worker_info

from vision_tower.captions import draw_sentence
from vision_tower.errors import UserError
from vision_tower.images import BadImage, decode_image, normalize, training_transform
from vision_tower.pretrain_recipe import PairsRecipe
from vision_tower.tokenizer import ClipsTokenizer

IMAGE_ENDINGS = ("png", "jpg", "jpeg", "webp")


@dataclasses.dataclass(frozen=True)
class CaptionSample:
    """One pair: uint8 pixels (3, h, w) and its three texts."""

    pixels: torch.Tensor
    web: str
    sub: str
    full: str


def find_shards(pattern: str) -> list[str]:
    """The tars of a pattern, sorted. Raises UserError where there are none, or one is no tar or empty."""
    files = sorted(glob.glob(pattern))
    if not files:
        raise UserError(f"{pattern}: no shard matches data.shards; build the sample world or mend the pattern")
    for file in files:
        try:
            with tarfile.open(file) as tar:
                if tar.next() is None:
                    raise UserError(f"{file}: an empty shard; remove it or write it again")
        except tarfile.TarError as error:
            raise UserError(f"{file}: not a tar file ({error}); remove it or fetch it again") from error
    return files


def read_texts(recipe: PairsRecipe, most: int) -> list[str]:
    """Captions of the first `most` samples, to train a vocabulary on."""
    texts: list[str] = []
    for file in find_shards(recipe.shards):
        with tarfile.open(file) as tar:
            for member in tar:
                if member.name.endswith(".json"):
                    row = json.load(tar.extractfile(member))  # type: ignore[arg-type]
                    texts += [str(row.get(recipe.web_caption, "")), str(row.get(recipe.synthetic_caption, ""))]
                if len(texts) >= 2 * most:
                    return texts
    return texts


class PairStream(IterableDataset[CaptionSample]):
    """Endless pairs, reshuffled every epoch, split over ranks and loader processes by shard.

    Unreadable samples are skipped and counted by cause; above `most_bad` (after 1,000 samples) the run stops.
    """

    def __init__(self, recipe: PairsRecipe, size: int, seed: int, rank: int, world: int) -> None:
        self.recipe = recipe
        self.files = find_shards(recipe.shards)
        self.size = size
        self.seed = seed
        self.rank = rank
        self.world = world
        self.bad: collections.Counter[str] = collections.Counter()
        self.seen = 0

    def __iter__(self) -> Iterator[CaptionSample]:
        worker = get_worker_info()
        workers, number = (worker.num_workers, worker.id) if worker else (1, 0)
        part, parts = self.rank * workers + number, self.world * workers
        if len(self.files) < parts:
            raise UserError(
                f"{self.recipe.shards}: {len(self.files)} shards for {parts} readers (ranks x training.workers); "
                "write smaller shards or use fewer workers"
            )
        rng = random.Random(f"{self.seed}/{part}/{parts}")
        torch.manual_seed(rng.getrandbits(63))  # augmentation draws from torch's generator
        transform: Any = training_transform(self.recipe.augmentation, self.size)
        files = self.files[part::parts]
        while True:
            yield from self._shuffled(self._epoch(files, transform, rng), rng)

    def _shuffled(self, samples: Iterator[CaptionSample], rng: random.Random) -> Iterator[CaptionSample]:
        buffer: list[CaptionSample] = []
        for sample in samples:
            if len(buffer) < self.recipe.shuffle_buffer:
                buffer.append(sample)
                continue
            place = rng.randrange(len(buffer))
            buffer[place], sample = sample, buffer[place]
            yield sample
        rng.shuffle(buffer)
        yield from buffer

    def _epoch(self, files: list[str], transform: Any, rng: random.Random) -> Iterator[CaptionSample]:
        found = 0
        for file in rng.sample(files, len(files)):
            for key, parts in _groups(file):
                sample = self._sample(file, key, parts, transform, rng)
                if sample is not None:
                    found += 1
                    yield sample
        if not found:
            raise UserError(f"{self.recipe.shards}: no readable sample in {len(files)} shards ({dict(self.bad)})")

    def _sample(
        self, file: str, key: str, parts: dict[str, bytes], transform: Any, rng: random.Random
    ) -> CaptionSample | None:
        self.seen += 1
        try:
            row = json.loads(parts["json"])
            web, full = str(row[self.recipe.web_caption]), str(row[self.recipe.synthetic_caption]).strip()
            picture = decode_image(next(parts[ending] for ending in IMAGE_ENDINGS if ending in parts))
        except BadImage:
            self._skip("corrupt image", file, key)
            return None
        except KeyError as error:
            self._skip(f"no {error}", file, key)
            return None
        except json.JSONDecodeError:
            self._skip("malformed json", file, key)
            return None
        except StopIteration:
            self._skip("no image", file, key)
            return None
        full = full or web  # an empty synthetic caption: the web caption stands in
        return CaptionSample(transform(picture), web, draw_sentence(full, rng), full)

    def _skip(self, cause: str, file: str, key: str) -> None:
        if not self.bad[cause]:
            print(f"skipped: {file}: {key}: {cause} (further ones are counted)", file=sys.stderr, flush=True)
        self.bad[cause] += 1
        bad = self.bad.total()
        if self.seen >= 1000 and bad > self.recipe.most_bad * self.seen:
            raise UserError(
                f"{file}: {bad} of {self.seen} samples are unreadable ({dict(self.bad)}), more than data.most_bad="
                f"{self.recipe.most_bad}; mend the shards or raise the limit"
            )


def _groups(file: str) -> Iterator[tuple[str, dict[str, bytes]]]:
    """Consecutive members of a tar that share the name up to the first dot of its last part."""
    key: str = ""
    parts: dict[str, bytes] = {}
    try:
        with tarfile.open(file) as tar:
            for member in tar:
                if not member.isfile():
                    continue
                path = Path(member.name)
                stem, _, ending = path.name.partition(".")
                here = str(path.parent / stem)
                if here != key and parts:
                    yield key, parts
                    parts = {}
                key = here
                stream = tar.extractfile(member)
                assert stream is not None
                parts[ending.lower()] = stream.read()
    except tarfile.TarError as error:
        raise UserError(f"{file}: broken after '{key}' ({error}); fetch the shard again or remove it") from error
    if parts:
        yield key, parts


@dataclasses.dataclass(frozen=True, kw_only=True)
class PairCollator:
    """Samples -> the model's inputs and the captioner's labels."""

    tokenizer: ClipsTokenizer
    text_length: int
    target_length: int

    def __call__(self, samples: list[CaptionSample]) -> dict[str, torch.Tensor]:
        """`pixel_values` (b, 3, h, w) fp32, `web_ids` and `sub_ids` (b, l), `labels` (b, q)."""
        return {
            "pixel_values": normalize(torch.stack([sample.pixels for sample in samples])),
            "web_ids": self.tokenizer.contrastive([sample.web for sample in samples], self.text_length),
            "sub_ids": self.tokenizer.contrastive([sample.sub for sample in samples], self.text_length),
            "labels": self.tokenizer.targets([sample.full for sample in samples], self.target_length),
        }
