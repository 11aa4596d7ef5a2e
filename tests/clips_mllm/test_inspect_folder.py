"""`clips-mllm inspect`: kinds of folders, provenance of a training run, and changes since."""

from __future__ import annotations

import hashlib
import json
import shutil
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

from clips_mllm.inspect_folder import main
from clips_mllm.train import main as train
from tests.helpers.errors import raises_user_error
from vision_tower.training.run_folder import latest_checkpoint


def inspect(folder: Path, capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, Any]:
    capsys.readouterr()
    main([str(folder), "--json", *words])
    return dict(json.loads(capsys.readouterr().out))


@pytest.fixture(scope="module")
def runs(sample_world: Path, encoder_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Stage 1 with a checkpoint, then stage 2 from it."""
    folder = tmp_path_factory.mktemp("runs")
    common = ["--data.images", str(sample_world / "llava" / "images"), "--data.template", "chatml"]
    common += ["--training.global_batch_size", "4", "--training.device_batch_size", "4", "--training.max_steps", "2"]
    common += ["--training.workers", "0", "--training.precision", "fp32", "--training.save_every", "1"]
    first = ["--model.tower", str(encoder_dir / "tower"), "--model.llm", str(sample_world / "llm")]
    first += ["--data.file", str(sample_world / "llava" / "stage1.json"), "--output_dir", str(folder / "align")]
    train([*first, *common])
    second = ["--model.checkpoint", str(folder / "align"), "--output_dir", str(folder / "finetune")]
    second += ["--data.file", str(sample_world / "llava" / "stage2.json"), "--stage.llm", "true"]
    train([*second, *common])
    return folder


def test_provenance_records_the_inputs_of_a_run(
    runs: Path, sample_world: Path, encoder_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    align, finetune = inspect(runs / "align", capsys), inspect(runs / "finetune", capsys)
    assert align["kind"] == finetune["kind"] == "mllm"
    assert (align["facts"]["stage"], finetune["facts"]["stage"]) == ("align", "finetune")
    first, second = align["provenance"], finetune["provenance"]
    assert first["parts"]["tower"]["hash"] == second["parts"]["tower"]["hash"], "frozen"
    assert first["parts"]["llm"]["hash"] == second["parts"]["llm"]["hash"], "frozen in stage 1"
    assert first["parts"]["projector"]["hash"] != second["parts"]["projector"]["hash"], "trained in stage 1"
    assert first["tokenizer"] == second["tokenizer"] and first["template"]["name"] == "chatml"
    assert first["data"]["sources"][0]["bytes"] == (sample_world / "llava" / "stage1.json").stat().st_size
    assert first["command"].startswith("clips-mllm train ") and first["versions"]["torch"] == version("torch")
    assert first["recipe_sha256"] == hashlib.sha256((runs / "align" / "recipe.yaml").read_bytes()).hexdigest()
    roles = {(entry["depth"], entry["role"]): entry for entry in finetune["origin"]}
    assert roles[0, "checkpoint"]["kind"] == "mllm" and not roles[0, "checkpoint"]["changed_since"]
    assert roles[1, "tower"]["kind"] == "tower" and roles[1, "llm"]["kind"] == "llm"
    assert roles[2, "encoder"]["kind"] == "encoder"
    assert finetune["facts"]["parameters"]["projector"] > 0


def test_text_output_names_parts_and_origin(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    about = inspect(runs / "finetune", capsys)
    main([str(runs / "finetune")])
    text = capsys.readouterr().out
    assert about["line"] in text and about["provenance"]["command"] in text
    assert all(part["hash"] in text for part in about["provenance"]["parts"].values())
    assert all(f"from {entry['role']} {entry['name']}" in text for entry in about["origin"])


def test_intermediate_checkpoint_has_the_kind_of_its_weights(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = inspect(runs / "align" / "checkpoint-2", capsys)
    assert (found["kind"], found["facts"]["step"], found["facts"]["run"]) == ("mllm", 2, str(runs / "align"))
    assert found["origin"][0]["role"] == "tower" and found["provenance"]["stage"] == "align"


def test_checkpoint_without_weights_belongs_to_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "checkpoint-3").mkdir()
    (tmp_path / "checkpoint-3" / "trainer_state.json").write_text('{"global_step": 3}')
    found = inspect(tmp_path / "checkpoint-3", capsys)
    assert (found["kind"], found["facts"]["step"]) == ("run", 3)


def test_renamed_copies_of_checkpoints_are_not_resumed_from(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("checkpoint-20", "checkpoint-3", "checkpoint-20-backup", "checkpoint-best"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "trainer_state.json").write_text("{}")
    (tmp_path / "recipe.yaml").write_text("{}")
    assert latest_checkpoint(tmp_path) == str(tmp_path / "checkpoint-20")
    assert inspect(tmp_path, capsys)["facts"] == {"checkpoints": [3, 20]}


def test_changed_inputs_and_outputs_are_detected(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(runs, tmp_path / "runs")
    record = tmp_path / "runs" / "finetune" / "provenance.json"
    values = json.loads(record.read_text())
    values["inputs"]["checkpoint"]["path"] = str(tmp_path / "runs" / "align")
    record.write_text(json.dumps(values))
    assert not inspect(tmp_path / "runs" / "finetune", capsys)["origin"][0]["changed_since"]
    (tmp_path / "runs" / "align" / "provenance.json").write_text("{}")
    assert inspect(tmp_path / "runs" / "finetune", capsys)["origin"][0]["changed_since"]
    assert inspect(tmp_path / "runs" / "finetune", capsys, "--verify")["verified"] == ["model.safetensors"]
    weights = tmp_path / "runs" / "finetune" / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    with raises_user_error(file=weights):
        main([str(tmp_path / "runs" / "finetune"), "--verify"])


def test_kinds_of_folders(
    sample_world: Path, encoder_dir: Path, mllm_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for folder, kind in (
        (sample_world / "llm", "llm"),
        (encoder_dir, "encoder"),
        (encoder_dir / "tower", "tower"),
        (mllm_dir, "mllm"),
    ):
        assert inspect(folder, capsys)["kind"] == kind
    for name, files, kind in (
        ("clip", {"open_clip_config.json": {"model_cfg": {"vision_cfg": {"width": 64}}}}, "encoder"),
        ("adapter", {"adapter_config.json": {"r": 8, "peft_type": "LORA"}}, "adapter"),
        ("lora", {"adapter_config.json": {}, "non_lora_trainables.bin": {}}, "adapter"),
        (
            "original",
            {
                "config.json": {"model_type": "llava_llama", "mm_vision_tower": "x"},
                "pytorch_model-00001-of-00001.bin": {},
            },
            "mllm",
        ),
        ("projector", {"mm_projector.bin": {}}, "mllm"),
        ("begun", {"recipe.yaml": {}, "checkpoint-7/trainer_state.json": {}}, "run"),
    ):
        for file, value in files.items():
            (tmp_path / name / file).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name / file).write_text(json.dumps(value))
        found = inspect(tmp_path / name, capsys)
        assert found["kind"] == kind, name
        assert found["line"]
    assert inspect(tmp_path / "begun", capsys)["facts"] == {"checkpoints": [7]}


def test_unknown_and_damaged_folders_are_refused(mllm_dir: Path, tmp_path: Path) -> None:
    with raises_user_error(file=tmp_path / "nowhere"):
        main([str(tmp_path / "nowhere")])
    (tmp_path / "holiday.jpg").touch()
    with raises_user_error(file=tmp_path) as caught:
        main([str(tmp_path)])
    assert "holiday.jpg" in caught.value.problem
    with raises_user_error(file=mllm_dir / "provenance.json", key="outputs"):
        main([str(mllm_dir), "--verify"])
    broken = tmp_path / "broken"
    shutil.copytree(mllm_dir, broken)
    (broken / "model.safetensors").write_bytes(b"x" * 20)
    with raises_user_error(file=broken / "model.safetensors"):
        main([str(broken)])
