"""Errors a user can mend, and the one place where a command turns them into a line and an exit code."""

from __future__ import annotations

import errno
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

from vision_tower.common.logs import log_to_stderr, silence_noisy_libraries

NOT_WRITABLE = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR)


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
        place = key if value is None else f"{key}={value}"
        message = ": ".join(part for part in (self.file, place, problem) if part)
        super().__init__(f"{message}; {remedy}" if remedy else message)


class NotFinite(ValueError):
    """An embedding holds NaN or infinity: it loses no comparison, or wins all, and scores would mean nothing."""


class Stopped(BaseException):
    """A signal ended the command early, and nothing is lost. The message says how to go on, in one line.

    As KeyboardInterrupt no Exception: libraries that try again after one would swallow it.
    """


def run_command(main: Callable[[list[str]], None], argv: list[str] | None = None) -> int:
    """Run `main(argv)` and return its exit code: 0, also for SIGTERM after a saved checkpoint; 1 where another rank
    died, 2 for bad input, 28 for a full disk, 130 for Ctrl-C, 141 where nobody reads the output any more.

    Anything else is our bug and keeps its traceback. A stop is told to the caller's file STOPPED_FILE, where there is
    one, since the code does not tell it from an end.
    """
    argv = sys.argv[1:] if argv is None else argv
    silence_noisy_libraries()
    try:
        with log_to_stderr(argv):
            main(argv)
    except UserError as error:
        # A loader process hands its error on with its traceback in the message; the line is what it ends with.
        return _fail(" ".join(str(error).rpartition(f"{UserError.__name__}: ")[2].split()), 2)
    except Stopped as stop:
        _end_progress_bars()
        print(stop, file=sys.stderr, flush=True)
        if "STOPPED_FILE" in os.environ:
            Path(os.environ["STOPPED_FILE"]).touch()
        return 0
    except BrokenPipeError:  # whoever read the output, such as `head`, has had enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else Python would complain at its end
        return 128 + signal.SIGPIPE
    except KeyboardInterrupt:
        return _fail("interrupted; what was saved stays, and the same command goes on from there", 128 + signal.SIGINT)
    except Exception as error:
        if another_rank_died(error):
            return _fail("another rank of this run died, see above; once that is mended, the same command goes on", 1)
        where = getattr(error, "filename", None) or "the output folder"
        if isinstance(error, OSError) and error.errno in NOT_WRITABLE:
            return _fail(f"{where}: {error.strerror}; check the path and its permissions, or take another folder", 2)
        if not disk_is_full(error):
            raise
        return _fail(f"{where}: no space left on the device; free some space and run the same command again", 28)
    return 0


def disk_is_full(error: BaseException) -> bool:
    """Whether a write failed for want of space; safetensors and torch raise errors of their own for it."""
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return True
    text = str(error)  # torch's writer tells of the failed write only by the position it did not reach
    return "No space left on device" in text or ("inline_container.cc" in text and "unexpected pos" in text)


def another_rank_died(error: BaseException) -> bool:
    """Whether a collective failed because the process at its other end is gone, in the words of gloo or NCCL."""
    words = ("Connection closed by peer", "Connection reset by peer", "remote process exited")
    return isinstance(error, RuntimeError) and any(said in str(error) for said in words)


def _fail(line: str, code: int) -> int:
    _end_progress_bars()
    print(f"error: {line}", file=sys.stderr, flush=True)
    return code


def _end_progress_bars() -> None:
    """A bar that was stopped halfway has not ended its line, and the error would be written behind it."""
    bars = sys.modules.get("tqdm")
    for bar in list(getattr(bars.tqdm, "_instances", ())) if bars is not None else ():
        bar.close()
