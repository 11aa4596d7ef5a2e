"""Logging of the commands: plain messages on stderr, level by `--verbose` and `--quiet`.

Modules log to `logging.getLogger(__name__)`. Importing them, or calling `main(argv)` as a function, configures nothing;
`run_command` does, for the time of the command.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

from vision_tower.common.launcher import is_main_process

# A command file that runs as a script or by `python -m` is named `__main__`.
OUR_LOGGERS = ("vision_tower", "clips_mllm", "clips_eval", "__main__")
# bitsandbytes warns at every import that an optional CPU kernel is missing, and at every 8-bit matrix product that it
# casts its input.
QUIET_LIBRARIES = ("bitsandbytes",)


class PlainFormatter(logging.Formatter):
    """`message` for debug and info, `warning: message` and `error: message` above."""

    def format(self, record: logging.LogRecord) -> str:
        text = super().format(record)
        return f"{record.levelname.lower()}: {text}" if record.levelno >= logging.WARNING else text


@contextmanager
def log_to_stderr(argv: list[str]) -> Iterator[None]:
    """Write the records of our loggers to stderr until the block ends; the root logger stays as it is.

    Args:
        argv: the command line. Debug records are shown with `--verbose`, warnings only with `--quiet` and on ranks
            other than 0.
    """
    handler = logging.StreamHandler()
    handler.setFormatter(PlainFormatter())
    loggers = [logging.getLogger(name) for name in OUR_LOGGERS]
    before = [(logger.level, logger.propagate) for logger in loggers]
    for logger in loggers:
        logger.addHandler(handler)
        logger.setLevel(_level(argv))
        logger.propagate = False  # libraries such as absl put a handler on the root logger: lines would come twice
    try:
        yield
    finally:
        for logger, (level, propagate) in zip(loggers, before, strict=True):
            logger.removeHandler(handler)
            logger.setLevel(level)
            logger.propagate = propagate


def silence_noisy_libraries() -> None:
    """Show only errors of libraries that warn about things a user cannot change (QUIET_LIBRARIES)."""
    for name in QUIET_LIBRARIES:
        logging.getLogger(name).setLevel(logging.ERROR)


def _level(argv: list[str]) -> int:
    if "--quiet" in argv or not is_main_process():
        return logging.WARNING
    return logging.DEBUG if "--verbose" in argv else logging.INFO
