"""Chat in a terminal or through a pipe: answers go to stdout, everything else to stderr."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shlex
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.parse import unquote, urlparse

import torch

from clips_mllm.talk.conversation import Conversation
from clips_mllm.talk.engine import Engine
from clips_mllm.talk.images import read_image
from clips_mllm.talk.sampling import Sampling
from vision_tower.common.errors import UserError
from vision_tower.common.files import read_json, write_text
from vision_tower.data.image_folder import ENDINGS

HELP = """\
Type a question. To attach an image, drop it on the window, type its path alone, or use /image.
  /image PATH...   attach images to the next question (quote or escape paths with blanks)
  /system [TEXT]   set or remove the system prompt; starts over
  /undo            detach images of the next question, else remove the last question and its answer
  /retry           ask the last question again
  /reset           start over
  /save FILE       save the conversation as LLaVA JSON, ready for training
  /load FILE       continue a saved conversation
  /params [K=V...] show or set max_new_tokens, temperature, top_p, repetition_penalty, seed
  /quit            exit. Ctrl-C ends an answer, not the program."""
PARAMETERS = {"max_new_tokens": int, "temperature": float, "top_p": float, "repetition_penalty": float, "seed": int}


class Terminal:
    """Handles input lines: questions and commands."""

    def __init__(self, engine: Engine, sampling: Sampling, system: str | None = None) -> None:
        self.conversation = Conversation(engine, notify, system)
        self.sampling = sampling

    def attach(self, files: list[str]) -> None:
        """Attach images to the next question; none of them if one cannot be read."""
        self.conversation.pending_images += [read_image(Path(file)) for file in files]

    def undo(self) -> str:
        """Detach the pending images, or remove the last turn. Return a description of it."""
        if pending := len(self.conversation.pending_images):
            self.conversation.pending_images = []
            return f"{pending} image(s)"
        question = self.conversation.undo()
        pending = len(self.conversation.pending_images)
        return question + (f" (its {pending} image(s) stay attached to the next question)" if pending else "")

    def answer(self, question: str) -> str:
        """Print the answer while it is generated, and return it. Ctrl-C ends it; the partial answer is kept."""
        parts: list[str] = []
        if not question.isascii() and any("\ud800" <= letter <= "\udfff" for letter in question):
            raise UserError("the question is not UTF-8 text", remedy="check the encoding of the terminal or pipe")
        with on_ctrl_c(self.conversation.stop) if is_interactive() else contextlib.nullcontext():
            for part in self.conversation.ask(question, self.sampling):
                parts.append(part)
                print(part, end="", flush=True)
        if self.conversation.stopped:
            print("\nstopped", end="", file=sys.stderr)
        print(flush=True)
        return "".join(parts)

    def run(self) -> None:
        """Handle lines until /quit or the end of input.

        Raises:
            UserError: at the end of a pipe, if lines were rejected.
        """
        rejected = 0
        interactive = is_interactive()
        if interactive:
            import readline  # noqa: F401  # line editing and history of input()

            print("Ask a question. /image FILE attaches an image, /help lists all commands, /quit exits.", flush=True)
        while True:
            try:
                line = input("you> " if interactive else "").strip()
            except EOFError:
                break
            except KeyboardInterrupt:
                if not interactive:
                    raise
                notify("\n/quit ends the program")
                continue
            if line == "/quit":
                break
            try:
                self.handle(line)
            except (UserError, MemoryError, torch.OutOfMemoryError) as error:  # the conversation continues
                rejected += 1
                known = isinstance(error, UserError)
                notify(f"error: {error if known else 'out of memory; /undo, or start with --quantize 4bit'}")
        if rejected and not interactive:
            raise UserError(f"{rejected} input lines were rejected, see above", remedy="correct them and run again")

    def handle(self, line: str) -> None:
        """Handle one line: dropped images, a command, or a question."""
        command, _, rest = line.partition(" ")
        rest = rest.strip()
        if dropped := dropped_files(line):
            self._attach_and_notify(dropped)
            return
        match command:
            case "":
                pass
            case "/help":
                notify(HELP)
            case "/image":
                unquoted = Path(rest).expanduser().is_file()  # one path with blanks that were not quoted or escaped
                self._attach_and_notify([rest] if unquoted else parse_paths(rest, command, "photo.png"))
            case "/system":
                self.conversation.system = rest or None
                self.conversation.reset()
                notify(f"system prompt {'set' if rest else 'removed'}; the conversation starts over")
            case "/undo":
                notify(f"removed: {self.undo()}")
            case "/retry":
                self.answer(self.conversation.undo())
            case "/reset":
                self.conversation.reset()
                notify("the conversation starts over")
            case "/save":
                self.save(parse_path(rest, command))
            case "/load":
                self.load(parse_path(rest, command))
            case "/params":
                self.sampling = with_parameters(self.sampling, rest)
                notify(", ".join(f"{name}={getattr(self.sampling, name)}" for name in PARAMETERS))
            case _ if command.startswith("/"):
                raise UserError("no such command", key=command, remedy="/help lists all commands")
            case _:
                self.answer(line)

    def _attach_and_notify(self, files: list[str]) -> None:
        self.attach(files)
        notify(f"{len(self.conversation.pending_images)} image(s) attached to the next question")

    def save(self, file: Path) -> None:
        """Write the conversation as LLaVA JSON with one row. Only an earlier save is overwritten."""
        check_overwritable(file)
        row = self.conversation.to_row(f"{file.stem}-{int(time.time())}")
        try:
            write_text(file, json.dumps([row], indent=1, ensure_ascii=False))
        except OSError as error:
            raise UserError(f"cannot be written ({error.strerror})", file=file, remedy="use another folder") from error
        skipped = self.conversation.unanswered
        notify(f"saved to {file}" + (f", without {skipped} turn(s) with an empty answer" if skipped else ""))

    def load(self, file: Path) -> None:
        """Continue the first conversation of a LLaVA JSON."""
        rows = read_json(file)
        if not isinstance(rows, list) or not rows:
            raise UserError("not a JSON list, or an empty one", file=file, remedy="choose a file written by /save")
        try:
            self.conversation.load_row(rows[0], file.parent)
        except UserError as error:
            raise UserError(f"first row: {error}", file=file) from error
        loaded = f"{len(self.conversation.turns) // 2} turn(s) and {len(self.conversation.images)} image(s) loaded"
        notify(loaded + (f", the first of {len(rows)} conversations" if len(rows) > 1 else ""))


def check_overwritable(file: Path) -> None:
    """Raise UserError if the file contains anything other than one saved conversation."""
    if not file.exists():
        return
    try:
        rows = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        rows = None
    if not (isinstance(rows, list) and len(rows) == 1 and isinstance(rows[0], dict) and "conversations" in rows[0]):
        raise UserError("exists and is not a saved conversation", file=file, remedy="choose another file")


@contextlib.contextmanager
def on_ctrl_c(call: Callable[[], None]) -> Iterator[None]:
    """Call a function on Ctrl-C; a KeyboardInterrupt at an arbitrary place could lose text or be swallowed."""
    before = signal.signal(signal.SIGINT, lambda *_: call())
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def parse_paths(text: str, command: str, example: str) -> list[str]:
    """Split like a shell. Raises UserError if there is no path, or an unclosed quote."""
    try:
        paths = shlex.split(text)
    except ValueError as error:
        remedy = f"quote paths with blanks: {command} 'my {example}'"
        raise UserError(str(error), key=command, remedy=remedy) from error
    if not paths:
        raise UserError("the file is missing", key=command, remedy=f"name it: {command} {example}")
    return paths


def parse_path(text: str, command: str) -> Path:
    """Parse the only path of a command. Raises UserError if there are more."""
    paths = parse_paths(text, command, "chat.json")
    if len(paths) > 1:
        remedy = f"quote paths with blanks: {command} 'my chat.json'"
        raise UserError(f"expected one file, not {len(paths)}", key=command, remedy=remedy)
    return Path(paths[0]).expanduser()


def is_interactive() -> bool:
    """Return True if stdin is a terminal."""
    return sys.stdin is not None and sys.stdin.isatty()


def dropped_files(line: str) -> list[str]:
    """Return the files of a line that consists of paths or file:// URLs only, as terminals insert dropped files.

    Raises:
        UserError: image paths that do not exist.
    """
    try:
        words = shlex.split(line)
    except ValueError:
        return []
    paths = [unquote(urlparse(word).path) if word.startswith("file://") else word for word in words]
    if os.path.isfile(line):  # blanks that were not escaped
        paths = [line]
    # A one-word question could equal the name of a file, so without a suffix it must look like a path.
    path_like = line.startswith((".", "/", "'", '"', "~", "file://"))
    named = all(path_like or Path(path).suffix for path in paths)
    missing = [path for path in paths if not os.path.isfile(os.path.expanduser(path))]
    if missing and all(Path(path).suffix.lower() in ENDINGS for path in paths):
        raise UserError("no such image", file=missing[0], remedy="check the path")
    return paths if named and not missing else []


def with_parameters(sampling: Sampling, text: str) -> Sampling:
    """Apply `name=value` pairs. Raises UserError for unknown names and invalid values."""
    new = {}
    for word in text.split():
        name, _, value = word.partition("=")
        if name not in PARAMETERS:
            raise UserError("no such parameter", key=name, remedy=f"choose from {', '.join(PARAMETERS)}")
        try:
            new[name] = PARAMETERS[name](value)
        except ValueError as error:
            raise UserError("not a number", key=name, value=value, remedy=f"set a number: {name}=1") from error
    return dataclasses.replace(sampling, **new)


def notify(line: str) -> None:
    """Print a message that is not part of an answer."""
    print(line, file=sys.stderr, flush=True)
