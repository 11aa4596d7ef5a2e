"""Image-text pairs to batches.

Reader -> rows -> CaptionSample -> PairCollator -> {pixel_values, web_ids, ..., labels, keys, cursor}
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import os
import random
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.utils.data import IterableDataset, get_worker_info

from vision_tower.common.hashes import value_hash
from vision_tower.data.augmentation import TrainingTransform, enough_pixels
from vision_tower.data.images import BadImage, decode_image
from vision_tower.data.readers import Cursor, Reader
from vision_tower.data.recipe import IMAGE_ENDINGS, PairsRecipe, SourceRecipe
from vision_tower.data.shards import BadShard, Row, find_shards, read_shard
from vision_tower.text.text_streams import TARGET
from vision_tower.text.tokenizer import ClipsTokenizer


@dataclasses.dataclass(frozen=True)
class CaptionSample:
    """One pair: uint8 pixels (3, h, w), its captions, shard and key, and where its reader goes on after it.

    `texts` holds the word pieces that the objective reads, by stream (see `vision_tower.text.text_streams`).
    """

    pixels: torch.Tensor
    web: str
    full: str
    texts: dict[str, list[int]]
    key: str
    cursor: Cursor


class BadSample(ValueError):
    """A row that is no pair. The message is one of a few words, to be counted."""


def read_captions(row: Row, source: SourceRecipe, rng: random.Random) -> tuple[str, str]:
    """(web caption, synthetic caption) of a row, one at random where there are several, empty where it is null.

    Raises BadSample on malformed json, on a missing field and on one that is no text.
    """
    fields = read_fields(row)
    web, full = (_one_of(fields, name, rng) for name in (source.web_caption, source.synthetic_caption))
    return web, full


def read_fields(row: Row) -> dict[str, Any]:
    """Columns or members of a row, and the keys of its json. Raises BadSample on malformed json."""
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
    if isinstance(text, bytes):  # a member of its own
        text = text.decode("utf-8", errors="replace")
    if text and not isinstance(text, str):  # a number, or an image's struct: another column is meant
        raise BadSample(f"'{name}' is no text")
    return (text or "").strip()


def read_image(row: Row, source: SourceRecipe) -> bytes:
    """The encoded image: bytes, or the bytes of a {bytes, path} struct. Raises BadSample where there is none."""
    for name in (source.image, *IMAGE_ENDINGS):
        given = row.fields.get(name)
        content = given.get("bytes") if isinstance(given, dict) else given
        if isinstance(content, bytes):
            return content
    raise BadSample("no image")


def read_texts(recipe: PairsRecipe, most: int) -> list[str]:
    """Captions of the first `most` samples, an equal number from each source, to train a vocabulary on.

    What cannot be read is left to the stream, which counts it.
    """
    texts: list[str] = []
    for source in recipe.sources:
        rng = random.Random(0)
        rows = _readable_rows(find_shards(source.shards), source.text_names)
        for row in itertools.islice(rows, max(1, most // len(recipe.sources))):
            with contextlib.suppress(BadSample):
                texts += read_captions(row, source, rng)
    return texts


def _readable_rows(shards: list[str], names: frozenset[str]) -> Iterator[Row]:
    for shard in shards:
        try:
            yield from read_shard(shard, names, lambda _: True)
        except BadShard as error:
            print(f"{shard}: {error.cause} ({error}); its captions are not in the vocabulary", file=sys.stderr)


class PairStream(IterableDataset[CaptionSample]):
    """Endless pairs; see `vision_tower.data.readers` for who reads what, and how an interrupted run goes on.

    Unreadable samples and shards are skipped and counted by cause; above `max_bad_fraction` the run stops. What is
    drawn for a
    sample (caption, sentence, augmentation) follows from the seed, its pass and its key alone.
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
        self.cursors: dict[int, Cursor] = {}
        self.turn = 0

    def fingerprint(self) -> str:
        """Changes with the names and the order of the shards."""
        return value_hash(self.shards)[:16]

    def go_on_from(self, cursors: dict[int, Cursor], turn: int) -> None:
        """Start each reader at its cursor, and the loader with its reader number `turn`.

        A loader takes batches from its processes in turn, always from the first one first.
        """
        self.cursors, self.turn = cursors, turn

    def __iter__(self) -> Iterator[CaptionSample]:
        worker = get_worker_info()
        workers, number = (worker.num_workers, worker.id) if worker else (1, 0)
        number = self.rank * workers + (number + self.turn) % workers
        reader = Reader(self.recipe, self.shards, reader=number, readers=self.world * workers, seed=self.seed)
        if number in self.cursors:
            reader.go_on_from(self.cursors[number])
        transform = TrainingTransform(self.recipe.augmentation, self.size)
        least = enough_pixels(self.recipe.augmentation, self.size)
        for source, row in reader.rows():
            rng = random.Random(f"{self.seed}/{source.place.epoch}/{os.path.basename(row.shard)}/{row.key}")
            try:
                pixels, web, full = self._decode(row, source.source, transform, least, rng)
                texts = self._draw(web, full, rng)
            except (BadSample, BadImage) as error:
                source.skip("corrupt image" if isinstance(error, BadImage) else str(error), row)
                continue
            key = f"{row.shard}: {row.key}"
            yield CaptionSample(pixels, web, full, texts, key, reader.cursor())

    def _draw(self, web: str, full: str, rng: random.Random) -> dict[str, list[int]]:
        """Empty texts are all alike: to the contrastive loss each would be a false negative of the others."""
        texts = self.draw_texts(web, full, rng)
        if empty := [stream for stream, pieces in texts.items() if not pieces]:
            raise BadSample("no web caption" if "web" in empty else "no caption")
        return texts

    @staticmethod
    def _decode(
        row: Row, source: SourceRecipe, transform: TrainingTransform, least: int, rng: random.Random
    ) -> tuple[torch.Tensor, str, str]:
        web, full = read_captions(row, source, rng)
        full = full or web  # an empty synthetic caption: the web caption stands in
        content = read_image(row, source)
        if not full:
            raise BadSample("no caption")
        image = decode_image(content, least)
        with torch.random.fork_rng(devices=[]):  # augmentation draws from torch's generator
            torch.default_generator.manual_seed(rng.getrandbits(63))
            return transform(image), web, full


@dataclasses.dataclass(frozen=True, kw_only=True)
class PairCollator:
    """Samples -> the model's inputs, the captioner's labels, and what the trainer keeps account of.

    Args:
        trim: whether texts are only as long as the batch's longest, which needs a model that masks padding.
    """

    tokenizer: ClipsTokenizer
    text_length: int
    target_length: int
    trim: bool = False

    def __call__(self, samples: list[CaptionSample]) -> dict[str, Any]:
        """`pixel_values` (b, 3, h, w) uint8, ids (b, l) of each stream, `labels` (b, q), `keys` (b strings), `cursor`.

        Images stay bytes, a quarter of fp32, until they are on the device: see `PretrainTrainer._prepare_inputs`.
        Streams are what the objective reads, of `web_ids`, `sub_ids`, `mix_ids`; labels are there with a captioner. The
        cursor is where the reader of this batch goes on after it.
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
        """Of all streams alike, for they go through the tower together."""
        texts = (pieces for sample in samples for name, pieces in sample.texts.items() if name != TARGET)
        return min(max(map(len, texts)) + 3, self.text_length)  # [bos], [eos] and [CLS]
