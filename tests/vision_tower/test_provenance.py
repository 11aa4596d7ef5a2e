"""provenance.json and the hashes in it."""

from __future__ import annotations

import hashlib
from importlib.metadata import version
from pathlib import Path

import pytest

from vision_tower.common import hashes
from vision_tower.common.hashes import file_hash, value_hash
from vision_tower.common.provenance import (
    FILE,
    command_line,
    describe_input,
    finish_provenance,
    git_revision,
    read_provenance,
    start_provenance,
)


def test_provenance_records_the_process_its_inputs_and_its_outputs(tmp_path: Path) -> None:
    (source := tmp_path / "vocab.txt").write_text("a\n")
    folder = tmp_path / "out"
    start_provenance(
        folder, "convert", ["a b"], {"vocabulary": str(source), "tower": None, "llm": "owner/name"}, seed=3
    )
    assert "outputs" not in read_provenance(folder)
    (folder / "model.safetensors").write_bytes(b"weights")
    finish_provenance(folder)
    found = read_provenance(folder)
    assert found["command"] == "clips-mllm convert 'a b'" and found["seed"] == 3 and found["ranks"] == 1
    assert found["versions"]["torch"] == version("torch") and found["hardware"]["cpus"] > 0
    assert found["inputs"] == {
        "vocabulary": {"name": str(source), "path": str(source), "sha256": file_hash(source)},
        "llm": {"name": "owner/name"},
    }
    assert found["outputs"] == {"model.safetensors": hashlib.sha256(b"weights").hexdigest()}
    assert describe_input(str(folder))["sha256"] == file_hash(folder / FILE), "a folder is known by its provenance"


def test_command_is_quoted_for_the_shell() -> None:
    assert command_line("train", ["--output_dir", "a b"]) == "clips-mllm train --output_dir 'a b'"


def test_git_revision_does_not_depend_on_the_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here = git_revision()
    monkeypatch.chdir(tmp_path)
    assert git_revision() == here


def test_file_hash_of_shards_is_that_of_their_concatenation(tmp_path: Path) -> None:
    for name, content in (("a", b"one"), ("b", b"two")):
        (tmp_path / name).write_bytes(content)
    assert file_hash(tmp_path / "a", tmp_path / "b") == hashlib.sha256(b"onetwo").hexdigest()


def test_value_hash_ignores_the_order_of_keys() -> None:
    assert value_hash({"a": 1, "b": 2}) == value_hash({"b": 2, "a": 1}) != value_hash({"a": 1, "b": 3})


def test_ends_hash_reads_size_beginning_and_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hashes, "BLOCK", 4)
    file = tmp_path / "part.parquet"

    def hash_of(content: bytes) -> str:
        file.write_bytes(content)
        return hashes.ends_hash(file)

    one = hash_of(b"headmiddlefoot")
    assert hash_of(b"headMIDDLEfoot") == one
    assert len({one, hash_of(b"headmiddlefood"), hash_of(b"heapmiddlefoot"), hash_of(b"headmiddle foot")}) == 4
    assert hash_of(b"abc") != hash_of(b"abd")
