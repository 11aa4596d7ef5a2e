"""Bad input to the commands: the exit code, one line on stderr that names the file or key, nothing half-written."""

from __future__ import annotations

import errno
import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError

from clips_mllm import cli
from clips_mllm.data.llava_json import to_example
from vision_tower.common.errors import run_command
from vision_tower.training.run_folder import only_run_in

ROOT = Path(__file__).parents[2]
Run = Callable[..., str]


@pytest.fixture
def run(capfd: pytest.CaptureFixture[str]) -> Run:
    """Run a command that must fail and return its error line without `error: `.

    With `alone` the line is all of stderr; otherwise log lines and progress bars are allowed before it.
    """

    def command(argv: list[str], *, code: int = 2, alone: bool = True) -> str:
        capfd.readouterr()
        assert run_command(cli.main, argv) == code
        stderr = capfd.readouterr().err
        lines = stderr.splitlines()
        errors = [line for line in lines if line.startswith("error: ")]
        assert len(errors) == 1, stderr
        assert lines[-1] == errors[0], stderr
        assert "Traceback" not in stderr, stderr
        assert not alone or lines == errors, stderr
        return errors[0].removeprefix("error: ")

    return command


def arguments(out: Path, world: Path, mllm: Path, **values: Any) -> list[str]:
    defaults = {
        "output_dir": out,
        "model.checkpoint": mllm,
        "data.file": world / "llava" / "stage2.json",
        "data.images": world / "llava" / "images",
        "data.template": "chatml",
        "training.global_batch_size": 8,
        "training.device_batch_size": 8,
        "training.max_steps": 2,
        "training.workers": 0,
    }
    return ["train", *(word for name, value in (defaults | values).items() for word in (f"--{name}", str(value)))]


# --- recipes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("recipe", "names"),
    [
        ("data: {templat: chatml}", ["data.templat", "data.template"]),
        ("learning_rate: 1", ["learning_rate"]),
        ("training: {learning_rate: fast}", ["training.learning_rate", "fast"]),
        ("data: {template: chatlm}", ["data.template", "chatlm"]),
        ("data: [1", []),
        ("- 1", []),
    ],
)
def test_recipes(recipe: str, names: list[str], run: Run, tmp_path: Path) -> None:
    file = tmp_path / "recipe.yaml"
    file.write_text(recipe)
    line = run(["train", "--config", str(file), "--output_dir", str(tmp_path / "out")])
    assert all(name in line for name in [str(file), *names]), line
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("argv", "names"),
    [
        (["trian"], ["trian", "'train'"]),
        (["train", "--config", "/no/recipe.yaml"], ["/no/recipe.yaml"]),
        (["train", "--training.learnin_rate", "1"], ["learnin_rate"]),
        (["train", "--training.max_steps", "many"], ["training.max_steps", "many"]),
        (["chat"], ["model"]),
        (["chat", "m", "--dtype", "float23"], ["dtype", "float23"]),
        (["chat", "/no/model", "--question", "?"], ["/no/model"]),
        (["chat", "owner/name", "--question", " "], ["--question"]),
        (["chat", "owner/name", "--temperature", "-1"], ["temperature=-1.0"]),
        (["chat", "owner/name", "--context", "0"], ["context=0"]),
        (["web", "/no/model"], ["/no/model"]),
        (["web", "owner/name", "--port", "0", "--examples", "/no/examples"], ["/no/examples"]),
        (["web", "owner/name", "--compare_with", "runs/none/here"], ["runs/none/here", "compare_with"]),
        (["web", "owner/name", "--encoder", "."], ["encoder", "images"]),
        (["web", "owner/name", "--encoder", "/no/encoder", "--images", "."], ["encoder=/no/encoder"]),
        (["web", "owner/name", "--port", "0", "--token_file", "/no/token"], ["/no/token"]),
        (["web", "owner/name", "--feedback", "/"], ["feedback=/"]),
        (["web", "owner/name", "--max_upload_mb", "0"], ["max_upload_mb=0"]),
        (["chat", "owner/name", "--output", "a.json"], ["--output", "--examples"]),
        (["chat", "owner/name", "--examples", "a.json", "--question", "?"], ["--examples", "--question"]),
        (["serve", "owner/name", "--limits.batch_size", "0"], ["limits.batch_size=0"]),
        (["serve", "owner/name", "--shutdown_seconds", "-1"], ["shutdown_seconds=-1.0"]),
        (["serve", "/no/model"], ["/no/model"]),
        (["serve", "owner/name", "--port", "70000"], ["127.0.0.1:70000"]),
    ],
)
def test_command_lines(argv: list[str], names: list[str], run: Run) -> None:
    line = run(argv)
    assert all(name in line for name in names), line


@pytest.mark.parametrize("command", ["web", "serve"])
def test_port_in_use(command: str, run: Run) -> None:
    """Found before the model is loaded: no model has this name."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        line = run([command, "owner/name", "--port", str(port)])
    assert f"127.0.0.1:{port}" in line


def test_inconsistent_values(run: Run, sample_world: Path, mllm_dir: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    make = arguments(out, sample_world, mllm_dir, **{"training.device_batch_size": 3})
    assert "global_batch_size" in run(make, alone=False)
    both = arguments(out, sample_world, mllm_dir, **{"model.tower": "a"})
    assert "model" in run(both)
    extra = arguments(out, sample_world, mllm_dir, **{"training.extra": '{"optm": "sgd"}'})
    assert "training.extra.optm" in run(extra, alone=False)
    extra = arguments(out, sample_world, mllm_dir, **{"training.extra": '{"optim": "adamx"}'})
    assert "training.extra" in run(extra, alone=False)
    evaluation = {"evaluation.every": 1, "evaluation.share": 0.1}
    for values, field in (
        ({"model.image_size": 64}, "model.image_size=64"),
        ({"model.feature_layer": -1}, "model.feature_layer=-1"),
        ({"model.feature_select": "full"}, "model.feature_select=full"),
        ({"stage.tower_learning_rate": 1e-5}, "stage.tower_learning_rate=1e-05"),
        ({"stage.projector_learning_rate": -1}, "stage.projector_learning_rate=-1.0"),
        ({"training.learning_rate": -1}, "training.learning_rate=-1.0"),
        ({"training.beta2": 1}, "training.beta2=1.0"),
        ({"training.max_steps": 0, "training.epochs": 0}, "training.epochs=0.0"),
        ({"training.keep_checkpoints": 0}, "training.keep_checkpoints=0"),
        (evaluation | {"evaluation.best_by": "pope"}, "evaluation.best_by=pope"),
        ({"evaluation.every": 1, "evaluation.file": "no.json"}, "no.json"),
    ):
        assert field in run(arguments(out, sample_world, mllm_dir, **values))
    assert not out.exists()


def test_image_size_not_divisible_by_patch_size(run: Run, tmp_path: Path) -> None:
    argv = ["pretrain", "--config", str(ROOT / "configs" / "vision" / "quickstart.yaml")]
    line = run([*argv, "--output_dir", str(tmp_path / "out"), "--model.image_size", "100", "--model.patch_size", "32"])
    assert "model.image_size=100" in line and "96" in line and "128" in line
    assert not (tmp_path / "out").exists()


def test_folders_that_cannot_be_created(
    run: Run, sample_world: Path, mllm_dir: Path, encoder_dir: Path, tmp_path: Path
) -> None:
    retrieval = str(sample_world / "retrieval" / "test.json")
    for argv, folder in (
        (["convert", str(encoder_dir), "/proc/x/y", "--to", "clips"], "/proc/x/.y.partial: "),
        (["retrieve", str(encoder_dir), "--data", retrieval, "--output", "/proc/x/y.json"], "/proc/x: "),
        (arguments(tmp_path, sample_world, mllm_dir, **{"data.feature_cache": "/proc/x"}), "/proc/x/"),
    ):
        line = run(argv, alone=False)
        assert line.startswith(folder)


# --- data -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "content", "detail"),
    [
        ("rows.json", None, "data.file"),
        ("rows.json", "", ""),
        ("rows.json", "[]", ""),
        ("rows.json", '[\n{"id": 1},\n', "line 3"),
        ("rows.jsonl", '{"id": 1}\n{"id"\n', "line 2"),
    ],
)
def test_malformed_files(
    name: str, content: str | None, detail: str, run: Run, sample_world: Path, mllm_dir: Path, tmp_path: Path
) -> None:
    if content is not None:
        (tmp_path / name).write_text(content)
    line = run(arguments(tmp_path / "out", sample_world, mllm_dir, **{"data.file": tmp_path / name}), alone=False)
    assert line.startswith(f"{tmp_path / name}: ")
    assert detail in line
    assert not (tmp_path / "out").exists()


def test_missing_data_is_found_before_the_model_is_loaded(run: Run, sample_world: Path, tmp_path: Path) -> None:
    line = run(
        arguments(tmp_path / "out", sample_world, tmp_path / "no-model", **{"data.file": tmp_path / "rows.json"})
    )
    assert line.startswith(f"{tmp_path / 'rows.json'}: ")


def no_placeholder(row: dict[str, Any]) -> None:
    row["conversations"][0]["value"] = row["conversations"][0]["value"].replace("<image>", "")


def no_answer(row: dict[str, Any]) -> None:
    row["conversations"][1]["value"] = " "


def no_file(row: dict[str, Any]) -> None:
    row["image"] = "gone.png"


@pytest.mark.parametrize("damage", [no_placeholder, no_answer, no_file])
def test_too_many_unusable_rows(
    damage: Callable[[dict[str, Any]], None], run: Run, sample_world: Path, tmp_path: Path
) -> None:
    """Found before the model is loaded: there is none."""
    rows = json.loads((sample_world / "llava" / "stage2.json").read_text())
    bad = [row for row in rows if isinstance(row.get("image"), str)][:3]
    for row in bad:
        to_example(row)
        damage(row)
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    line = run(
        arguments(tmp_path / "out", sample_world, tmp_path / "no-model", **{"data.file": tmp_path / "rows.json"}),
        alone=False,
    )
    assert line.startswith(f"{tmp_path / 'rows.json'}: ")
    assert f"3 of {len(rows)} " in line and "data.max_bad_fraction" in line
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("workers", "before"), [(0, True), (0, False), (1, False)])
def test_too_many_corrupt_images(
    workers: int,
    before: bool,
    run: Run,
    sample_world: Path,
    mllm_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Found before step 1 or during training; the line contains no traceback of a loader process."""
    monkeypatch.setattr("clips_mllm.data.dataset.MIN_SAMPLES", 8)
    if not before:
        monkeypatch.setattr("clips_mllm.training.preflight.show_data", lambda *_: None)
    shutil.copytree(sample_world / "llava" / "images", tmp_path / "images")
    for file in sorted((tmp_path / "images").iterdir())[::2]:
        file.write_bytes(b"<html>404</html>")
    out = tmp_path / "out"
    values = {"data.images": tmp_path / "images", "training.workers": workers}
    line = run(arguments(out, sample_world, mllm_dir, **values), alone=False)
    assert line.startswith(str(sample_world / "llava" / "stage2.json"))
    assert "data.max_bad_fraction" in line
    assert "DataLoader" not in line and "Traceback" not in line
    assert not (out / "config.json").exists()


# --- models -----------------------------------------------------------------------------------------------------------


def test_models(run: Run, sample_world: Path, mllm_dir: Path, encoder_dir: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    broken = tmp_path / "broken"
    shutil.copytree(mllm_dir, broken)
    (broken / "model.safetensors").write_bytes((mllm_dir / "model.safetensors").read_bytes()[:1000])
    missing = tmp_path / "missing"
    shutil.copytree(mllm_dir, missing)
    from safetensors.torch import load_file, save_file

    state = load_file(missing / "model.safetensors")
    state.pop(next(name for name in state if "linear_2.weight" in name))
    save_file(state, missing / "model.safetensors", metadata={"format": "pt"})
    unread = tmp_path / "unread"
    shutil.copytree(mllm_dir, unread)
    shutil.copy(sample_world / "llm" / "tokenizer.json", unread / "tokenizer.json")
    shutil.copy(sample_world / "llm" / "tokenizer_config.json", unread / "tokenizer_config.json")
    for folder in (missing, broken, unread, sample_world / "llm", tmp_path / "gone", sample_world):
        line = run(arguments(out, sample_world, folder), alone=False)
        assert line.startswith(f"{folder}: "), line
        line = run(["chat", str(folder), "--question", "?"], alone=False)
        assert line.startswith(str(folder)), line
    assert not out.exists()


def test_output_dir_with_another_checkpoint(run: Run, sample_world: Path, mllm_dir: Path, tmp_path: Path) -> None:
    """The base itself; an adapter next to a plain checkpoint, of which readers would load the adapter."""
    base = shutil.copytree(mllm_dir, tmp_path / "base")
    before = {path.name: path.read_bytes() for path in base.iterdir()}
    line = run(arguments(tmp_path / "." / "base", sample_world, base))
    assert f"output_dir={base}" in line and "model.checkpoint" in line
    adapter = {"stage.llm": "true", "stage.adapter.kind": "lora"}
    assert f"output_dir={base}" in run(arguments(base, sample_world, mllm_dir, **adapter))
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    assert f"output_dir={tmp_path / 'adapter'}" in run(arguments(tmp_path / "adapter", sample_world, mllm_dir))
    assert {path.name: path.read_bytes() for path in base.iterdir()} == before


def test_output_dir_in_use_by_another_process(run: Run, sample_world: Path, mllm_dir: Path, tmp_path: Path) -> None:
    code = "import pathlib, sys\nfrom vision_tower.training.run_folder import only_run_in\n"
    code += "with only_run_in(pathlib.Path(sys.argv[1])): print(flush=True); sys.stdin.read()"
    other = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=ROOT
    )
    try:
        assert other.stdout is not None and other.stdout.readline()
        line = run(arguments(tmp_path, sample_world, mllm_dir), alone=False)
        assert line.startswith(f"{tmp_path}: ") and str(other.pid) in line
        assert not list(tmp_path.glob("[!.]*"))
    finally:
        other.kill()  # the lock of a killed process is released
        other.communicate()
    with only_run_in(tmp_path):
        pass
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("rows", ["[]", "{}", '[{"image": "a.png"}]', "["])
def test_examples(run: Run, mllm_dir: Path, tmp_path: Path, rows: str) -> None:
    (tmp_path / "rows.json").write_text(rows)
    line = run(["chat", str(mllm_dir), "--examples", str(tmp_path / "rows.json"), "--output", str(tmp_path / "kept")])
    assert line.startswith(f"{tmp_path / 'rows.json'}: ")
    assert not (tmp_path / "kept").exists()


@pytest.mark.parametrize("fault", ["misspelled", "missing weight"])
def test_failing_command_in_a_process(fault: str, mllm_dir: Path, sample_world: Path, tmp_path: Path) -> None:
    """In a process of its own stderr is the error line, apart from the progress bar of loading weights."""
    from safetensors.torch import load_file, save_file

    argv = arguments(tmp_path / "out", sample_world, mllm_dir, **{"data.templte": "x"})
    if fault == "missing weight":
        shutil.copytree(mllm_dir, tmp_path / "mllm")
        state = load_file(tmp_path / "mllm" / "model.safetensors")
        state.pop(next(name for name in state if "linear_2.weight" in name))
        save_file(state, tmp_path / "mllm" / "model.safetensors", metadata={"format": "pt"})
        argv = ["chat", str(tmp_path / "mllm"), "--question", "?"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "eval")])}
    done = subprocess.run(
        [sys.executable, "-m", "clips_mllm.cli", *argv],
        capture_output=True,
        text=True,
        env=environment,
        timeout=240,
        check=False,
    )
    assert done.returncode == 2
    assert done.stdout == ""
    lines = [line for line in done.stderr.splitlines() if line and not line.startswith("Loading weights:")]
    assert len(lines) == 1 and lines[0].startswith("error: ")
    assert {"misspelled": "data.templte", "missing weight": f"{tmp_path / 'mllm'}: "}[fault] in lines[0]


# --- the disk and the loss --------------------------------------------------------------------------------------------

FULL = {
    "os": OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/disk/file"),
    "safetensors": SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
    "torch": RuntimeError("[enforce fail at inline_container.cc:671] . unexpected pos 576 vs 534"),
}


@pytest.mark.parametrize("kind", list(FULL))
def test_full_disk_in_the_final_save(
    kind: str, run: Run, sample_world: Path, mllm_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the final save: no partial checkpoint remains, and the same command finishes once there is space."""
    from transformers import LlavaForConditionalGeneration

    def fail(self: Any, folder: Path, **_: Any) -> None:
        Path(folder).mkdir(parents=True)
        (Path(folder) / "config.json").write_text("{")
        raise FULL[kind]

    out = tmp_path / "out"
    argv = arguments(out, sample_world, mllm_dir)
    with monkeypatch.context() as patch:
        patch.setattr(LlavaForConditionalGeneration, "save_pretrained", fail)
        line = run(argv, code=28, alone=False)
    assert {path.name for path in out.iterdir()} == {"recipe.yaml", "provenance.json", "metrics.jsonl"} & {
        path.name for path in out.iterdir()
    }
    if kind == "os":
        assert line.startswith("/disk/file: ")
        assert run_command(cli.main, argv) == 0
        assert (out / "config.json").exists()


def test_other_errors_keep_their_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: list[str]) -> None:
        raise OSError(errno.EINVAL, "no")

    with pytest.raises(OSError, match="no"):
        run_command(fail, [])


def test_output_dir_not_writable(run: Run, sample_world: Path, mllm_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    line = run(arguments(tmp_path / "file" / "out", sample_world, mllm_dir), alone=False)
    assert line.startswith(f"{tmp_path / 'file'}")


def test_nan_loss(run: Run, sample_world: Path, mllm_dir: Path, tmp_path: Path) -> None:
    """NaN in the weights stops the run at step 1."""
    from safetensors.torch import load_file, save_file

    broken = tmp_path / "nan"
    shutil.copytree(mllm_dir, broken)
    state = load_file(broken / "model.safetensors")
    name = next(name for name in state if "linear_2.weight" in name)
    state[name] = torch.full_like(state[name], float("nan"))
    save_file(state, broken / "model.safetensors", metadata={"format": "pt"})
    line = run(arguments(tmp_path / "out", sample_world, broken), alone=False)
    assert "step 1" in line and "nan" in line
    assert not (tmp_path / "out" / "config.json").exists()
