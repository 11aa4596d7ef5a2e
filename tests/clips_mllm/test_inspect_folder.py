"""Manifests and `clips-mllm inspect`: what every kind of folder is, where it came from, what has changed since."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from clips_mllm.inspect_folder import main
from clips_mllm.train import main as train
from vision_tower.common.errors import UserError
from vision_tower.training import run_folder
from vision_tower.training.run_folder import latest_checkpoint


def told(folder: Path, capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, Any]:
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


def test_a_run_tells_what_went_into_it(
    runs: Path, sample_world: Path, encoder_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    align, finetune = told(runs / "align", capsys), told(runs / "finetune", capsys)
    assert (align["kind"], finetune["kind"]) == ("align", "finetune")
    first, second = align["manifest"], finetune["manifest"]
    assert first["parts"]["tower"]["hash"] == second["parts"]["tower"]["hash"], "frozen"
    assert first["parts"]["llm"]["hash"] == second["parts"]["llm"]["hash"], "frozen in stage 1"
    assert first["parts"]["projector"]["hash"] != second["parts"]["projector"]["hash"], "trained in stage 1"
    assert first["tokenizer"] == second["tokenizer"] and first["template"]["name"] == "chatml"
    assert first["data"]["sources"][0]["bytes"] == (sample_world / "llava" / "stage1.json").stat().st_size
    written = json.loads((runs / "align" / "manifest.json").read_text())
    assert written["recipe"]["training"]["max_steps"] == 2
    roles = {(entry["depth"], entry["role"]): entry for entry in finetune["origin"]}
    assert roles[0, "checkpoint"]["kind"] == "align" and not roles[0, "checkpoint"]["changed_since"]
    assert roles[1, "tower"]["kind"] == "tower" and roles[1, "llm"]["kind"] == "llm"
    assert roles[2, "encoder"]["kind"] == "encoder"
    assert finetune["facts"]["parameters"]["projector"] > 0


def test_people_are_told_the_same(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    main([str(runs / "finetune")])
    text = capsys.readouterr().out
    assert "stock LLaVA checkpoint, stage 2 (finetune): " in text
    assert f"  from checkpoint {runs / 'align'}: stock LLaVA checkpoint, stage 1 (align)" in text
    assert "    from tower " in text and "      from encoder " in text


def test_a_checkpoint_is_told_by_its_state(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = told(runs / "align" / "checkpoint-2", capsys)
    assert (found["kind"], found["facts"]["step"], found["facts"]["holds"]) == ("checkpoint", 2, "llava")
    assert found["origin"][0]["role"] == "tower"


def test_the_revision_is_this_codes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where a command is run in another repository, or in none."""
    here = run_folder._git_revision()
    monkeypatch.chdir(tmp_path)
    assert run_folder._git_revision() == here


def test_a_copy_of_a_checkpoint_is_the_users_own(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("checkpoint-20", "checkpoint-3", "checkpoint-20-backup", "checkpoint-best"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "trainer_state.json").write_text("{}")
    (tmp_path / "recipe.yaml").write_text("{}")
    assert latest_checkpoint(tmp_path) == str(tmp_path / "checkpoint-20")
    assert told(tmp_path, capsys)["facts"] == {"checkpoints": [3, 20]}


def test_what_has_changed_since_is_told(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(runs, tmp_path / "runs")
    manifest = tmp_path / "runs" / "finetune" / "manifest.json"
    values = json.loads(manifest.read_text())
    values["from"]["checkpoint"]["folder"] = str(tmp_path / "runs" / "align")
    manifest.write_text(json.dumps(values))
    assert not told(tmp_path / "runs" / "finetune", capsys)["origin"][0]["changed_since"]
    (tmp_path / "runs" / "align" / "manifest.json").write_text("{}")
    assert told(tmp_path / "runs" / "finetune", capsys)["origin"][0]["changed_since"]
    assert told(tmp_path / "runs" / "finetune", capsys, "--verify")["verified"] == ["model.safetensors"]
    weights = tmp_path / "runs" / "finetune" / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(data)
    with pytest.raises(UserError, match=r"model.safetensors: not what the manifest tells of"):
        main([str(tmp_path / "runs" / "finetune"), "--verify"])


def test_folders_that_are_no_runs(
    sample_world: Path, encoder_dir: Path, mllm_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for folder, kind in (
        (sample_world, "sample_world"),
        (sample_world / "llm", "llm"),
        (encoder_dir, "encoder"),
        (encoder_dir / "tower", "tower"),
        (mllm_dir, "llava"),
    ):
        assert told(folder, capsys)["kind"] == kind
    for name, files, kind in (
        ("clip", {"open_clip_config.json": {"model_cfg": {"vision_cfg": {"width": 64}}}}, "open_clip"),
        ("adapter", {"adapter_config.json": {"r": 8, "peft_type": "LORA"}}, "adapter"),
        ("lora", {"adapter_config.json": {}, "non_lora_trainables.bin": {}}, "original_llava_lora"),
        (
            "original",
            {
                "config.json": {"model_type": "llava_llama", "mm_vision_tower": "x"},
                "pytorch_model-00001-of-00001.bin": {},
            },
            "original_llava",
        ),
        ("projector", {"mm_projector.bin": {}}, "original_llava_projector"),
        ("begun", {"recipe.yaml": {}, "checkpoint-7/trainer_state.json": {}}, "unfinished_run"),
        ("road", {"steps/1-data.json": {"seconds": 60, "command": "clips-mllm data sample"}}, "road"),
        ("grid", {"ablation.json": {}}, "ablation"),
        ("swap", {"compare.json": {}}, "comparison"),
    ):
        for file, value in files.items():
            (tmp_path / name / file).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name / file).write_text(json.dumps(value))
        found = told(tmp_path / name, capsys)
        assert found["kind"] == kind, name
        assert found["line"]
    assert told(tmp_path / "begun", capsys)["facts"] == {"checkpoints": [7]}
    assert "steps done: 1, in 1 minutes, the last 1-data" in told(tmp_path / "road", capsys)["line"]


def test_what_is_refused(mllm_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such folder"):
        main([str(tmp_path / "nowhere")])
    (tmp_path / "holiday.jpg").touch()
    with pytest.raises(UserError, match=r"no folder of a kind that is known here \(inside: holiday.jpg\)"):
        main([str(tmp_path)])
    with pytest.raises(UserError, match="tells of no weights"):
        main([str(mllm_dir), "--verify"])
    broken = tmp_path / "broken"
    shutil.copytree(mllm_dir, broken)
    (broken / "model.safetensors").write_bytes(b"x" * 20)
    with pytest.raises(UserError, match="cannot be read as safetensors"):
        main([str(broken)])


def test_a_table_is_known_by_its_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever its size: the middle, where images lie, is not read."""
    from clips_mllm.model import fingerprints

    monkeypatch.setattr(fingerprints, "BLOCK", 4)
    file = tmp_path / "part.parquet"

    def hash_of(content: bytes) -> str:
        file.write_bytes(content)
        return fingerprints.ends_hash(file)

    one = hash_of(b"headmiddlefoot")
    assert hash_of(b"headMIDDLEfoot") == one
    assert len({one, hash_of(b"headmiddlefood"), hash_of(b"heapmiddlefoot"), hash_of(b"headmiddle foot")}) == 4
    assert hash_of(b"abc") != hash_of(b"abd")
