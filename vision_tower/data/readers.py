"""Who reads which rows in which order, and where to go on: the readers of a run share every source without overlap.

A reader is a loader process of a rank. Each pass (epoch) over a source puts its shards into a new order, the same for
all readers, and cuts that line into as many equal parts as there are readers; a shard on a cut is split by rows. Rows
are shuffled in blocks. Nothing depends on history: order and cuts follow from (seed, source, epoch), a block's order
from where it begins. So a `Place` of a few numbers is enough to go on exactly, at the price of reading one block again.
"""

from __future__ import annotations

import collections
import dataclasses
import itertools
import random
import sys
from collections.abc import Iterator
from typing import Any

from vision_tower.common.errors import UserError
from vision_tower.data.recipe import PairsRecipe, SourceRecipe
from vision_tower.data.shards import BadShard, Row, read_shard

SETTLED = 1000  # samples after which the share of unreadable ones means something
SLOTS = 2**32


@dataclasses.dataclass(frozen=True)
class Place:
    """How far a reader has come in one source.

    Args:
        epoch: passes that are done.
        piece: number of the piece in which the block of rows in hand begins.
        row: number of the row in its shard with which the block begins.
        taken: rows of the block that have been handed out.
        seen: rows that have been handed out since the run began.
        bad: unreadable samples by cause.
        broken: cause by shard that could not be read, or not to its end, the last time.
    """

    epoch: int = 0
    piece: int = 0
    row: int = 0
    taken: int = 0
    seen: int = 0
    bad: dict[str, int] = dataclasses.field(default_factory=dict)
    broken: dict[str, str] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Cursor:
    """How far a reader has come: its number, the rows it has drawn, and its place in every source."""

    reader: int
    draws: int
    places: tuple[Place, ...]

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Cursor:
        """What `dataclasses.asdict` made of a cursor."""
        return cls(value["reader"], value["draws"], tuple(Place(**place) for place in value["places"]))


@dataclasses.dataclass(frozen=True)
class Piece:
    """A shard, or the part of its rows whose slots lie in [low, high)."""

    shard: str
    low: int
    high: int

    def has(self, index: int) -> bool:
        """Whether row `index` of the shard is in this piece. Multiples of the golden ratio spread any number of rows
        evenly over the slots (Knuth's multiplicative hashing), so no count of the rows is needed."""
        return self.low <= index * 2_654_435_769 % SLOTS < self.high


def cut(shards: list[str], part: int, parts: int) -> list[Piece]:
    """Part `part` of `parts` equal parts of the line of shards. A whole shard is `parts` units long."""
    begin, end = part * len(shards), (part + 1) * len(shards)
    pieces = []
    for number in range(begin // parts, (end - 1) // parts + 1):
        low, high = max(begin - number * parts, 0), min(end - number * parts, parts)
        pieces.append(Piece(shards[number], low * SLOTS // parts, high * SLOTS // parts))
    return pieces


class SourceReader:
    """One reader's endless rows of one source, and the count of what could not be read."""

    def __init__(
        self, source: SourceRecipe, shards: list[str], recipe: PairsRecipe, *, reader: int, readers: int, seed: str
    ) -> None:
        self.source = source
        self.shards = shards
        self.max_bad_fraction = recipe.max_bad_fraction
        self.block = max(recipe.shuffle_buffer, 1)
        self.reader, self.readers = reader, readers
        self.seed = seed
        self.go_on_from(Place())

    def go_on_from(self, place: Place) -> None:
        """Start at `place`, with its counts."""
        self.place = place
        self.bad = collections.Counter(place.bad)
        self.broken = dict(place.broken)

    def rows(self) -> Iterator[Row]:
        """Rows from `self.place` on, which moves along. Raises UserError where the source cannot feed a run."""
        empty = 0
        while True:
            begin = self.place
            yield from self._epoch()
            if begin.piece == begin.row == begin.taken == 0:  # what is left of a pass after an interruption says little
                self._check_pass(begin)
                empty = 0 if self.place.seen > begin.seen else empty + 1
            if self.readers == 1:  # a small part of a small source says little
                self._check_share()
            if empty == self.readers:  # each part of the line was this reader's once
                raise UserError(
                    f"no sample in {self._say_shards()}", file=self.source.shards, remedy="mend data.shards"
                )
            self.place = dataclasses.replace(self.place, epoch=begin.epoch + 1, piece=0, row=0, taken=0)

    def _epoch(self) -> Iterator[Row]:
        """The rest of a pass. The block in hand shrinks as the next one fills, so memory stays at one block."""
        epoch, taken = self.place.epoch, self.place.taken
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
                self.place = dataclasses.replace(
                    self.place, epoch=epoch, piece=piece, row=first, taken=done, seen=self.place.seen + 1
                )
                yield row
            block, taken = following, 0

    def _incoming(self, epoch: int) -> Iterator[tuple[int, Row]]:
        """(number of the piece, row) in the order in which they lie, from the beginning of the block in hand."""
        order = random.Random(f"{self.seed}/{epoch}").sample(self.shards, len(self.shards))
        start, first = self.place.piece, self.place.row
        # Moving on by one part a pass brings every shard to every reader, even where one shard feeds them all.
        for number, piece in enumerate(cut(order, (self.reader + epoch) % self.readers, self.readers)):
            if number < start:
                continue
            begin = first if number == start else 0
            try:
                for row in read_shard(piece.shard, self.source.names, piece.has, begin):
                    yield number, row
            except BadShard as error:
                self._lose(piece.shard, error)
            else:
                self._find_again(piece.shard)

    # --- counting

    def skip(self, cause: str, row: Row) -> None:
        """Count an unreadable sample; say so at the first of its kind."""
        if not self.bad[cause]:
            self._say(f"{row.shard}: {row.key}: {cause}")
        self.bad[cause] += 1
        self.place = dataclasses.replace(self.place, bad=dict(self.bad))
        if self.place.seen >= SETTLED:
            self._check_share()

    def _lose(self, shard: str, error: BadShard) -> None:
        if error.cause not in self.broken.values():
            self._say(f"{shard}: {error.cause} ({error})")
        self.broken[shard] = error.cause
        self.place = dataclasses.replace(self.place, broken=dict(self.broken))
        if len(self.broken) > max(1, self.max_bad_fraction * len(self.shards)):
            raise UserError(
                f"cannot read {self._say_shards()}, more than data.max_bad_fraction={self.max_bad_fraction}",
                file=self.source.shards,
                remedy="mend or remove them, or raise the limit",
            )

    def _find_again(self, shard: str) -> None:
        """A shard counts by its last reading: a store that was away for an hour need not stop a run of weeks."""
        if self.broken.pop(shard, None) is not None:
            self.place = dataclasses.replace(self.place, broken=dict(self.broken))

    @staticmethod
    def _say(line: str) -> None:
        print(f"skipped: {line} (further ones are counted)", file=sys.stderr, flush=True)

    def _say_shards(self) -> str:
        broken = dict(collections.Counter(self.broken.values()))
        return f"{len(self.broken)} of {len(self.shards)} shards ({broken})" if broken else f"{len(self.shards)} shards"

    def _check_pass(self, begin: Place) -> None:
        """At the end of a whole pass that started at `begin`."""
        rows, bad = self.place.seen - begin.seen, self.bad.total() - sum(begin.bad.values())
        if not rows and len(self.broken) == len(self.shards):
            raise UserError(f"cannot read {self._say_shards()}", file=self.source.shards, remedy="mend data.shards")
        if rows and rows == bad:
            raise UserError(
                f"no readable sample in {len(self.shards)} shards ({self._say_bad()})",
                file=self.source.shards,
                remedy="mend them, or the names in the recipe",
            )

    def _say_bad(self) -> str:
        return ", ".join(f"{cause}: {count}" for cause, count in self.bad.most_common())

    def _check_share(self) -> None:
        bad, seen = self.bad.total(), self.place.seen
        if bad > self.max_bad_fraction * seen:
            raise UserError(
                f"{bad} of {seen} samples are unreadable ({self._say_bad()}), more than "
                f"data.max_bad_fraction={self.max_bad_fraction}",
                file=self.source.shards,
                remedy="mend the shards or raise the limit",
            )


class Reader:
    """One of the readers that share all sources. Sources are drawn by weight and number of the draw."""

    def __init__(self, recipe: PairsRecipe, shards: list[list[str]], *, reader: int, readers: int, seed: int) -> None:
        self.sources = [
            SourceReader(source, found, recipe, reader=reader, readers=readers, seed=f"{seed}/{number}")
            for number, (source, found) in enumerate(zip(recipe.sources, shards, strict=True))
        ]
        self.weights = [source.weight for source in recipe.sources]
        self.seed = f"{seed}/draw/{reader}/{readers}"
        self.number = reader
        self.draws = 0

    def go_on_from(self, cursor: Cursor) -> None:
        """Start where `cursor` was taken."""
        self.draws = cursor.draws
        for source, place in zip(self.sources, cursor.places, strict=True):
            source.go_on_from(place)

    def cursor(self) -> Cursor:
        """Where the row after the last one is."""
        return Cursor(self.number, self.draws, tuple(source.place for source in self.sources))

    def rows(self) -> Iterator[tuple[SourceReader, Row]]:
        """Endless rows with the source that each came from."""
        streams = [source.rows() for source in self.sources]
        while True:
            drawn = 0 if len(streams) == 1 else self._drawn()
            row = next(streams[drawn])
            self.draws += 1
            yield self.sources[drawn], row

    def _drawn(self) -> int:
        """Number of the source of the next row."""
        return random.Random(f"{self.seed}/{self.draws}").choices(range(len(self.sources)), self.weights)[0]
