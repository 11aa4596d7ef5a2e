"""Errors a user can mend, and the one place where a command turns them into a line and an exit code."""

from __future__ import annotations

import errno
import os
import signal
import sys
from collections.abc import Callable


class UserError(ValueError):
    """Bad input. The message names the file, the place and the remedy, in one line."""


def run_command(main: Callable[[list[str]], None], argv: list[str] | None = None) -> int:
    """Run `main(argv)` and return its exit code: 0, 2 for bad input, 28 for a full disk, 130 for Ctrl-C.

    Anything else is our bug and keeps its traceback.
    """
    try:
        main(sys.argv[1:] if argv is None else argv)
    except UserError as error:
        return _fail(" ".join(str(error).split()), 2)
    except KeyboardInterrupt:
        return _fail("interrupted; run the same command again to go on from the last checkpoint", 128 + signal.SIGINT)
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        where = error.filename or os.getcwd()
        return _fail(f"{where}: no space left on the device; free some space and run the same command again", 28)
    return 0


def _fail(line: str, code: int) -> int:
    print(f"error: {line}", file=sys.stderr, flush=True)
    return code
