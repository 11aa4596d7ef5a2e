"""Batches of image-text pairs.

Reader -> rows -> CaptionSample -> PairCollator -> {pixel_values, web_ids, ..., labels, keys, cursor}
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import logging
import os
import random
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.utils.data import IterableDataset, get_worker_info

from vision_tower.common.hashes import value_hash
from vision_tower.data.augmentation import TrainingTransform, min_decoded_size
from vision_tower.data.images import BadImage, decode_image
from vision_tower.data.readers import Reader, ReaderPosition
from vision_tower.data.recipe import IMAGE_ENDINGS, PairsRecipe, SourceRecipe
from vision_tower.data.shards import BadShard, Row, find_shards, read_shard
from vision_tower.text.text_streams import TARGET
from vision_tower.text.tokenizer import ClipsTokenizer

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class CaptionSample:
    """One pair: uint8 pixels (3, h, w), captions, shard and key, and the reader's position after it.

    `texts` has the word pieces that the objective reads, by stream (see `vision_tower.text.text_streams`).
    """

    pixels: torch.Tensor
    web: str
    full: str
    texts: dict[str, list[int]]
    key: str
    cursor: ReaderPosition


class BadSample(ValueError):
    """A row that is not a usable pair. The message is the cause; rows are counted by cause."""


def read_captions(row: Row, source: SourceRecipe, rng: random.Random) -> tuple[str, str]:
    """Return (web caption, synthetic caption) of a row; of a list a random one, "" for null.

    Raises:
        BadSample: malformed JSON, or a field that is missing or not text.
    """
    fields = read_fields(row)
    web, full = (_one_of(fields, name, rng) for name in (source.web_caption, source.synthetic_caption))
    return web, full


def read_fields(row: Row) -> dict[str, Any]:
    """Return the columns or members of a row and the keys of its JSON. Raises BadSample for malformed JSON."""
    try:
        fields = json.loads(row.fields["json"]) if "json" in row.fields else {}
    except ValueError as error:
        raise BadSample("malformed json") from error
    if not isinstance(fields, dict):
        raise BadSample("malformed json")
    return row.fields | fields


def _one_of(fields: dict[str, Any], name: str, rng: random.Random) -> str:
    if name not in fields:
        raise BadSample(f"no '{name}'")
    given = fields[name]
    text = rng.choice(given) if isinstance(given, list) and given else given
    if isinstance(text, bytes):  # a text file in the tar
        text = text.decode("utf-8", errors="replace")
    if text and not isinstance(text, str):  # the wrong column: numbers, or an image's struct
        raise BadSample(f"'{name}' is not text")
    return (text or "").strip()


def read_image(row: Row, source: SourceRecipe) -> bytes:
    """Return the encoded image: bytes, or the bytes of a {bytes, path} struct. Raises BadSample if there is none."""
    for name in (source.image, *IMAGE_ENDINGS):
        given = row.fields.get(name)
        content = given.get("bytes") if isinstance(given, dict) else given
        if isinstance(content, bytes):
            return content
    raise BadSample("no image")


def read_texts(recipe: PairsRecipe, max_samples: int) -> list[str]:
    """Return the captions of the first `max_samples` samples, equally many per source, to train a vocabulary on.

    Unreadable rows are skipped here; the stream counts them.
    """
    texts: list[str] = []
    for source in recipe.sources:
        rng = random.Random(0)
        rows = _readable_rows(find_shards(source.shards), source.text_names)
        for row in itertools.islice(rows, max(1, max_samples // len(recipe.sources))):
            with contextlib.suppress(BadSample):
                texts += read_captions(row, source, rng)
    return texts


def _readable_rows(shards: list[str], names: frozenset[str]) -> Iterator[Row]:
    for shard in shards:
        try:
            yield from read_shard(shard, names, lambda _: True)
        except BadShard as error:
            logger.warning("%s: %s (%s); its captions are not in the vocabulary", shard, error.cause, error)


class PairStream(IterableDataset[CaptionSample]):
    """Endless pairs; `vision_tower.data.readers` assigns rows to processes and resumes interrupted runs.

    Unreadable samples and shards are skipped and counted by cause; above `max_bad_fraction` the run stops. The random
    choices for a sample (caption, sentence, augmentation) depend only on the seed, the epoch and the sample's key.
    """

    def __init__(
        self,
        recipe: PairsRecipe,
        size: int,
        seed: int,
        rank: int,
        world: int,
        draw_texts: Callable[[str, str, random.Random], dict[str, list[int]]],
    ) -> None:
        self.recipe = recipe
        self.draw_texts = draw_texts
        self.shards = [find_shards(source.shards) for source in recipe.sources]
        self.size = size
        self.seed = seed
        self.rank = rank
        self.world = world
        self.cursors: dict[int, ReaderPosition] = {}
        self.turn = 0

    def fingerprint(self) -> str:
        """Return a hash of the names and the order of the shards."""
        return value_hash(self.shards)[:16]

    def resume_from(self, cursors: dict[int, ReaderPosition], turn: int) -> None:
        """Continue each reader at its position, and the loader with its process number `turn`.

        A DataLoader takes batches from its processes in turn and starts with the first one.
        """
        self.cursors, self.turn = cursors, turn

    def __iter__(self) -> Iterator[CaptionSample]:
        worker = get_worker_info()
        workers, number = (worker.num_workers, worker.id) if worker else (1, 0)
        number = self.rank * workers + (number + self.turn) % workers
        reader = Reader(self.recipe, self.shards, reader=number, readers=self.world * workers, seed=self.seed)
        if number in self.cursors:
            reader.resume_from(self.cursors[number])
        transform = TrainingTransform(self.recipe.augmentation, self.size)
        min_size = min_decoded_size(self.recipe.augmentation, self.size)
        for source, row in reader.rows():
            rng = random.Random(f"{self.seed}/{source.position.epoch}/{os.path.basename(row.shard)}/{row.key}")
            try:
                pixels, web, full = self._decode(row, source.source, transform, min_size, rng)
                texts = self._draw(web, full, rng)
            except (BadSample, BadImage) as error:
                source.skip("corrupt image" if isinstance(error, BadImage) else str(error), row)
                continue
            key = f"{row.shard}: {row.key}"
            yield CaptionSample(pixels, web, full, texts, key, reader.cursor())

    def _draw(self, web: str, full: str, rng: random.Random) -> dict[str, list[int]]:
        texts = self.draw_texts(web, full, rng)
        # Identical texts, as empty ones are, would be false negatives of each other in the contrastive loss.
        if empty := [stream for stream, pieces in texts.items() if not pieces]:
            raise BadSample("no web caption" if "web" in empty else "no caption")
        return texts

    @staticmethod
    def _decode(
        row: Row, source: SourceRecipe, transform: TrainingTransform, min_size: int, rng: random.Random
    ) -> tuple[torch.Tensor, str, str]:
        web, full = read_captions(row, source, rng)
        full = full or web  # the web caption replaces an empty synthetic one
        content = read_image(row, source)
        if not full:
            raise BadSample("no caption")
        image = decode_image(content, min_size)
        with torch.random.fork_rng(devices=[]):  # augmentation draws from torch's generator
            torch.default_generator.manual_seed(rng.getrandbits(63))
            return transform(image), web, full


@dataclasses.dataclass(frozen=True, kw_only=True)
class PairCollator:
    """Samples -> the model's inputs, the captioner's labels, and the keys and positions that the trainer records.

    Args:
        trim: pad texts only to the longest of the batch, which needs a model that masks padding.
    """

    tokenizer: ClipsTokenizer
    text_length: int
    target_length: int
    trim: bool = False

    def __call__(self, samples: list[CaptionSample]) -> dict[str, Any]:
        """Return `pixel_values` (b, 3, h, w) uint8, ids (b, l) per stream, `labels` (b, q), `keys` (b) and `cursor`.

        Images stay uint8, a quarter of fp32, until they are on the device: see `PretrainTrainer._prepare_inputs`.
        Streams are those that the objective reads, of `web_ids`, `sub_ids`, `mix_ids`; labels exist with a captioner.
        `cursor` is the position of this batch's reader after it.
        """
        batch: dict[str, Any] = {
            "keys": [sample.key for sample in samples],
            "cursor": samples[-1].cursor,
            "pixel_values": torch.stack([sample.pixels for sample in samples]),
        }
        length = self._length(samples) if self.trim else self.text_length
        for name in samples[0].texts:
            pieces = [sample.texts[name] for sample in samples]
            if name == TARGET:
                batch["labels"] = self.tokenizer.target_layout(pieces, self.target_length)
            else:
                batch[f"{name}_ids"] = self.tokenizer.contrastive_layout(pieces, length)
        return batch

    def _length(self, samples: list[CaptionSample]) -> int:
        """Return one length for all streams, since they pass the tower together."""
        texts = (pieces for sample in samples for name, pieces in sample.texts.items() if name != TARGET)
        return min(max(map(len, texts)) + 3, self.text_length)  # [bos], [eos] and [CLS]
