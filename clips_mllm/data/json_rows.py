"""Rows of a LLaVA JSON or JSONL, one at a time: a file of gigabytes never is in memory as a whole."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

from vision_tower.common.errors import UserError

BLOCK = 1 << 20  # characters read at a time
BLANKS = re.compile(r"[ \t\n\r]*")


def read_rows(file: Path) -> Iterator[Any]:
    """Rows of a JSON list (.json) or of JSON lines (.jsonl).

    Raises:
        UserError: with file, line and remedy; rows before the fault have been yielded by then.
    """
    if not file.is_file():
        raise UserError("no such file (data.file)", file=file, remedy="build the sample world or mend the path")
    found = 0
    try:
        with file.open(encoding="utf-8-sig") as stream:
            for row in _lines(file, stream) if file.suffix == ".jsonl" else _ListReader(file, stream).rows():
                found += 1
                yield row
    except UnicodeDecodeError as error:
        raise UserError(
            f"byte {error.start}: not UTF-8 text ({error.reason})", file=file, remedy="write it as UTF-8"
        ) from error
    if not found:
        raise UserError("expected a non-empty JSON list of conversations, found list", file=file)


def _lines(file: Path, stream: TextIO) -> Iterator[Any]:
    blank = True
    for number, line in enumerate(stream, start=1):
        if line.strip():
            blank = False
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise UserError(
                    f"line {number}: not valid JSON ({error.msg})", file=file, remedy="mend or remove the line"
                ) from error
            except RecursionError as error:
                raise UserError(
                    f"line {number}: not valid JSON (nested too deeply)", file=file, remedy="mend or remove the line"
                ) from error
            if isinstance(row, list) and number == 1:
                raise UserError(
                    f"line {number}: a list, where a .jsonl has a row", file=file, remedy="name the file .json"
                )
            yield row
    if blank:
        raise UserError("empty", file=file, remedy="expected a JSON list of conversations")


class _ListReader:
    """A window of text moves over the file; elements are decoded from its front."""

    def __init__(self, file: Path, stream: TextIO) -> None:
        self.file = file
        self.stream = stream
        self.text = ""
        self.at = 0  # place in `text`
        self.line = 1  # line on which `text` begins

    def rows(self) -> Iterator[Any]:
        first = self._next_sign()
        if not first:
            raise UserError("empty", file=self.file, remedy="expected a JSON list of conversations")
        if first != "[":
            found = type(self._element()).__name__
            lines = "; rows on lines of their own belong into a .jsonl" if self._next_sign() == "{" else ""
            raise UserError(f"expected a non-empty JSON list of conversations, found {found}{lines}", file=self.file)
        self.at += 1
        if self._next_sign() == "]":
            return
        while True:
            yield self._element()
            sign = self._next_sign()
            if sign == "]":
                return
            if sign != ",":
                raise self._error("Expecting ',' delimiter", self.at)
            self.at += 1

    def _next_sign(self) -> str:
        """The next character that is no white space, which stays; empty at the end of the file."""
        while True:
            blanks = BLANKS.match(self.text, self.at)
            assert blanks is not None, "the pattern matches nothing, too"
            self.at = blanks.end()
            if self.at < len(self.text):
                return self.text[self.at]
            if not self._more():
                return ""

    def _element(self) -> Any:
        self._next_sign()
        self._drop_front()
        while True:
            try:
                value, end = json.JSONDecoder().raw_decode(self.text, self.at)
                if end < len(self.text) or not self._more():  # a number may go on in the next block
                    self.at = end
                    return value
            except json.JSONDecodeError as error:
                if not self._more(len(self.text)):
                    raise self._error(error.msg, error.pos) from error
            except RecursionError as error:
                raise self._error("nested too deeply", self.at) from error

    def _more(self, least: int = 0) -> bool:
        """Read on; doubling, so that an element longer than a block costs no square."""
        block = self.stream.read(max(BLOCK, least))
        self.text += block
        return bool(block)

    def _drop_front(self) -> None:
        """Forget what has been read, once that is worth the copy."""
        if self.at > BLOCK:
            self.line += self.text.count("\n", 0, self.at)
            self.text, self.at = self.text[self.at :], 0

    def _error(self, message: str, place: int) -> UserError:
        line = self.line + self.text.count("\n", 0, place)
        return UserError(f"line {line}: not valid JSON ({message})", file=self.file, remedy="mend or write it again")
