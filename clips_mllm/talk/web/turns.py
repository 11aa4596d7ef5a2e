"""What a browser's session said and was shown, with the answers of one model or of two side by side."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import queue
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from clips_mllm.prompts.conversation import Message
from clips_mllm.talk.conversation import Fitted, fit, question, statement, to_turn
from clips_mllm.talk.engine import Done, Engine, Event, Failed, Piece
from clips_mllm.talk.prompt import InputImage
from clips_mllm.talk.sampling import Sampling


@dataclasses.dataclass(frozen=True)
class Turn:
    """A question with its images, and each model's answer so far.

    Attributes:
        files: what the browser shows.
        system: the words of the system that it was asked with.
        dropped: how many turns before it each model was not asked with, for want of context.
    """

    text: str
    images: tuple[InputImage, ...]
    files: tuple[str, ...]
    answers: tuple[str, ...] = ()
    dropped: tuple[int, ...] = ()
    system: str = ""


def messages_of(turns: list[Turn], model: int, system: str) -> tuple[list[Message], list[InputImage]]:
    """The conversation that one of the models had."""
    messages = [statement("system", system)] if system else []
    for turn in turns:
        messages += [question(turn.text, len(turn.images)), statement("assistant", turn.answers[model])]
    return messages, [image for turn in turns for image in turn.images]


def asked_of(engine: Engine, turns: list[Turn], model: int, system: str, sampling: Sampling) -> Fitted:
    """What a model is asked for the last turn, cut to its context."""
    messages, images = messages_of(turns, model, system)
    return fit(engine, messages[:-1], images, sampling)


def answered(engines: list[Engine], turns: list[Turn], system: str, sampling: Sampling) -> Iterator[Turn]:
    """The last turn again and again, its answers growing, those of all models at once.

    Closing the iterator ends them. Raises what an engine raised.
    """
    events: queue.SimpleQueue[tuple[int, Event]] = queue.SimpleQueue()
    turn = dataclasses.replace(turns[-1], answers=("",) * len(engines), system=system)
    asked = [asked_of(engine, [*turns[:-1], turn], model, system, sampling) for model, engine in enumerate(engines)]
    turn = dataclasses.replace(turn, dropped=tuple(fitted.dropped for fitted in asked))
    running = []
    try:
        for model, (engine, fitted) in enumerate(zip(engines, asked, strict=True)):
            prompt = engine.prompt(fitted.messages, fitted.images)

            def emit(event: Event, model: int = model) -> None:
                events.put((model, event))

            running.append(engine.submit(prompt, sampling, emit))
        open_ = len(running)
        while open_:
            model, event = events.get()
            match event:
                case Piece(text):
                    answers = list(turn.answers)
                    answers[model] += text
                    turn = dataclasses.replace(turn, answers=tuple(answers))
                    yield turn
                case Failed(error):
                    raise error
                case Done():
                    open_ -= 1
        yield turn
    finally:
        for request in running:
            request.cancel()


def append_feedback(file: Path, turns: list[Turn], model: int, name: str, liked: bool) -> None:
    """Append the conversation up to its last turn as a row of LLaVA JSON; its images go to a folder beside it.

    Rated again, it has the same id: the last of its rows is what was meant.
    """
    messages, images = messages_of(turns, model, turns[-1].system)
    folder = file.with_suffix("")
    names = []
    for image in images:
        folder.mkdir(parents=True, exist_ok=True)
        names.append(f"{folder.name}/{image.key[:16]}.png")
        if not (file.parent / names[-1]).exists():
            image.image.save(file.parent / names[-1])
    said = [to_turn(message) for message in messages]
    digest = hashlib.sha256(json.dumps([names, said, name]).encode()).hexdigest()
    row: dict[str, Any] = {"id": f"{file.stem}-{digest[:16]}"}
    if names:
        row["image"] = names[0] if len(names) == 1 else names
    row |= {"conversations": said, "model": name, "liked": liked}
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("a", encoding="utf-8") as out:
        out.write(json.dumps(row, ensure_ascii=False) + "\n")
