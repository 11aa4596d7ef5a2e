"""Logging of the commands: `--verbose` and `--quiet`, ranks, and what stays untouched."""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path

import pytest

from tests.helpers.errors import raises_user_error
from vision_tower.common.errors import run_command
from vision_tower.common.logs import OUR_LOGGERS
from vision_tower.common.recipe import parse_recipe

MODULE = logging.getLogger("clips_mllm.data.example")
SCRIPT = logging.getLogger("__main__")


@dataclasses.dataclass(frozen=True)
class Empty:
    """A recipe without required fields.

    Args:
        steps: a number.
    """

    steps: int = 1


def log_all(argv: list[str]) -> None:
    """A command that logs one record of each level."""
    assert parse_recipe(Empty, argv, command="try") == Empty()
    MODULE.debug("a detail")
    SCRIPT.info("%d samples", 3)
    MODULE.warning("no evaluation")


@pytest.mark.parametrize(
    ("argv", "rank", "lines"),
    [
        ([], "0", ["3 samples", "warning: no evaluation"]),
        (["--verbose"], "0", ["a detail", "3 samples", "warning: no evaluation"]),
        (["--quiet"], "0", ["warning: no evaluation"]),
        ([], "1", ["warning: no evaluation"]),
        (["--verbose"], "1", ["warning: no evaluation"]),
    ],
)
def test_level_and_format(
    argv: list[str], rank: str, lines: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RANK", rank)
    assert run_command(log_all, argv) == 0
    captured = capsys.readouterr()
    assert captured.err.splitlines() == lines and not captured.out


def test_loggers_are_restored_after_a_command(capsys: pytest.CaptureFixture[str]) -> None:
    """Also after an error, and with a handler of an application on the root logger, which gets no copy meanwhile."""
    root = logging.getLogger()
    before = (root.level, list(root.handlers))

    def fail(argv: list[str]) -> None:
        log_all(argv)
        raise KeyError

    with pytest.raises(KeyError):
        run_command(fail, ["--verbose"])
    assert (root.level, list(root.handlers)) == before
    for name in OUR_LOGGERS:
        logger = logging.getLogger(name)
        assert logger.level == logging.NOTSET and logger.propagate and not logger.handlers


def test_main_as_a_function_configures_nothing(caplog: pytest.LogCaptureFixture) -> None:
    """Records reach the handlers of the embedding application; the options are accepted without effect."""
    with caplog.at_level(logging.INFO):
        log_all(["--quiet"])
    assert [record.getMessage() for record in caplog.records] == ["3 samples", "no evaluation"]


def test_verbose_and_quiet_are_exclusive_and_not_recipe_keys(tmp_path: Path) -> None:
    with raises_user_error():
        parse_recipe(Empty, ["--verbose", "--quiet"], command="try")
    file = tmp_path / "recipe.yaml"
    file.write_text("quiet: true")
    with raises_user_error(file=file):
        parse_recipe(Empty, ["--config", str(file)], command="try")


def test_bitsandbytes_shows_only_errors() -> None:
    run_command(log_all, [])
    assert not logging.getLogger("bitsandbytes").isEnabledFor(logging.WARNING)
