"""LLaVA JSON: rows of a file, and a row as a conversation in chat-template form."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from clips_mllm.prompts import IMAGE, Message
from vision_tower.errors import UserError

ROLES = {"human": "user", "gpt": "assistant", "system": "system"}


class BadRow(ValueError):
    """A row that cannot become a training example; the message says what is wrong with it."""


@dataclasses.dataclass(frozen=True)
class Example:
    """A conversation in chat-template form, and its picture files."""

    messages: list[Message]
    images: list[str]


def read_rows(file: Path) -> list[dict[str, Any]]:
    """Rows of a LLaVA JSON (a list) or JSONL. Raises UserError with file, line and remedy."""
    if not file.is_file():
        raise UserError(f"{file}: no such file (data.file); build the sample world or mend the path")
    try:
        text = file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{file}: byte {error.start}: not UTF-8 text ({error.reason}); write it as UTF-8") from error
    if not text.strip():
        raise UserError(f"{file}: empty; expected a JSON list of conversations")
    try:
        if file.suffix == ".jsonl":
            lines = [(number, line) for number, line in enumerate(text.splitlines(), start=1) if line.strip()]
            rows = [_json_line(file, number, line) for number, line in lines]
        else:
            rows = json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(f"{file}: line {error.lineno}: not valid JSON ({error.msg}); mend or write it again") from error
    if not isinstance(rows, list) or not rows:
        raise UserError(f"{file}: expected a non-empty JSON list of conversations, found {type(rows).__name__}")
    return rows


def _json_line(file: Path, number: int, line: str) -> Any:
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        raise UserError(f"{file}: line {number}: not valid JSON ({error.msg}); mend or remove the line") from error


def to_example(row: dict[str, Any]) -> Example:
    """Raises BadRow with what is wrong. A lone `<image>` moves to the front of its turn, as in LLaVA."""
    turns = row.get("conversations") if isinstance(row, dict) else None
    if not isinstance(turns, list) or not turns:
        raise BadRow("no 'conversations'")
    images = row.get("image") or []
    images = [images] if isinstance(images, str) else images
    if not isinstance(images, list) or not all(isinstance(name, str) for name in images):
        raise BadRow("'image' is neither a path nor a list of paths")
    messages = [_message(turn) for turn in turns]
    while messages and messages[0]["role"] == "assistant":
        messages.pop(0)  # LLaVA drops an opening answer to nothing
    placeholders = sum(part["type"] == "image" for message in messages for part in message["content"])
    if placeholders != len(images):
        raise BadRow(f"{placeholders} {IMAGE} for {len(images)} images")
    answers = [message for message in messages if message["role"] == "assistant"]
    if not answers:
        raise BadRow("no answer")
    if any(not message["content"][0]["text"].strip() for message in answers):
        raise BadRow("empty answer")
    return Example(messages, images)


def _message(turn: Any) -> Message:
    role = ROLES.get(str(turn.get("from"))) if isinstance(turn, dict) else None
    if role is None or not isinstance(turn.get("value"), str):
        raise BadRow("a turn without 'from' (human, gpt, system) and 'value'")
    if role != "user":
        if IMAGE in turn["value"]:
            raise BadRow(f"{IMAGE} outside a question")
        # An answer's outer blanks could merge with the prompt's last piece, and the model would learn another prompt.
        return {"role": role, "content": [{"type": "text", "text": turn["value"].strip()}]}
    pieces = turn["value"].split(IMAGE)
    texts = [{"type": "text", "text": piece.strip("\n")} for piece in pieces]
    if len(pieces) == 2:
        joined = "\n".join(text["text"].strip() for text in texts if text["text"].strip())
        return {"role": role, "content": [{"type": "image"}, {"type": "text", "text": joined}]}
    content = [texts[0]]
    for text in texts[1:]:
        content += [{"type": "image"}, text]
    return {"role": role, "content": [part for part in content if part["type"] == "image" or part["text"]]}
