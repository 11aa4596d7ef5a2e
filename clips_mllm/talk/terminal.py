"""A conversation in the terminal, or through a pipe: lines in, answers out. What is no answer goes to stderr."""

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
from vision_tower.common.files import read_text, write_text
from vision_tower.data.image_folder import ENDINGS

HELP = """\
Type a question. Drop an image on the window, type its path alone, or name it with /image.
  /image PATH...   show images with the next question (quotes or \\ before blanks)
  /system [TEXT]   set the system's words, or take them away; starts over
  /undo            take back images that wait for a question, else the last question and its answer
  /retry           ask the last question again
  /reset           start over
  /save FILE       keep the conversation as LLaVA JSON, ready to train on
  /load FILE       go on with a saved conversation
  /params [K=V...] show or set max_new_tokens, temperature, top_p, repetition_penalty, seed
  /quit            end. Ctrl-C ends an answer, not the program."""
PARAMETERS = {"max_new_tokens": int, "temperature": float, "top_p": float, "repetition_penalty": float, "seed": int}


class Terminal:
    """Commands and questions, one a line."""

    def __init__(self, engine: Engine, sampling: Sampling, system: str | None = None) -> None:
        self.conversation = Conversation(engine, notice)
        self.sampling = sampling
        self.system = system
        self.reset()

    def reset(self) -> None:
        """Start over; the system's words stay."""
        self.conversation.reset()
        self.conversation.system = self.system

    def show(self, files: list[str]) -> None:
        """Show images with the next question: all of them, or none where one cannot be read."""
        self.conversation.waiting += [read_image(Path(file)) for file in files]

    def show_next(self, files: list[str]) -> None:
        """Show images with the next question, and say so."""
        self.show(files)
        notice(f"{len(self.conversation.waiting)} image(s) to be shown with the next question")

    def undo(self) -> str:
        """Take back what was done last; returns what it was. Images of a question wait for the next one."""
        if waiting := len(self.conversation.waiting):
            self.conversation.waiting = []
            return f"{waiting} image(s)"
        question = self.conversation.undo()
        waiting = len(self.conversation.waiting)
        return question + (f" ({waiting} image(s) wait for the next question)" if waiting else "")

    def answer(self, question: str) -> str:
        """Print the answer as it comes, and return it. Ctrl-C ends it; what was said stays in the conversation."""
        said: list[str] = []
        if not question.isascii() and any("\ud800" <= letter <= "\udfff" for letter in question):
            raise UserError(
                "the question is not UTF-8 text", remedy="check the terminal's encoding, or that of the pipe"
            )
        with ctrl_c(self.conversation.stop) if interactive() else contextlib.nullcontext():
            for piece in self.conversation.ask(question, self.sampling):
                said.append(piece)
                print(piece, end="", flush=True)
        if self.conversation.stopped:
            print("\nstopped", end="", file=sys.stderr)
        print(flush=True)
        return "".join(said)

    def talk(self) -> None:
        """Until /quit or the end of the input.

        Raises:
            UserError: at the end of a pipe, where some of its lines were refused.
        """
        refused = 0
        terminal = interactive()
        if terminal:
            import readline  # noqa: F401  # editing and history of input()

            print("Ask a question. /image FILE shows an image, /help lists all commands, /quit ends.", flush=True)
        while True:
            try:
                line = input("you> " if terminal else "").strip()
            except EOFError:
                break
            except KeyboardInterrupt:
                if not terminal:
                    raise
                print("\n/quit ends the program", file=sys.stderr, flush=True)
                continue
            if line == "/quit":
                break
            try:
                self.obey(line)
            except (UserError, MemoryError, torch.OutOfMemoryError) as error:  # neither ends the talk
                refused += 1
                told = error if isinstance(error, UserError) else "out of memory; /undo, or start with --quantize 4bit"
                print(f"error: {told}", file=sys.stderr, flush=True)
        if refused and not terminal:
            raise UserError(f"{refused} of the lines could not be used, see above", remedy="mend them and ask again")

    def obey(self, line: str) -> None:
        """One line: dropped images, a command, or a question."""
        command, _, rest = line.partition(" ")
        rest = rest.strip()
        if dropped := dropped_files(line):
            self.show_next(dropped)
            return
        match command:
            case "":
                pass
            case "/help":
                notice(HELP)
            case "/image":
                whole = Path(rest).expanduser().is_file()  # blanks that were neither quoted nor escaped
                self.show_next([rest] if whole else words(rest, command, "photo.png"))
            case "/system":
                self.system = rest or None
                self.reset()
                notice("the system's words are " + ("set" if rest else "gone") + "; the conversation starts over")
            case "/undo":
                notice(f"taken back: {self.undo()}")
            case "/retry":
                self.answer(self.conversation.undo())
            case "/reset":
                self.reset()
                notice("the conversation starts over")
            case "/save":
                self.save(one_file(rest, command))
            case "/load":
                self.load(one_file(rest, command))
            case "/params":
                self.sampling = changed(self.sampling, rest)
                notice(", ".join(f"{name}={getattr(self.sampling, name)}" for name in PARAMETERS))
            case _ if command.startswith("/"):
                raise UserError(f"{command}: no such command", remedy="/help lists them")
            case _:
                self.answer(line)

    def save(self, file: Path) -> None:
        """Write the conversation as a LLaVA JSON of one row; other files are not written over."""
        check_replaceable(file)
        row = self.conversation.to_row(f"{file.stem}-{int(time.time())}")
        try:
            write_text(file, json.dumps([row], indent=1, ensure_ascii=False))
        except OSError as error:
            raise UserError(f"cannot be written ({error.strerror})", file=file, remedy="take another place") from error
        left_out = self.conversation.unanswered
        notice(f"saved to {file}" + (f", without {left_out} turn(s) that had no answer" if left_out else ""))

    def load(self, file: Path) -> None:
        """Go on with the first row of a LLaVA JSON."""
        try:
            rows = json.loads(read_text(file))
        except json.JSONDecodeError as error:
            raise UserError(
                f"line {error.lineno}: not valid JSON ({error.msg})", file=file, remedy="mend the file"
            ) from error
        if not isinstance(rows, list) or not rows:
            raise UserError("expected a JSON list of conversations", file=file, remedy="mend the file")
        try:
            self.conversation.load_row(rows[0], file.parent)
        except UserError as error:
            raise UserError(f"{error}", file=file) from error
        self.system = self.conversation.system
        loaded = f"{len(self.conversation.turns) // 2} turn(s) and {len(self.conversation.images)} image(s) loaded"
        notice(loaded + (f", the first of {len(rows)} conversations" if len(rows) > 1 else ""))


def check_replaceable(file: Path) -> None:
    """Raise UserError where the file holds anything but one saved conversation."""
    if not file.exists():
        return
    try:
        rows = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        rows = None
    if not (isinstance(rows, list) and len(rows) == 1 and isinstance(rows[0], dict) and "conversations" in rows[0]):
        raise UserError("is there already and is not one saved conversation", file=file, remedy="take another name")


@contextlib.contextmanager
def ctrl_c(act: Callable[[], None]) -> Iterator[None]:
    """Ctrl-C calls `act`, instead of raising an exception at whatever place it strikes, which can lose it."""
    before = signal.signal(signal.SIGINT, lambda *_: act())
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def words(text: str, command: str, example: str) -> list[str]:
    """Paths as a shell would read them. Raises UserError where there is none, or a quote stays open."""
    try:
        found = shlex.split(text)
    except ValueError as error:
        raise UserError(
            f"{command}: {error}", remedy=f"quote a path with blanks, as in {command} 'my {example}'"
        ) from error
    if not found:
        raise UserError(f"{command}: name a file, as in '{command} {example}'")
    return found


def one_file(text: str, command: str) -> Path:
    """The one path of a command. Raises UserError where there are more."""
    found = words(text, command, "chat.json")
    if len(found) > 1:
        raise UserError(
            f"{command}: one file, not {len(found)}", remedy=f"quote a path with blanks, as in {command} 'my chat.json'"
        )
    return Path(found[0]).expanduser()


def interactive() -> bool:
    """Whether a person types here."""
    return sys.stdin is not None and sys.stdin.isatty()


def dropped_files(line: str) -> list[str]:
    """The files of a line that is nothing but paths or file:// addresses, as terminals type dropped files.

    Raises:
        UserError: paths of images that are not there.
    """
    try:
        found = shlex.split(line)
    except ValueError:
        return []
    paths = [unquote(urlparse(word).path) if word.startswith("file://") else word for word in found]
    if os.path.isfile(line):  # blanks that were not escaped
        paths = [line]
    # A question may be a single word, and there may be a file of that name; images have endings.
    path_like = line.startswith((".", "/", "'", '"', "~", "file://"))
    named = all(path_like or Path(path).suffix for path in paths)
    gone = [path for path in paths if not os.path.isfile(os.path.expanduser(path))]
    if gone and all(Path(path).suffix.lower() in ENDINGS for path in paths):
        raise UserError(f"{gone[0]}: no such image", remedy="check the path")
    return paths if named and all(os.path.isfile(os.path.expanduser(path)) for path in paths) else []


def changed(sampling: Sampling, text: str) -> Sampling:
    """Sampling with `name=value` pairs applied. Raises UserError for other names and values."""
    new = {}
    for word in text.split():
        name, _, value = word.partition("=")
        if name not in PARAMETERS:
            raise UserError(f"/params: no '{name}'", remedy=f"there are {', '.join(PARAMETERS)}")
        try:
            new[name] = PARAMETERS[name](value)
        except ValueError as error:
            raise UserError(f"/params: {name} takes a number, as in {name}=1, not '{value}'") from error
    return dataclasses.replace(sampling, **new)


def notice(line: str) -> None:
    """Tell the person something that is no answer."""
    print(line, file=sys.stderr, flush=True)
