"""Answers on disk as they come, so that a second run goes on from the first missing document.

The first line says what gave the answers (checkpoint, precision, mode); under anything else the file starts anew. Each
further line is {"key", "answer"}; the key covers the document, its prompt, its images and its generation options.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vision_tower.common.errors import UserError
from vision_tower.common.hashes import value_hash


class Journal:
    """Answers of earlier runs, and a place for new ones.

    Args:
        stem: path without ending; each process writes STEM.RANK.jsonl and reads all of them.
        source: what gives the answers.
        rank: of this process.
    """

    def __init__(self, stem: Path, source: Mapping[str, Any], rank: int = 0) -> None:
        self.file = stem.with_name(f"{stem.name}.{rank}.jsonl")
        self._head = json.dumps({"source": source}, sort_keys=True)
        self._answers: dict[str, str] = {}
        for file in sorted(stem.parent.glob(f"{stem.name}.*.jsonl")):
            self._answers |= _read(file, self._head)
        self.reused = 0

    def get(self, key: str) -> str | None:
        """The answer of an earlier run; `reused` counts those that there were."""
        found = self._answers.get(key)
        self.reused += found is not None
        return found

    def add(self, answers: Mapping[str, str]) -> None:
        """Keep a batch of them."""
        fresh = not self.file.exists() or _read_head(self.file) != self._head
        with self.file.open("w" if fresh else "a", encoding="utf-8") as stream:
            if fresh:
                stream.write(self._head + "\n")
            stream.writelines(json.dumps({"key": key, "answer": text}) + "\n" for key, text in answers.items())
        self._answers |= answers

    def forget(self) -> None:
        """The evaluation is whole and its scores are written: the answers stand in its samples file."""
        for file in self.file.parent.glob(f"{self.file.name.rsplit('.', 2)[0]}.*.jsonl"):
            file.unlink(missing_ok=True)


def key_of(task: str, doc_id: int, ids: Sequence[int], images: Sequence[str], options: str) -> str:
    """A document's key: its name, and a digest of all that its answer depends on."""
    return f"{task}/{doc_id}/{value_hash([list(ids), list(images), options])[:24]}"


def weights_of(checkpoint: str) -> list[list[Any]]:
    """Names, sizes and times of a local checkpoint's files: cheap, and another training changes them."""
    folder = Path(checkpoint)
    files = sorted(folder.glob("*.safetensors")) + sorted(folder.glob("*.json")) if folder.is_dir() else []
    kept = [file for file in files if file.suffix == ".safetensors" or file.name.endswith("config.json")]
    return [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in kept]


def _read_head(file: Path) -> str:
    with file.open(encoding="utf-8", errors="replace") as stream:
        return stream.readline().rstrip("\n")


def _read(file: Path, head: str) -> dict[str, str]:
    """The answers; none where the file is of another source. A last line that a kill cut off is dropped."""
    lines = file.read_text(encoding="utf-8", errors="replace").split("\n")
    if lines[0] != head:
        return {}
    found: dict[str, str] = {}
    for number, line in enumerate(lines[1:-1], start=2):  # what follows the last newline is empty, or was cut off
        try:
            row = json.loads(line)
            found[row["key"]] = row["answer"]
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise UserError(
                f"line {number}: not an answer of 'clips-mllm evaluate'", file=file, remedy="remove the file"
            ) from error
    if lines[-1]:
        file.write_text("\n".join([*lines[:-1], ""]), encoding="utf-8")
    return found
