"""Summary of the doctor's verdicts: counts by cause with examples, lengths, and the printed table."""

from __future__ import annotations

import dataclasses
from array import array
from collections import Counter
from typing import Any

from clips_mllm.checks.rows import Verdict

MAX_EXAMPLES = 20  # of each cause


@dataclasses.dataclass
class Summary:
    """Sums over verdicts, with a few bytes of memory per row."""

    file: str
    max_length: int
    rows: int = 0
    images: int = 0
    text_only: int = 0
    over_long: int = 0
    repeated_ids: int = 0
    causes: Counter[str] = dataclasses.field(default_factory=Counter)
    fixes: Counter[str] = dataclasses.field(default_factory=Counter)
    examples: dict[str, list[dict[str, Any]]] = dataclasses.field(default_factory=dict)
    tokens: array[int] = dataclasses.field(default_factory=lambda: array("i"))
    supervised: array[int] = dataclasses.field(default_factory=lambda: array("i"))
    seen_ids: set[int] = dataclasses.field(default_factory=set)
    shard: str = ""

    @property
    def usable(self) -> int:
        """Number of rows that training can use."""
        return self.rows - self.causes.total()

    def add(self, verdict: Verdict, shard: str = "") -> None:
        """Count a row. Shards come one after the other."""
        self.rows += 1
        if shard != self.shard:  # ids are unique within a shard
            self.seen_ids.clear()
            self.shard = shard
        name = hash(verdict.name)
        self.repeated_ids += bool(verdict.name) and name in self.seen_ids
        self.seen_ids.add(name)
        self.fixes.update(verdict.fixes)
        if verdict.cause:
            self.causes[verdict.cause] += 1
            examples = self.examples.setdefault(verdict.cause, [])
            if len(examples) < MAX_EXAMPLES:
                origin = {"shard": shard} if shard else {}
                examples.append({**origin, "row": verdict.number, "id": verdict.name, "detail": verdict.detail})
            return
        self.images += verdict.images
        self.text_only += not verdict.images
        if verdict.tokens:
            self.tokens.append(verdict.uncut_tokens)
            self.supervised.append(verdict.supervised)
            self.over_long += verdict.uncut_tokens > self.max_length

    def report(self) -> dict[str, Any]:
        """Return the content of the report file."""
        report: dict[str, Any] = {
            "file": self.file,
            "rows": self.rows,
            "usable": self.usable,
            "images": self.images,
            "text_only": self.text_only,
            "repeated_ids": self.repeated_ids,
            "dropped": {
                cause: {"rows": count, "examples": self.examples[cause]} for cause, count in _by_count(self.causes)
            },
            "fixed": dict(_by_count(self.fixes)),
        }
        if self.tokens:
            report |= {
                "max_length": self.max_length,
                "over_long": self.over_long,
                "tokens": _quantiles(self.tokens),
                "supervised": _quantiles(self.supervised),
            }
        return report

    def table(self) -> str:
        """Return the table for the terminal."""
        lines = [("rows", self.rows, ""), ("usable", self.usable, "")]
        for cause, count in _by_count(self.causes):
            first = self.examples[cause][0]
            shard = f"{first['shard']}: " if "shard" in first else ""
            lines.append((f"  dropped: {cause}", count, f"{shard}row {first['row']} {first['detail']}".rstrip()))
        lines += [(f"  fixed: {fix}", count, "") for fix, count in _by_count(self.fixes)]
        lines += [("images", self.images, ""), ("text only", self.text_only, "")]
        lines.append(("repeated ids", self.repeated_ids, "kept"))
        if self.tokens:
            for name, values in (("tokens", self.tokens), ("supervised tokens", self.supervised)):
                quantiles = _quantiles(values)
                lines.append(
                    (f"{name}, median", quantiles["median"], f"99 %: {quantiles['p99']}, max: {quantiles['max']}")
                )
            lines.append((f"longer than {self.max_length}", self.over_long, "cut"))
        width = max(len(line[0]) for line in lines)
        return "\n".join(f"{name:<{width}} {count:>12,}  {note}".rstrip() for name, count, note in lines)


def _by_count(counts: Counter[str]) -> list[tuple[str, int]]:
    """Return the items, highest count first."""
    return sorted(counts.items(), key=lambda item: item[1], reverse=True)


def _quantiles(values: array[int]) -> dict[str, int]:
    ordered = sorted(values)
    last = len(ordered) - 1
    ranks = {"median": 0.5, "p95": 0.95, "p99": 0.99, "max": 1.0}
    quantiles = {name: ordered[round(rank * last)] for name, rank in ranks.items()}
    return quantiles | {"mean": round(sum(ordered) / len(ordered)), "total": sum(ordered)}
