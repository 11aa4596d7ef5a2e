"""Assigns rows to readers (disjoint, shuffled) and records the positions to resume from.

A reader is a loader process of a rank. In each epoch the shards of a source are permuted, equally for all readers, and
the sequence is cut into as many equal parts as there are readers; a shard at a cut is split by rows. Rows are shuffled
in blocks. Shard order and cuts depend only on (seed, source, epoch), and the order within a block on its first row. A
`SourcePosition` of a few numbers is therefore enough for an exact resume, which reads one block again.
"""

from __future__ import annotations

import collections
import dataclasses
import itertools
import logging
import random
from collections.abc import Iterator
from typing import Any

from vision_tower.common.errors import UserError
from vision_tower.data.recipe import PairsRecipe, SourceRecipe
from vision_tower.data.shards import BadShard, Row, read_shard

logger = logging.getLogger(__name__)

MIN_SAMPLES = 1000  # samples before the fraction of unreadable ones is checked
SLOTS = 2**32


@dataclasses.dataclass(frozen=True)
class SourcePosition:
    """Position of a reader in one source.

    Args:
        epoch: completed passes.
        piece: index of the shard span in which the current block starts.
        row: index, within its shard, of the first row of the current block.
        taken: rows of the current block that were returned.
        seen: rows returned since the start of the run.
        bad: number of unreadable samples by cause.
        broken: cause by shard, of shards that failed when last read.
    """

    epoch: int = 0
    piece: int = 0
    row: int = 0
    taken: int = 0
    seen: int = 0
    bad: dict[str, int] = dataclasses.field(default_factory=dict)
    broken: dict[str, str] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class ReaderPosition:
    """Position of a reader: its index, the number of rows drawn, and its position in every source."""

    reader: int
    draws: int
    places: tuple[SourcePosition, ...]

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> ReaderPosition:
        """Rebuild a position from its `dataclasses.asdict`."""
        return cls(value["reader"], value["draws"], tuple(SourcePosition(**place) for place in value["places"]))


@dataclasses.dataclass(frozen=True)
class ShardSpan:
    """The rows of a shard whose slots are in [low, high); all rows for [0, SLOTS)."""

    shard: str
    low: int
    high: int

    def has(self, index: int) -> bool:
        """Return True if row `index` of the shard is in this span."""
        # Knuth's multiplicative hashing: multiples of the golden ratio spread any number of rows evenly over the slots,
        # so the number of rows need not be known.
        return self.low <= index * 2_654_435_769 % SLOTS < self.high


def cut(shards: list[str], part: int, parts: int) -> list[ShardSpan]:
    """Return part `part` of `parts` equal parts of the sequence of shards, in units of 1 / `parts` of a shard."""
    begin, end = part * len(shards), (part + 1) * len(shards)
    spans = []
    for number in range(begin // parts, (end - 1) // parts + 1):
        low, high = max(begin - number * parts, 0), min(end - number * parts, parts)
        spans.append(ShardSpan(shards[number], low * SLOTS // parts, high * SLOTS // parts))
    return spans


class SourceReader:
    """Endless rows of one source for one reader, with counts of unreadable samples and shards."""

    def __init__(
        self, source: SourceRecipe, shards: list[str], recipe: PairsRecipe, *, reader: int, readers: int, seed: str
    ) -> None:
        self.source = source
        self.shards = shards
        self.max_bad_fraction = recipe.max_bad_fraction
        self.block = max(recipe.shuffle_buffer, 1)
        self.reader, self.readers = reader, readers
        self.seed = seed
        self.resume_from(SourcePosition())

    def resume_from(self, position: SourcePosition) -> None:
        """Continue at `position`, with its counts."""
        self.position = position
        self.bad = collections.Counter(position.bad)
        self.broken = dict(position.broken)

    def rows(self) -> Iterator[Row]:
        """Yield rows from `self.position` on and advance it. Raises UserError if the source has too few usable rows."""
        empty = 0
        while True:
            begin = self.position
            yield from self._epoch()
            if begin.piece == begin.row == begin.taken == 0:  # a full pass, not the rest of one after a resume
                self._check_pass(begin)
                empty = 0 if self.position.seen > begin.seen else empty + 1
            if self.readers == 1:  # with several readers the part of one is too small a sample
                self._check_bad_fraction()
            if empty == self.readers:  # in this many epochs the reader had every part once
                remedy = "fix data.shards"
                raise UserError(
                    f"no sample in {self._describe_shards()}", file=self.source.shards, key="data.shards", remedy=remedy
                )
            self.position = dataclasses.replace(self.position, epoch=begin.epoch + 1, piece=0, row=0, taken=0)

    def _epoch(self) -> Iterator[Row]:
        """Yield the rest of an epoch. The current block shrinks while the next one fills: memory stays at one block."""
        epoch, taken = self.position.epoch, self.position.taken
        incoming = self._incoming(epoch)
        block = list(itertools.islice(incoming, self.block))
        while block:
            piece, first = block[0][0], block[0][1].index
            random.Random(f"{self.seed}/{epoch}/{self.reader}/{self.readers}/{piece}/{first}").shuffle(block)
            block.reverse()
            following: list[tuple[int, Row]] = []
            for done in range(1, len(block) + 1):
                _, row = block.pop()
                following += itertools.islice(incoming, 1)
                if done <= taken:
                    continue
                self.position = dataclasses.replace(
                    self.position, epoch=epoch, piece=piece, row=first, taken=done, seen=self.position.seen + 1
                )
                yield row
            block, taken = following, 0

    def _incoming(self, epoch: int) -> Iterator[tuple[int, Row]]:
        """Yield (index of the shard span, row) in stored order, from the start of the current block."""
        order = random.Random(f"{self.seed}/{epoch}").sample(self.shards, len(self.shards))
        start, first = self.position.piece, self.position.row
        # Taking the next part in each epoch brings every row to every reader, even if there is only one shard.
        for number, span in enumerate(cut(order, (self.reader + epoch) % self.readers, self.readers)):
            if number < start:
                continue
            begin = first if number == start else 0
            try:
                for row in read_shard(span.shard, self.source.names, span.has, begin):
                    yield number, row
            except BadShard as error:
                self._mark_broken(span.shard, error)
            else:
                self._mark_readable(span.shard)

    # --- counts of unreadable samples and shards

    def skip(self, cause: str, row: Row) -> None:
        """Count an unreadable sample; the first one of each cause is logged."""
        if not self.bad[cause]:
            logger.warning("skipped: %s: %s: %s (later ones are only counted)", row.shard, row.key, cause)
        self.bad[cause] += 1
        self.position = dataclasses.replace(self.position, bad=dict(self.bad))
        if self.position.seen >= MIN_SAMPLES:
            self._check_bad_fraction()

    def _mark_broken(self, shard: str, error: BadShard) -> None:
        if error.cause not in self.broken.values():
            logger.warning("skipped: %s: %s (%s) (later ones are only counted)", shard, error.cause, error)
        self.broken[shard] = error.cause
        self.position = dataclasses.replace(self.position, broken=dict(self.broken))
        if len(self.broken) > max(1, self.max_bad_fraction * len(self.shards)):
            raise UserError(
                f"cannot read {self._describe_shards()}, more than data.max_bad_fraction={self.max_bad_fraction}",
                file=self.source.shards,
                remedy="fix or remove them, or raise the limit",
            )

    def _mark_readable(self, shard: str) -> None:
        """Clear an earlier failure, so that a storage outage of an hour does not stop a run of weeks."""
        if self.broken.pop(shard, None) is not None:
            self.position = dataclasses.replace(self.position, broken=dict(self.broken))

    def _describe_shards(self) -> str:
        broken = dict(collections.Counter(self.broken.values()))
        return f"{len(self.broken)} of {len(self.shards)} shards ({broken})" if broken else f"{len(self.shards)} shards"

    def _check_pass(self, begin: SourcePosition) -> None:
        """Raise UserError if the full pass that started at `begin` had no readable sample."""
        rows, bad = self.position.seen - begin.seen, self.bad.total() - sum(begin.bad.values())
        if not rows and len(self.broken) == len(self.shards):
            raise UserError(f"cannot read {self._describe_shards()}", file=self.source.shards, remedy="fix data.shards")
        if rows and rows == bad:
            raise UserError(
                f"no readable sample in {len(self.shards)} shards ({self._describe_bad()})",
                file=self.source.shards,
                remedy="fix the shards, or the column names in the recipe",
            )

    def _describe_bad(self) -> str:
        ranked = sorted(self.bad.items(), key=lambda item: item[1], reverse=True)
        return ", ".join(f"{cause}: {count}" for cause, count in ranked)

    def _check_bad_fraction(self) -> None:
        bad, seen = self.bad.total(), self.position.seen
        if bad > self.max_bad_fraction * seen:
            raise UserError(
                f"{bad} of {seen} samples are unreadable ({self._describe_bad()}), more than "
                f"data.max_bad_fraction={self.max_bad_fraction}",
                file=self.source.shards,
                remedy="fix the shards or raise the limit",
            )


class Reader:
    """One of the readers of a run. The source of a row is drawn by weight, from the number of the draw."""

    def __init__(self, recipe: PairsRecipe, shards: list[list[str]], *, reader: int, readers: int, seed: int) -> None:
        self.sources = [
            SourceReader(source, found, recipe, reader=reader, readers=readers, seed=f"{seed}/{number}")
            for number, (source, found) in enumerate(zip(recipe.sources, shards, strict=True))
        ]
        self.weights = [source.weight for source in recipe.sources]
        self.seed = f"{seed}/draw/{reader}/{readers}"
        self.number = reader
        self.draws = 0

    def resume_from(self, cursor: ReaderPosition) -> None:
        """Continue with the row after `cursor`."""
        self.draws = cursor.draws
        for source, position in zip(self.sources, cursor.places, strict=True):
            source.resume_from(position)

    def cursor(self) -> ReaderPosition:
        """Return the position after the last row."""
        return ReaderPosition(self.number, self.draws, tuple(source.position for source in self.sources))

    def rows(self) -> Iterator[tuple[SourceReader, Row]]:
        """Yield rows without end, each with its source."""
        streams = [source.rows() for source in self.sources]
        while True:
            drawn = 0 if len(streams) == 1 else self._draw_source()
            row = next(streams[drawn])
            self.draws += 1
            yield self.sources[drawn], row

    def _draw_source(self) -> int:
        """Return the index of the source of the next row."""
        return random.Random(f"{self.seed}/{self.draws}").choices(range(len(self.sources)), self.weights)[0]
