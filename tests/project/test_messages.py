"""The wording of error messages: the only test that compares it, with the snapshot in messages.txt.

Other tests assert the exit code and the fields of an error. After a change of wording run

    UPDATE_MESSAGES=1 python -m pytest tests/project/test_messages.py

and review the difference of messages.txt.
"""

from __future__ import annotations

import os
import shlex
from pathlib import Path

import pytest

from clips_mllm import cli
from vision_tower.common.errors import run_command

SNAPSHOT = Path(__file__).with_name("messages.txt")
TRAIN = "train --output_dir run --model.tower tower --model.llm llm --data.template plain --data.file rows.json"
# Typical mistakes, at least one per command. They are made in an empty folder with the files of FILES.
COMMANDS = [
    "trian",
    "data sample --config none.yaml",
    "data sample --seed many",
    "data doctor none.json",
    "data doctor empty.json",
    "data preview none.json --template plain",
    "pretrain --config unknown_key.yaml",
    "pretrain --config renamed_key.yaml",
    "pretrain --config wrong_type.yaml",
    "pretrain --config broken.yaml",
    "pretrain --config list.yaml",
    "convert none out --to clips",
    f"{TRAIN} --training.learning_rat 1",
    f"{TRAIN} --training.max_steps many",
    f"{TRAIN} --verbose --quiet",
    TRAIN,
    "inspect none",
    "plan --config none.yaml",
    "merge none out",
    "retrieve none --data none.json",
    "zeroshot none --data none",
    "evaluate none --tasks '[{task: mme}]'",
    "ablate --config none.yaml",
    "compare runs --config none.yaml",
    "report none",
    "chat",
    "chat none --question ?",
    "chat owner/name --temperature -1",
    "web none",
    "serve owner/name --port 70000",
]
FILES = {
    "unknown_key.yaml": "data: {shardz: a.tar}",
    "renamed_key.yaml": "model: {joint: 64}",
    "wrong_type.yaml": "training: {max_steps: many}",
    "broken.yaml": "data: [1",
    "list.yaml": "- 1",
    "empty.json": "",
}


def test_messages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    for name, text in FILES.items():
        (tmp_path / name).write_text(text)
    lines = []
    for command in COMMANDS:
        code = run_command(cli.main, shlex.split(command))
        errors = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error: ")]
        lines += [f"$ clips-mllm {command}", *errors, f"exit code {code}", ""]
    text = "\n".join(lines).replace(str(tmp_path), "TMP")
    if "UPDATE_MESSAGES" in os.environ:
        SNAPSHOT.write_text(text)
    assert text == SNAPSHOT.read_text()
    assert {name.split()[0] for name in cli.COMMANDS} <= {command.split()[0] for command in COMMANDS}
