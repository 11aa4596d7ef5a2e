"""A row of LLaVA JSON, or of the forms that hub data sets use, as a conversation in chat-template form.

    {"image": path | [paths], "conversations": [{"from": "human" | "gpt" | "system", "value"}]}     LLaVA
    {"images": [...], "messages": [{"role", "content"}]}, also as "conversations"                   TRL and others
    either with its list as text, in JSON                                                           tables on the hub
    {"images": [...], "texts": [{"user", "assistant"}]}                                             FineVision

An image is a path, or lies in the row: bytes, or a struct with bytes. Where the row names none, a message's parts can:
`{"type": "image", "image": ...}`, also as "path" or "url", as Qwen's tools and chat templates have them.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
from typing import Any

from clips_mllm.prompts.conversation import IMAGE, Message

ROLES = {"human": "user", "gpt": "assistant", "system": "system", "user": "user", "assistant": "assistant"}

IMAGE_KEYS = ("image", "path", "url")  # of a message's part

OPENING = "opening answer dropped"
MOVED = "placeholder moved to the front"


class BadRow(ValueError):
    """A row that cannot become a training example; the message says what is wrong with it."""


@dataclasses.dataclass(frozen=True)
class Example:
    """A conversation in chat-template form, and its images: paths, or places among the row's own images.

    Attributes:
        mended: what was put right in the row.
    """

    messages: list[Message]
    images: list[str] | list[int]
    mended: tuple[str, ...] = dataclasses.field(default=(), compare=False)

    @property
    def words(self) -> int:
        """Rough length: words, and 8 for each text's surroundings."""
        return sum(len(part["text"].split()) + 8 for m in self.messages for part in m["content"] if "text" in part)


def to_example(row: dict[str, Any]) -> Example:
    """Raises BadRow with what is wrong. A lone `<image>` moves to the front of its turn, as in LLaVA."""
    if not isinstance(row, dict):
        raise BadRow("no 'conversations'")
    row = turns_read(row)
    images = _images(row)
    turns = _turns(row, len(images))
    if not isinstance(turns, list) or not turns:
        raise BadRow("no 'conversations'")
    mended: list[str] = []
    messages = [_message(turn, mended) for turn in turns]
    opening = opening_answers([message["role"] for message in messages])
    if opening:
        del messages[opening]
        mended.append(OPENING)
    placeholders = sum(part["type"] == "image" for message in messages for part in message["content"])
    if placeholders != len(images):
        raise BadRow(f"{placeholders} {IMAGE} for {len(images)} images")
    answers = [message for message in messages if message["role"] == "assistant"]
    if not answers:
        raise BadRow("no answer")
    if any(not message["content"][0]["text"].strip() for message in answers):
        raise BadRow("empty answer")
    _check_unicode([part.get("text", "") for message in messages for part in message["content"]], images)
    return Example(messages, images, tuple(dict.fromkeys(mended)))


def opening_answers(roles: list[str]) -> slice | None:
    """Places of answers to nothing, which LLaVA drops: those before any question, behind a system message too."""
    begin = next((at for at, role in enumerate(roles) if role != "system"), len(roles))
    end = next((at for at in range(begin, len(roles)) if roles[at] != "assistant"), len(roles))
    return slice(begin, end) if end > begin else None


def _check_unicode(texts: list[str], images: list[str] | list[int]) -> None:
    """JSON can hold half an emoji (a lone surrogate), which neither a tokenizer nor a file takes."""
    try:
        "".join([*texts, *(name for name in images if isinstance(name, str))]).encode()
    except UnicodeEncodeError:
        raise BadRow("half a character (a lone surrogate)") from None


def image_bytes(row: dict[str, Any], place: int) -> bytes:
    """The encoded image at a place among those that lie in the row."""
    found = _listed(row)[place]
    return bytes(found["bytes"] if isinstance(found, dict) else found)


def turns_key(row: dict[str, Any]) -> str:
    """Where the row's turns are; some sets have both, and LLaVA's name comes first."""
    return "conversations" if row.get("conversations") is not None else "messages"


def image_parts(row: dict[str, Any]) -> list[tuple[dict[str, Any], str]]:
    """Parts of messages that have an image with them, and the key it has there."""
    turns = row.get(turns_key(row))
    contents = [turn.get("content") for turn in turns if isinstance(turn, dict)] if isinstance(turns, list) else []
    parts = [part for content in contents if isinstance(content, list) for part in content if isinstance(part, dict)]
    return [(part, key) for part in parts if _kind(part) == "image" and (key := _image_key(part))]


def _image_key(part: dict[str, Any]) -> str:
    return next((key for key in IMAGE_KEYS if part.get(key)), "")


def _kind(part: dict[str, Any]) -> Any:
    """What a message's part says it is; without a word of it, as in Qwen's first format, what it holds."""
    return part.get("type") or ("image" if _image_key(part) and not part.get("text") else "text")


def _listed(row: dict[str, Any]) -> list[Any]:
    given: Any = next((row[key] for key in ("image", "images") if row.get(key)), None)
    if given is None:
        return [part[key] for part, key in image_parts(row)]
    return given if isinstance(given, list) else [given]


def _images(row: dict[str, Any]) -> list[str] | list[int]:
    paths: list[str] = []
    inside = 0
    for found in _listed(row):
        match found:
            case bytes() | {"bytes": bytes()}:
                inside += 1
            case (str() as path) | {"path": str() as path}:
                paths.append(path.removeprefix("file://"))  # Qwen's documents write them so
            case _:
                raise BadRow("'image' is neither a path nor a list of paths")
    if paths and inside:
        raise BadRow("some images in the row and some by path")
    return paths or list(range(inside))


def turns_read(row: dict[str, Any]) -> dict[str, Any]:
    """The row with its turns as a list, where they are JSON as text."""
    key = turns_key(row)
    if not isinstance(row.get(key), str):
        return row
    try:
        return row | {key: json.loads(row[key])}
    except (ValueError, RecursionError):
        raise BadRow(f"'{key}' is text that is no JSON") from None


def _turns(row: dict[str, Any], images: int) -> Any:
    """Turns as LLaVA has them, of whichever form."""
    match row:
        case {"conversations": turns} if turns is not None and not _are_messages(turns):
            return turns
        case {"conversations": list() as messages} | {"messages": list() as messages}:
            return [_as_turn(message) for message in messages]
        case {"texts": list() as texts}:
            asked = [text if isinstance(text, dict) else {} for text in texts]
            pairs = [[("human", text.get("user")), ("gpt", text.get("assistant"))] for text in asked]
            turns = [{"from": speaker, "value": value} for speaker, value in itertools.chain(*pairs)]
            if turns and isinstance(turns[0]["value"], str) and IMAGE not in turns[0]["value"]:
                turns[0]["value"] = f"{IMAGE}\n" * images + turns[0]["value"]  # these sets have no placeholders
            return turns
    return None


def _are_messages(turns: Any) -> bool:
    """Whether they have the fields of messages; some sets keep those under LLaVA's name."""
    return isinstance(turns, list) and any(
        isinstance(turn, dict) and turn.get("role") and not turn.get("from") for turn in turns
    )


def _as_turn(message: Any) -> Any:
    if not isinstance(message, dict):
        return message
    content = message.get("content")
    if isinstance(content, list):
        texts = [_part_text(part) for part in content]
        content = "".join(texts) if all(isinstance(text, str) for text in texts) else None
    return {"from": message.get("role"), "value": content}


def _part_text(part: Any) -> Any:
    if not isinstance(part, dict):
        return None
    match _kind(part):
        case "image":
            return f"{IMAGE}\n"
        case "text":
            return part.get("text")
        case kind:  # a video, a tool's call: what is left would be another conversation
            raise BadRow(f"a part of type {kind!r}, which is neither text nor image")


def _message(turn: Any, mended: list[str]) -> Message:
    role = ROLES.get(str(turn.get("from"))) if isinstance(turn, dict) else None
    if role is None or not isinstance(turn.get("value"), str):
        raise BadRow("a turn without 'from' (human, gpt, system) and 'value', or 'role' and 'content'")
    if role != "user":
        if IMAGE in turn["value"]:
            raise BadRow(f"{IMAGE} outside a question")
        # An answer's outer blanks could merge with the prompt's last piece, and the model would learn another prompt.
        return {"role": role, "content": [{"type": "text", "text": turn["value"].strip()}]}
    pieces = turn["value"].split(IMAGE)
    texts = [{"type": "text", "text": piece.strip("\n")} for piece in pieces]
    if len(pieces) == 2:
        if pieces[0].strip():
            mended.append(MOVED)
        joined = "\n".join(text["text"].strip() for text in texts if text["text"].strip())
        return {"role": role, "content": [{"type": "image"}, {"type": "text", "text": joined}]}
    content = [texts[0]]
    for text in texts[1:]:
        content += [{"type": "image"}, text]
    return {"role": role, "content": [part for part in content if part["type"] == "image" or part["text"]]}
