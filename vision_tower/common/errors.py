"""User-facing errors, and `run_command`, which prints them and sets the exit code.

main(argv) --UserError, Stopped, full disk, ...--> EXITS --> one line on stderr, exit code
           --any other exception--> traceback
"""

from __future__ import annotations

import errno
import os
import re
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from vision_tower.common.logs import log_to_stderr, silence_noisy_libraries


class UserError(ValueError):
    """Bad user input, printed by `run_command` as one line: `FILE: KEY=VALUE: problem; remedy`.

    Args:
        problem: what is wrong.
        file: the file or folder at fault.
        key: the recipe field, option, column or JSON key at fault.
        value: the rejected value of `key`.
        remedy: what the user can do about it.
    """

    def __init__(
        self,
        problem: str,
        *,
        file: object = None,
        key: str | None = None,
        value: object = None,
        remedy: str | None = None,
    ) -> None:
        self.problem, self.key, self.value, self.remedy = problem, key, value, remedy
        self.file = None if file is None else str(file)
        field = key if value is None else f"{key}={value}"
        message = ": ".join(part for part in (self.file, field, problem) if part)
        super().__init__(f"{message}; {remedy}" if remedy else message)


class NotFinite(ValueError):
    """An embedding contains NaN or infinity, which would make every score meaningless."""


class Stopped(BaseException):
    """A signal ended the command early without loss of work. The message says how to continue, in one line.

    Not an Exception, like KeyboardInterrupt: libraries that retry after an Exception would swallow it.
    """


def run_command(main: Callable[[list[str]], None], argv: list[str] | None = None) -> int:
    """Run `main(argv)` as a process's command and return its exit code.

    Sets up logging, prints expected errors as one line (EXITS), and lets any other exception pass with its traceback.
    After SIGTERM the code is 0, as after success; a caller that must know sets the environment variable STOPPED_FILE
    to a path, which is then created.
    """
    argv = sys.argv[1:] if argv is None else argv
    remove_package_folder_from_path()
    silence_noisy_libraries()
    try:
        with log_to_stderr(argv):
            main(argv)
    except Stopped as stop:
        _print_line(str(stop))
        if "STOPPED_FILE" in os.environ:
            Path(os.environ["STOPPED_FILE"]).touch()
    except BrokenPipeError:  # the reader of stdout, such as `head`, has ended
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python's last flush would raise again
        return 128 + signal.SIGPIPE
    except BaseException as error:
        expected = next((case for case in EXITS if case.matches(error)), None)
        if expected is None:
            raise
        _print_line(f"error: {expected.line(error)}")
        return expected.code
    return 0


def remove_package_folder_from_path() -> None:
    """Undo what Python does for `python eval/clips_eval/evaluate.py`: the script's folder is first on `sys.path`.

    There `evaluate.py` would be imported instead of the installed package `evaluate`.
    """
    if sys.path and (Path(sys.path[0]) / "__init__.py").is_file():
        del sys.path[0]


@dataclass(frozen=True)
class Exit:
    """An expected end of a command: which errors it applies to, the exit code, and the line to print."""

    matches: Callable[[BaseException], bool]
    code: int
    line: Callable[[Any], str]


def disk_is_full(error: BaseException) -> bool:
    """Return True if a write failed for lack of space; safetensors and torch raise their own errors for it."""
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return True
    text = str(error)  # torch's writer reports only the file position that it did not reach
    full = "No space left on device" in text or ("inline_container.cc" in text and "unexpected pos" in text)
    return isinstance(error, Exception) and full


def another_rank_died(error: BaseException) -> bool:
    """Return True if a collective of gloo or NCCL failed because the process at the other end is gone."""
    messages = ("Connection closed by peer", "Connection reset by peer", "remote process exited")
    return isinstance(error, RuntimeError) and any(message in str(error) for message in messages)


def _not_writable(error: BaseException) -> bool:
    return isinstance(error, OSError) and error.errno in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR)


def extra_of(module: str | None) -> str | None:
    """Return the extra of this package (`train`, `web`, ...) that installs a module, or None."""
    name = (module or "").partition(".")[0].replace("_", "-").lower()
    for line in metadata.requires("clips-mllm") or []:
        found = re.match(r"([\w.-]+).*extra == ['\"]([\w-]+)['\"]", line)
        if found and found[1].lower() == name and found[2] != "dev":
            return found[2]
    return None


def _extra_is_missing(error: BaseException) -> bool:
    return isinstance(error, ModuleNotFoundError) and extra_of(error.name) is not None


def _user_line(error: UserError) -> str:
    # A DataLoader worker's error is raised again with its traceback as the message, which ends with our line.
    return " ".join(str(error).rpartition(f"{UserError.__name__}: ")[2].split())


def _folder(error: BaseException) -> str:
    return getattr(error, "filename", None) or "the output folder"


# The first match counts.
EXITS = (
    Exit(lambda error: isinstance(error, UserError), 2, _user_line),
    Exit(
        lambda error: isinstance(error, KeyboardInterrupt),
        128 + signal.SIGINT,
        lambda _: "interrupted; saved work is kept, and the same command continues from there",
    ),
    Exit(
        _extra_is_missing,
        2,
        lambda error: f"{error.name} is not installed; pip install 'clips-mllm[{extra_of(error.name)}]'",
    ),
    Exit(
        another_rank_died,
        1,
        lambda _: "another rank of this run died, see its messages above; fix that and run the same command again",
    ),
    Exit(
        _not_writable,
        2,
        lambda error: f"{_folder(error)}: {error.strerror}; check the permissions, or choose another folder",
    ),
    Exit(
        disk_is_full,
        28,
        lambda error: f"{_folder(error)}: no space left on the device; free some space and run the same command again",
    ),
)


def _print_line(line: str) -> None:
    _close_progress_bars()
    print(line, file=sys.stderr, flush=True)


def _close_progress_bars() -> None:
    """Close the tqdm bars that an error interrupted, so that the next message starts on a line of its own."""
    bars = sys.modules.get("tqdm")
    for bar in list(getattr(bars.tqdm, "_instances", ())) if bars is not None else ():
        bar.close()
