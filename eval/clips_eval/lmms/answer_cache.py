"""Answers stored on disk as they are generated, so that an interrupted evaluation resumes.

The first line of a file describes what generates the answers (checkpoint, precision, mode); with any other description
the file is overwritten. Each further line is {"key", "answer"}; the key covers the document, its prompt, its images and
its generation options.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vision_tower.common.errors import UserError
from vision_tower.common.hashes import value_hash


class AnswerCache:
    """Answers of earlier runs and of this one.

    Args:
        stem: path without ending; each process writes STEM.RANK.jsonl and reads the files of all ranks.
        source: JSON-compatible description of what generates the answers.
        rank: rank of this process.
    """

    def __init__(self, stem: Path, source: Mapping[str, Any], rank: int = 0) -> None:
        self.file = stem.with_name(f"{stem.name}.{rank}.jsonl")
        self._head = json.dumps({"source": source}, sort_keys=True)
        self._answers: dict[str, str] = {}
        for file in sorted(stem.parent.glob(f"{stem.name}.*.jsonl")):
            self._answers |= _read(file, self._head)
        self.reused = 0

    def get(self, key: str) -> str | None:
        """Return the answer of an earlier run, or None; `reused` counts the answers found."""
        answer = self._answers.get(key)
        self.reused += answer is not None
        return answer

    def add(self, answers: Mapping[str, str]) -> None:
        """Append the answers of a batch."""
        new = not self.file.exists() or _read_head(self.file) != self._head
        with self.file.open("w" if new else "a", encoding="utf-8") as stream:
            if new:
                stream.write(self._head + "\n")
            stream.writelines(json.dumps({"key": key, "answer": text}) + "\n" for key, text in answers.items())
        self._answers |= answers

    def delete(self) -> None:
        """Delete the files of all ranks, after a complete evaluation has written its own samples file."""
        for file in self.file.parent.glob(f"{self.file.name.rsplit('.', 2)[0]}.*.jsonl"):
            file.unlink(missing_ok=True)


def answer_key(task: str, doc_id: int, ids: Sequence[int], images: Sequence[str], options: str) -> str:
    """Return a document's key: its name and a digest of everything that its answer depends on."""
    return f"{task}/{doc_id}/{value_hash([list(ids), list(images), options])[:24]}"


def weight_stamps(checkpoint: str) -> list[list[Any]]:
    """Return names, sizes and modification times of a local checkpoint's files: cheaper than hashing the weights."""
    folder = Path(checkpoint)
    files = sorted(folder.glob("*.safetensors")) + sorted(folder.glob("*config.json")) if folder.is_dir() else []
    return [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in files]


def _read_head(file: Path) -> str:
    with file.open(encoding="utf-8", errors="replace") as stream:
        return stream.readline().rstrip("\n")


def _read(file: Path, head: str) -> dict[str, str]:
    """Return a file's answers, none if its first line differs; remove a last line that a kill has truncated."""
    lines = file.read_text(encoding="utf-8", errors="replace").split("\n")
    if lines[0] != head:
        return {}
    answers: dict[str, str] = {}
    for number, line in enumerate(lines[1:-1], start=2):  # after the last newline: empty, or truncated
        try:
            row = json.loads(line)
            answers[row["key"]] = row["answer"]
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise UserError(f"line {number} is not an answer", file=file, remedy="remove the file") from error
    if lines[-1]:
        file.write_text("\n".join([*lines[:-1], ""]), encoding="utf-8")
    return answers
