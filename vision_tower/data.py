"""Image-text pairs from WebDataset shards to batches.

tar files -> rows {image bytes, texts} -> CaptionSample -> PairCollator -> {pixel_values, web_ids, ..., labels}
"""

from __future__ import annotations

import collections
import dataclasses
import glob
import json
import random
import sys
import tarfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import IterableDataset, get_worker_info

from vision_tower.errors import UserError
from vision_tower.images import BadImage, decode_image, normalize, training_transform
from vision_tower.pretrain_recipe import PairsRecipe
from vision_tower.texts import TARGET
from vision_tower.tokenizer import ClipsTokenizer

IMAGE_ENDINGS = ("png", "jpg", "jpeg", "webp")


@dataclasses.dataclass(frozen=True)
class CaptionSample:
    """One pair: uint8 pixels (3, h, w), its captions, and where it came from (shard and key).

    `texts` holds the word pieces that the objective reads, by stream (see `vision_tower.texts`).
    """

    pixels: torch.Tensor
    web: str
    full: str
    texts: dict[str, list[int]]
    key: str


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
        except (tarfile.TarError, OSError) as error:
            cause = str(error).splitlines()[0].rstrip(":")
            raise UserError(f"{file}: not a readable tar file ({cause}); remove it or fetch it again") from error
    return files


def read_texts(recipe: PairsRecipe, most: int) -> list[str]:
    """Captions of the first `most` samples, to train a vocabulary on."""
    texts: list[str] = []
    rng = random.Random(0)
    for file in find_shards(recipe.shards):
        for _, content in _members(file, ".json"):
            try:
                texts += read_captions(content, recipe, rng)
            except (ValueError, KeyError):  # the stream skips and counts it
                continue
            if len(texts) >= 2 * most:
                return texts
    return texts


def read_captions(content: bytes, recipe: PairsRecipe, rng: random.Random) -> tuple[str, str]:
    """(web caption, synthetic caption) of a row, one at random where there are several, empty where it is null.

    Raises ValueError on malformed JSON, KeyError on a missing caption.
    """
    row = json.loads(content)
    if not isinstance(row, dict):
        raise ValueError("not a JSON object")
    web, full = (_one_of(row[key], rng) for key in (recipe.web_caption, recipe.synthetic_caption))
    return web, full


def _one_of(given: Any, rng: random.Random) -> str:
    text = rng.choice(given) if isinstance(given, list) and given else given
    return str(text or "").strip()


@dataclasses.dataclass(frozen=True)
class Row:
    """A sample as it lies in its shard: encoded parts by ending."""

    file: str
    key: str
    parts: dict[str, bytes]


class PairStream(IterableDataset[CaptionSample]):
    """Endless pairs, reshuffled every epoch, split over ranks and loader processes by shard.

    Unreadable samples are skipped and counted by cause; above `most_bad` the run stops (looked at from the 1,000th
    sample on, and at the end of every pass).
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
        transform: Any = training_transform(self.recipe.augmentation, self.size)
        files = self.files[part::parts]
        while True:
            yield from self._epoch(files, transform, rng)

    def _epoch(self, files: list[str], transform: Any, rng: random.Random) -> Iterator[CaptionSample]:
        found = 0
        for row in self._shuffled(_rows(rng.sample(files, len(files))), rng):
            sample = self._sample(row, transform, rng)
            if sample is not None:
                found += 1
                yield sample
        if not found:
            raise UserError(f"{self.recipe.shards}: no readable sample in {len(files)} shards ({dict(self.bad)})")
        self._check_share()

    def _shuffled(self, rows: Iterator[Row], rng: random.Random) -> Iterator[Row]:
        """The buffer holds rows as they lie in the shard, since decoded pictures would take many times the memory."""
        buffer: list[Row] = []
        for row in rows:
            if len(buffer) < self.recipe.shuffle_buffer:
                buffer.append(row)
                continue
            if buffer:
                place = rng.randrange(len(buffer))
                buffer[place], row = row, buffer[place]
            yield row
        rng.shuffle(buffer)
        yield from buffer

    def _sample(self, row: Row, transform: Any, rng: random.Random) -> CaptionSample | None:
        self.seen += 1
        parts = row.parts
        try:
            web, full = read_captions(parts["json"], self.recipe, rng)
            picture = decode_image(next(parts[ending] for ending in IMAGE_ENDINGS if ending in parts))
        except BadImage:
            self._skip("corrupt image", row)
            return None
        except KeyError as error:
            self._skip(f"no {error}", row)
            return None
        except ValueError:
            self._skip("malformed json", row)
            return None
        except StopIteration:
            self._skip("no image", row)
            return None
        full = full or web  # an empty synthetic caption: the web caption stands in
        if not full:
            self._skip("no caption", row)
            return None
        with torch.random.fork_rng(devices=[]):  # augmentation draws from torch's generator; a resumed run must too
            torch.default_generator.manual_seed(rng.getrandbits(63))
            pixels = transform(picture)
        return CaptionSample(pixels, web, full, self.draw_texts(web, full, rng), f"{row.file}: {row.key}")

    def _skip(self, cause: str, row: Row) -> None:
        if not self.bad[cause]:
            print(f"skipped: {row.file}: {row.key}: {cause} (further ones are counted)", file=sys.stderr, flush=True)
        self.bad[cause] += 1
        if self.seen >= 1000:
            self._check_share()

    def _check_share(self) -> None:
        bad = self.bad.total()
        if bad > self.recipe.most_bad * self.seen:
            raise UserError(
                f"{self.recipe.shards}: {bad} of {self.seen} samples are unreadable ({dict(self.bad)}), more than "
                f"data.most_bad={self.recipe.most_bad}; mend the shards or raise the limit"
            )


def _rows(files: list[str]) -> Iterator[Row]:
    """Consecutive members of a tar that share the name up to the first dot of its last part."""
    for file in files:
        row = Row(file, "", {})
        for name, content in _members(file):
            path = Path(name)
            stem, _, ending = path.name.partition(".")
            key = str(path.parent / stem)
            if key != row.key:
                if row.parts:
                    yield row
                row = Row(file, key, {})
            row.parts[ending.lower()] = content
        if row.parts:
            yield row


def _members(file: str, ending: str = "") -> Iterator[tuple[str, bytes]]:
    """Name and content of a tar's files whose names end in `ending`. Raises UserError where the tar is damaged."""
    name = ""
    try:
        with tarfile.open(file) as tar:
            for member in tar:
                name = member.name
                if member.isfile() and name.endswith(ending):
                    stream = tar.extractfile(member)
                    assert stream is not None
                    yield name, stream.read()
            # tarfile takes a damaged header for the end of the archive: a real end is zeros, or nothing.
            assert tar.fileobj is not None
            tar.fileobj.seek(tar.offset)
            if tar.fileobj.read(tarfile.BLOCKSIZE).strip(b"\0"):
                raise tarfile.ReadError("damaged header")
    except (tarfile.TarError, EOFError, zlib.error) as error:
        raise UserError(f"{file}: broken after '{name}' ({error}); fetch the shard again or remove it") from error


@dataclasses.dataclass(frozen=True, kw_only=True)
class PairCollator:
    """Samples -> the model's inputs and the captioner's labels."""

    tokenizer: ClipsTokenizer
    text_length: int
    target_length: int

    def __call__(self, samples: list[CaptionSample]) -> dict[str, Any]:
        """`pixel_values` (b, 3, h, w) fp32, ids (b, l) of each stream, `labels` (b, q), `keys` (b strings).

        Streams are what the objective reads, of `web_ids`, `sub_ids`, `mix_ids`; labels are there with a captioner.
        """
        batch: dict[str, Any] = {
            "keys": [sample.key for sample in samples],
            "pixel_values": normalize(torch.stack([sample.pixels for sample in samples])),
        }
        for name in samples[0].texts:
            pieces = [sample.texts[name] for sample in samples]
            if name == TARGET:
                batch["labels"] = self.tokenizer.target_layout(pieces, self.target_length)
            else:
                batch[f"{name}_ids"] = self.tokenizer.contrastive_layout(pieces, self.text_length)
        return batch
