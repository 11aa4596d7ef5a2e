"""What the doctor found, summed up: counts by cause with examples, lengths, and the table that is printed."""

from __future__ import annotations

import dataclasses
from array import array
from collections import Counter
from typing import Any

from clips_mllm.checks.rows import Verdict

EXAMPLES = 20  # of each cause


@dataclasses.dataclass
class Findings:
    """Sums over verdicts; memory of a few bytes a row."""

    file: str
    max_length: int
    rows: int = 0
    images: int = 0
    text_only: int = 0
    over_long: int = 0
    repeated_ids: int = 0
    causes: Counter[str] = dataclasses.field(default_factory=Counter)
    mended: Counter[str] = dataclasses.field(default_factory=Counter)
    examples: dict[str, list[dict[str, Any]]] = dataclasses.field(default_factory=dict)
    tokens: array[int] = dataclasses.field(default_factory=lambda: array("i"))
    learnt: array[int] = dataclasses.field(default_factory=lambda: array("i"))
    seen: set[int] = dataclasses.field(default_factory=set)
    shard: str = ""

    @property
    def usable(self) -> int:
        """Rows that can be trained on."""
        return self.rows - self.causes.total()

    def add(self, verdict: Verdict, shard: str = "") -> None:
        """Count a row."""
        self.rows += 1
        if shard != self.shard:  # shards come one after the other, and a name stands for a sample within one
            self.seen.clear()
            self.shard = shard
        name = hash(verdict.name)
        self.repeated_ids += bool(verdict.name) and name in self.seen
        self.seen.add(name)
        self.mended.update(verdict.mended)
        if verdict.cause:
            self.causes[verdict.cause] += 1
            found = self.examples.setdefault(verdict.cause, [])
            if len(found) < EXAMPLES:
                place = {"shard": shard} if shard else {}
                found.append({**place, "row": verdict.number, "id": verdict.name, "detail": verdict.detail})
            return
        self.images += verdict.images
        self.text_only += not verdict.images
        if verdict.tokens:
            self.tokens.append(verdict.whole)
            self.learnt.append(verdict.learnt)
            self.over_long += verdict.whole > self.max_length

    def report(self) -> dict[str, Any]:
        """For `doctor.json`."""
        found: dict[str, Any] = {
            "file": self.file,
            "rows": self.rows,
            "usable": self.usable,
            "images": self.images,
            "text_only": self.text_only,
            "repeated_ids": self.repeated_ids,
            "dropped": {
                cause: {"rows": count, "examples": self.examples[cause]} for cause, count in self.causes.most_common()
            },
            "mended": dict(self.mended.most_common()),
        }
        if self.tokens:
            found |= {
                "max_length": self.max_length,
                "over_long": self.over_long,
                "tokens": _spread(self.tokens),
                "learnt": _spread(self.learnt),
            }
        return found

    def table(self) -> str:
        """For the terminal."""
        lines = [("rows", self.rows, ""), ("usable", self.usable, "")]
        for cause, count in self.causes.most_common():
            first = self.examples[cause][0]
            place = f"{first['shard']}: " if "shard" in first else ""
            lines.append((f"  dropped: {cause}", count, f"{place}row {first['row']} {first['detail']}".rstrip()))
        for what, count in self.mended.most_common():
            lines.append((f"  mended: {what}", count, ""))
        lines += [("images", self.images, ""), ("text only", self.text_only, "")]
        lines.append(("ids that repeat", self.repeated_ids, "kept"))
        if self.tokens:
            spread, learnt = _spread(self.tokens), _spread(self.learnt)
            lines.append(("tokens, median", spread["median"], f"99 %: {spread['p99']}, longest: {spread['max']}"))
            lines.append(("learnt, median", learnt["median"], f"99 %: {learnt['p99']}, most: {learnt['max']}"))
            lines.append((f"longer than {self.max_length}", self.over_long, "cut there"))
        width = max(len(line[0]) for line in lines)
        return "\n".join(f"{name:<{width}} {count:>12,}  {said}".rstrip() for name, count, said in lines)


def _spread(values: array[int]) -> dict[str, int]:
    ordered = sorted(values)
    last = len(ordered) - 1
    places = {"median": 0.5, "p95": 0.95, "p99": 0.99, "max": 1.0}
    found = {name: ordered[round(share * last)] for name, share in places.items()}
    return found | {"mean": round(sum(ordered) / len(ordered)), "total": sum(ordered)}
