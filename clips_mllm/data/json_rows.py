"""Streaming reader of LLaVA JSON and JSONL: memory does not grow with the size of the file."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

from vision_tower.common.errors import UserError

BLOCK = 1 << 20  # characters read at a time
BLANKS = re.compile(r"[ \t\n\r]*")
EXPECTED = "provide a JSON list of conversations (.json), or one conversation per line (.jsonl)"


def read_rows(file: Path) -> Iterator[Any]:
    """Yield the rows of a JSON list (.json) or of JSON lines (.jsonl).

    Raises:
        UserError: with file and line, after the rows before the error were yielded.
    """
    if not file.is_file():
        raise UserError("no such file", file=file, remedy="check data.file, or build the sample world")
    count = 0
    try:
        with file.open(encoding="utf-8-sig") as stream:
            for row in _lines(file, stream) if file.suffix == ".jsonl" else _ListReader(file, stream).rows():
                count += 1
                yield row
    except UnicodeDecodeError as error:
        raise UserError(f"not UTF-8 (byte {error.start}: {error.reason})", file=file, remedy="convert it") from error
    if not count:
        raise UserError("no conversations", file=file, remedy=EXPECTED)


def _lines(file: Path, stream: TextIO) -> Iterator[Any]:
    for number, line in enumerate(stream, start=1):
        if line.strip():
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise _invalid(file, number, error.msg) from error
            except RecursionError as error:
                raise _invalid(file, number, "nested too deeply") from error
            if isinstance(row, list) and number == 1:
                raise UserError("a list, not one row per line", file=file, key="line 1", remedy="rename it to .json")
            yield row


def _invalid(file: Path, line: int, problem: str) -> UserError:
    return UserError(f"not valid JSON ({problem})", file=file, key=f"line {line}", remedy="fix or remove the line")


class _ListReader:
    """Decodes list elements from a window of text that moves over the file."""

    def __init__(self, file: Path, stream: TextIO) -> None:
        self.file = file
        self.stream = stream
        self.text = ""
        self.at = 0  # position in `text`
        self.line = 1  # line number of the start of `text`

    def rows(self) -> Iterator[Any]:
        first = self._next_character()
        if not first:
            return
        if first != "[":
            kind = type(self._element()).__name__
            by_line = self._next_character() == "{"
            remedy = "rename it to .jsonl, it has one row per line" if by_line else EXPECTED
            raise UserError(f"not a JSON list of conversations but {kind}", file=self.file, remedy=remedy)
        self.at += 1
        if self._next_character() == "]":
            return
        while True:
            yield self._element()
            character = self._next_character()
            if character == "]":
                return
            if character != ",":
                raise self._error("Expecting ',' delimiter", self.at)
            self.at += 1

    def _next_character(self) -> str:
        """Return the next character that is not white space, without consuming it; empty at the end of the file."""
        while True:
            blanks = BLANKS.match(self.text, self.at)
            assert blanks is not None, "the pattern matches the empty string"
            self.at = blanks.end()
            if self.at < len(self.text):
                return self.text[self.at]
            if not self._more():
                return ""

    def _element(self) -> Any:
        self._next_character()
        self._drop_front()
        while True:
            try:
                value, end = json.JSONDecoder().raw_decode(self.text, self.at)
                if end < len(self.text) or not self._more():  # a number can continue in the next block
                    self.at = end
                    return value
            except json.JSONDecodeError as error:
                if not self._more(len(self.text)):
                    raise self._error(error.msg, error.pos) from error
            except RecursionError as error:
                raise self._error("nested too deeply", self.at) from error

    def _more(self, min_size: int = 0) -> bool:
        """Read another block. Doubling its size keeps the cost of a long element linear."""
        block = self.stream.read(max(BLOCK, min_size))
        self.text += block
        return bool(block)

    def _drop_front(self) -> None:
        """Drop the consumed text, once it is large enough to be worth the copy."""
        if self.at > BLOCK:
            self.line += self.text.count("\n", 0, self.at)
            self.text, self.at = self.text[self.at :], 0

    def _error(self, message: str, position: int) -> UserError:
        return _invalid(self.file, self.line + self.text.count("\n", 0, position), message)
