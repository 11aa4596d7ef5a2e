"""Convert rows of LLaVA JSON, and of other formats on the hub, to conversations in chat-template form.

    {"image": path | [paths], "conversations": [{"from": "human" | "gpt" | "system", "value"}]}     LLaVA
    {"images": [...], "messages": [{"role", "content"}]}, also as "conversations"                   TRL and others
    either with its list encoded as a JSON string                                                   tables on the hub
    {"images": [...], "texts": [{"user", "assistant"}]}                                             FineVision

An image is a path, or is stored in the row as bytes or a struct with bytes. If the row has no images, the parts of its
messages can: `{"type": "image", "image": ...}`, or "path" or "url", as in Qwen's tools and chat templates.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
from typing import Any

from clips_mllm.prompts.conversation import IMAGE, Message

ROLES = {"human": "user", "gpt": "assistant", "system": "system", "user": "user", "assistant": "assistant"}

IMAGE_KEYS = ("image", "path", "url")  # of a message part

OPENING = "opening answer dropped"
MOVED = "placeholder moved to the front"


class BadRow(ValueError):
    """A row that cannot become a training example. The message is the reason."""


@dataclasses.dataclass(frozen=True)
class Example:
    """A conversation in chat-template form.

    Attributes:
        images: paths, or indices of images stored in the row.
        repairs: repairs that were applied to the row.
    """

    messages: list[Message]
    images: list[str] | list[int]
    repairs: tuple[str, ...] = dataclasses.field(default=(), compare=False)

    @property
    def words(self) -> int:
        """Approximate length: words, plus 8 per text for the template."""
        return sum(len(part["text"].split()) + 8 for m in self.messages for part in m["content"] if "text" in part)


def to_example(row: dict[str, Any]) -> Example:
    """Convert a row. A single `<image>` moves to the front of its turn, as in LLaVA. Raises BadRow."""
    if not isinstance(row, dict):
        raise BadRow("no 'conversations'")
    row = with_decoded_turns(row)
    images = _images(row)
    turns = _turns(row, len(images))
    if not isinstance(turns, list) or not turns:
        raise BadRow("no 'conversations'")
    repairs: list[str] = []
    messages = [_message(turn, repairs) for turn in turns]
    opening = opening_answers([message["role"] for message in messages])
    if opening:
        del messages[opening]
        repairs.append(OPENING)
    placeholders = sum(part["type"] == "image" for message in messages for part in message["content"])
    if placeholders != len(images):
        raise BadRow(f"{placeholders} {IMAGE} for {len(images)} images")
    answers = [message for message in messages if message["role"] == "assistant"]
    if not answers:
        raise BadRow("no answer")
    if any(not message["content"][0]["text"].strip() for message in answers):
        raise BadRow("empty answer")
    _check_unicode([part.get("text", "") for message in messages for part in message["content"]], images)
    return Example(messages, images, tuple(dict.fromkeys(repairs)))


def opening_answers(roles: list[str]) -> slice | None:
    """Return the slice of answers before the first question, which LLaVA drops; None if there are none."""
    begin = next((index for index, role in enumerate(roles) if role != "system"), len(roles))
    end = next((index for index in range(begin, len(roles)) if roles[index] != "assistant"), len(roles))
    return slice(begin, end) if end > begin else None


def _check_unicode(texts: list[str], images: list[str] | list[int]) -> None:
    """Refuse lone surrogates: valid in JSON, but neither tokenizers nor files can encode them."""
    try:
        "".join([*texts, *(name for name in images if isinstance(name, str))]).encode()
    except UnicodeEncodeError:
        raise BadRow("invalid Unicode (a lone surrogate)") from None


def image_bytes(row: dict[str, Any], index: int) -> bytes:
    """Return an encoded image stored in the row."""
    image = _listed(row)[index]
    return bytes(image["bytes"] if isinstance(image, dict) else image)


def turns_key(row: dict[str, Any]) -> str:
    """Return the key of the row's turns. Some data sets have both; LLaVA's takes precedence."""
    return "conversations" if row.get("conversations") is not None else "messages"


def image_parts(row: dict[str, Any]) -> list[tuple[dict[str, Any], str]]:
    """Return the message parts that contain an image, each with the key of the image."""
    turns = row.get(turns_key(row))
    contents = [turn.get("content") for turn in turns if isinstance(turn, dict)] if isinstance(turns, list) else []
    parts = [part for content in contents if isinstance(content, list) for part in content if isinstance(part, dict)]
    return [(part, key) for part in parts if _kind(part) == "image" and (key := _image_key(part))]


def _image_key(part: dict[str, Any]) -> str:
    return next((key for key in IMAGE_KEYS if part.get(key)), "")


def _kind(part: dict[str, Any]) -> Any:
    """Return the type of a message part; if it has none, as in Qwen's first format, infer it from the keys."""
    return part.get("type") or ("image" if _image_key(part) and not part.get("text") else "text")


def _listed(row: dict[str, Any]) -> list[Any]:
    given: Any = next((row[key] for key in ("image", "images") if row.get(key)), None)
    if given is None:
        return [part[key] for part, key in image_parts(row)]
    return given if isinstance(given, list) else [given]


def _images(row: dict[str, Any]) -> list[str] | list[int]:
    paths: list[str] = []
    inside = 0
    for image in _listed(row):
        match image:
            case bytes() | {"bytes": bytes()}:
                inside += 1
            case (str() as path) | {"path": str() as path}:
                paths.append(path.removeprefix("file://"))  # the form in Qwen's documentation
            case _:
                raise BadRow("'image' is neither a path nor a list of paths")
    if paths and inside:
        raise BadRow("some images stored in the row and some given by path")
    return paths or list(range(inside))


def with_decoded_turns(row: dict[str, Any]) -> dict[str, Any]:
    """Decode the turns if they are a JSON string."""
    key = turns_key(row)
    if not isinstance(row.get(key), str):
        return row
    try:
        return row | {key: json.loads(row[key])}
    except (ValueError, RecursionError):
        raise BadRow(f"'{key}' is a string but not JSON") from None


def _turns(row: dict[str, Any], images: int) -> Any:
    """Return the turns in LLaVA's form, from any of the supported forms."""
    match row:
        case {"conversations": turns} if turns is not None and not _are_messages(turns):
            return turns
        case {"conversations": list() as messages} | {"messages": list() as messages}:
            return [_as_turn(message) for message in messages]
        case {"texts": list() as texts}:
            pairs = [text if isinstance(text, dict) else {} for text in texts]
            spoken = [[("human", pair.get("user")), ("gpt", pair.get("assistant"))] for pair in pairs]
            turns = [{"from": speaker, "value": value} for speaker, value in itertools.chain(*spoken)]
            if turns and isinstance(turns[0]["value"], str) and IMAGE not in turns[0]["value"]:
                turns[0]["value"] = f"{IMAGE}\n" * images + turns[0]["value"]  # these data sets have no placeholders
            return turns
    return None


def _are_messages(turns: Any) -> bool:
    """Return True if the turns are messages; some data sets store these under LLaVA's key."""
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
        case kind:  # a video or a tool call: without it the conversation would change its meaning
            raise BadRow(f"a message part of type {kind!r}, not text or image")


def _message(turn: Any, repairs: list[str]) -> Message:
    role = ROLES.get(str(turn.get("from"))) if isinstance(turn, dict) else None
    if role is None or not isinstance(turn.get("value"), str):
        raise BadRow("a turn without 'from' (human, gpt, system) and 'value', or 'role' and 'content'")
    if role != "user":
        if IMAGE in turn["value"]:
            raise BadRow(f"{IMAGE} outside a question")
        # Outer blanks could merge with the prompt's last token, so that training and inference prompts would differ.
        return {"role": role, "content": [{"type": "text", "text": turn["value"].strip()}]}
    pieces = turn["value"].split(IMAGE)
    texts = [{"type": "text", "text": piece.strip("\n")} for piece in pieces]
    if len(pieces) == 2:
        if pieces[0].strip():
            repairs.append(MOVED)
        joined = "\n".join(text["text"].strip() for text in texts if text["text"].strip())
        return {"role": role, "content": [{"type": "image"}, {"type": "text", "text": joined}]}
    content = [texts[0]]
    for text in texts[1:]:
        content += [{"type": "image"}, text]
    return {"role": role, "content": [part for part in content if part["type"] == "image" or part["text"]]}
