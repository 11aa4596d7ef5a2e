"""Bad input to the commands: a non-zero code, one error line with place and remedy, nothing half-written."""

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
    """Run a command that must fail; returns the line without `error: `.

    `alone`: nothing but the line was written to stderr. Otherwise notes and progress bars may come before it.
    """

    def command(argv: list[str], *, code: int = 2, alone: bool = True) -> str:
        capfd.readouterr()
        assert run_command(cli.main, argv) == code
        said = capfd.readouterr().err
        lines = said.splitlines()
        errors = [line for line in lines if line.startswith("error: ")]
        assert len(errors) == 1, said
        assert lines[-1] == errors[0], said
        assert "Traceback" not in said, said
        assert not alone or lines == errors, said
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
        ("data: {templat: chatml}", ["data.templat", "did you mean 'data.template'"]),
        ("learning_rate: 1", ["learning_rate"]),
        ("training: {learning_rate: fast}", ["training.learning_rate", "fast"]),
        ("data: {template: chatlm}", ["data.template", "chatlm"]),
        ("data: [1", ["not valid YAML"]),
        ("- 1", ["mapping"]),
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
        (["trian"], ["trian", "did you mean 'train'"]),
        (["train", "--config", "/no/recipe.yaml"], ["/no/recipe.yaml"]),
        (["train", "--training.learnin_rate", "1"], ["learnin_rate"]),
        (["train", "--training.max_steps", "many"], ["training.max_steps: expected a whole number", "many"]),
        (["chat"], ["model"]),
        (["chat", "m", "--dtype", "float23"], ["dtype", "float23"]),
        (["chat", "/no/model", "--question", "?"], ["/no/model"]),
        (["chat", "owner/name", "--question", " "], ["--question: it is empty"]),
        (["chat", "owner/name", "--temperature", "-1"], ["temperature=-1.0: from 0"]),
        (["chat", "owner/name", "--context", "0"], ["context=0: at least 1 token"]),
        (["web", "/no/model"], ["/no/model"]),
        (["web", "owner/name", "--examples", "/no/examples"], ["/no/examples: no such file"]),
        (["web", "owner/name", "--beside", "runs/none/here"], ["runs/none/here: no such folder (beside)"]),
        (["web", "owner/name", "--encoder", "."], ["encoder and images belong together"]),
        (["web", "owner/name", "--encoder", "/no/encoder", "--images", "."], ["/no/encoder: no such folder"]),
        (["web", "owner/name", "--token_file", "/no/token"], ["/no/token"]),
        (["web", "owner/name", "--feedback", "/"], ["/: cannot be written (feedback)"]),
        (["web", "owner/name", "--max_upload_mb", "0"], ["max_upload_mb=0: at least 1"]),
        (["chat", "owner/name", "--output", "a.json"], ["--output: it keeps the answers to --examples"]),
        (["chat", "owner/name", "--examples", "a.json", "--question", "?"], ["--examples: they bring their own"]),
        (["serve", "owner/name", "--limits.rows", "0"], ["limits.rows=0: must be above 0"]),
        (["serve", "owner/name", "--patience", "-1"], ["patience=-1.0: at least 0"]),
        (["serve", "/no/model"], ["/no/model"]),
        (["serve", "owner/name", "--port", "70000"], ["127.0.0.1:70000: cannot listen there"]),
    ],
)
def test_command_lines(argv: list[str], names: list[str], run: Run) -> None:
    line = run(argv)
    assert all(name in line for name in names), line


@pytest.mark.parametrize("command", ["web", "serve"])
def test_a_port_that_is_taken(command: str, run: Run) -> None:
    """Found before the model is loaded: there is none of this name."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        line = run([command, "owner/name", "--port", str(port)])
    assert line.startswith(f"127.0.0.1:{port}: cannot listen there (") and line.endswith("give another host or port")


def test_values_that_do_not_fit_together(run: Run, sample_world: Path, mllm_dir: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    make = arguments(out, sample_world, mllm_dir, **{"training.device_batch_size": 3})
    assert "global_batch_size=8 is not a multiple of device_batch_size=3" in run(make, alone=False)
    both = arguments(out, sample_world, mllm_dir, **{"model.tower": "a"})
    assert "'checkpoint', or both 'tower' and 'llm'" in run(both)
    extra = arguments(out, sample_world, mllm_dir, **{"training.extra": '{"optm": "sgd"}'})
    assert "training.extra.optm" in run(extra, alone=False)
    extra = arguments(out, sample_world, mllm_dir, **{"training.extra": '{"optim": "adamx"}'})
    assert "training.extra: adamx is not" in run(extra, alone=False)
    evaluation = {"evaluation.every": 1, "evaluation.share": 0.1}
    for values, said in (
        ({"model.image_size": 64}, "model.image_size=64: "),
        ({"model.feature_layer": -1}, "model.feature_layer=-1: "),
        ({"model.feature_select": "full"}, "model.feature_select=full: "),
        ({"stage.tower_learning_rate": 1e-5}, "stage.tower_learning_rate=1e-05: the tower is frozen"),
        ({"stage.projector_learning_rate": -1}, "stage.projector_learning_rate=-1.0: a number from 0"),
        ({"training.learning_rate": -1}, "training.learning_rate=-1.0: a number from 0"),
        ({"training.beta2": 1}, "training.beta2=1.0: from 0 to below 1"),
        ({"training.max_steps": 0, "training.epochs": 0}, "training.epochs=0.0: above 0"),
        ({"training.keep_checkpoints": 0}, "training.keep_checkpoints=0: at least 1"),
        (evaluation | {"evaluation.best_by": "pope"}, "evaluation.best_by=pope: a score of tasks"),
        ({"evaluation.every": 1, "evaluation.file": "no.json"}, "no.json: no such file (evaluation.file)"),
    ):
        assert said in run(arguments(out, sample_world, mllm_dir, **values))
    assert not out.exists()


def test_an_image_size_that_the_patch_does_not_divide(run: Run, tmp_path: Path) -> None:
    argv = ["pretrain", "--config", str(ROOT / "configs" / "vision" / "quickstart.yaml")]
    line = run([*argv, "--output_dir", str(tmp_path / "out"), "--model.image_size", "100", "--model.patch_size", "32"])
    assert "model.image_size=100" in line
    assert "take 96 or 128" in line
    assert not (tmp_path / "out").exists()


def test_folders_that_cannot_be_made(
    run: Run, sample_world: Path, mllm_dir: Path, encoder_dir: Path, tmp_path: Path
) -> None:
    retrieval = str(sample_world / "retrieval" / "test.json")
    for argv, place in (
        (["convert", str(encoder_dir), "/proc/x/y", "--to", "clips"], "/proc/x/.y.partial: cannot be made"),
        (["retrieve", str(encoder_dir), "--data", retrieval, "--output", "/proc/x/y.json"], "/proc/x: cannot be made"),
        (arguments(tmp_path, sample_world, mllm_dir, **{"data.feature_cache": "/proc/x"}), "/proc/x/"),
    ):
        line = run(argv, alone=False)
        assert line.startswith(place) and line.endswith("; give another folder")


# --- data -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("rows.json", None, "no such file (data.file)"),
        ("rows.json", "", "empty; expected a JSON list"),
        ("rows.json", "[]", "expected a non-empty JSON list"),
        ("rows.json", '[\n{"id": 1},\n', "line 3: not valid JSON"),
        ("rows.jsonl", '{"id": 1}\n{"id"\n', "line 2: not valid JSON"),
    ],
)
def test_malformed_files(
    name: str, content: str | None, message: str, run: Run, sample_world: Path, mllm_dir: Path, tmp_path: Path
) -> None:
    if content is not None:
        (tmp_path / name).write_text(content)
    line = run(arguments(tmp_path / "out", sample_world, mllm_dir, **{"data.file": tmp_path / name}), alone=False)
    assert line.startswith(f"{tmp_path / name}: ")
    assert message in line
    assert not (tmp_path / "out").exists()


def test_missing_data_is_told_before_a_model_is_loaded(run: Run, sample_world: Path, tmp_path: Path) -> None:
    line = run(
        arguments(tmp_path / "out", sample_world, tmp_path / "no-model", **{"data.file": tmp_path / "rows.json"})
    )
    assert "rows.json: no such file (data.file)" in line


def no_placeholder(row: dict[str, Any]) -> None:
    row["conversations"][0]["value"] = row["conversations"][0]["value"].replace("<image>", "")


def no_answer(row: dict[str, Any]) -> None:
    row["conversations"][1]["value"] = " "


def no_file(row: dict[str, Any]) -> None:
    row["image"] = "gone.png"


@pytest.mark.parametrize(
    ("spoil", "cause"),
    [(no_placeholder, "0 <image> for 1 images"), (no_answer, "empty answer"), (no_file, "missing image")],
)
def test_too_many_unusable_rows(
    spoil: Callable[[dict[str, Any]], None], cause: str, run: Run, sample_world: Path, tmp_path: Path
) -> None:
    """Before the model, which is not there."""
    rows = json.loads((sample_world / "llava" / "stage2.json").read_text())
    bad = [row for row in rows if isinstance(row.get("image"), str)][:3]
    for row in bad:
        to_example(row)
        spoil(row)
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    line = run(
        arguments(tmp_path / "out", sample_world, tmp_path / "no-model", **{"data.file": tmp_path / "rows.json"}),
        alone=False,
    )
    assert line.startswith(f"{tmp_path / 'rows.json'}: 3 of {len(rows)} rows are unusable (3 x {cause})")
    assert "data.max_bad_fraction=0.01" in line
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
    """Before step 1, and past a sound sample; a loader process's traceback is not the user's business."""
    monkeypatch.setattr("clips_mllm.data.dataset.SETTLED", 8)
    if not before:
        monkeypatch.setattr("clips_mllm.training.preflight.show_data", lambda *_: None)
    shutil.copytree(sample_world / "llava" / "images", tmp_path / "images")
    for file in sorted((tmp_path / "images").iterdir())[::2]:
        file.write_bytes(b"<html>404</html>")
    out = tmp_path / "out"
    values = {"data.images": tmp_path / "images", "training.workers": workers}
    line = run(arguments(out, sample_world, mllm_dir, **values), alone=False)
    assert line.startswith(str(sample_world / "llava" / "stage2.json"))
    found = "samples looked at cannot be used (first: " if before else "samples could not be used (last: corrupt image"
    assert found in line
    assert "data.max_bad_fraction=0.01" in line
    assert "DataLoader" not in line
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
    for folder, train, chat in (
        (missing, "1 missing key (first: ", "1 missing key (first: "),
        (broken, "cannot be read", "cannot be read"),
        (unread, "no <image> piece", "no <image> piece"),
        (sample_world / "llm", "a 'llama' checkpoint", "causal LM (llama)"),
        (tmp_path / "gone", "no such folder", "no such folder"),
        (sample_world, "no finished checkpoint here", "sample world (`data sample`)"),
    ):
        line = run(arguments(out, sample_world, folder), alone=False)
        assert line.startswith(f"{folder}: ") and train in line, line
        line = run(["chat", str(folder), "--question", "?"], alone=False)
        assert line.startswith(str(folder)) and chat in line, line
    assert not out.exists()


def test_an_output_folder_that_holds_something_else(
    run: Run, sample_world: Path, mllm_dir: Path, tmp_path: Path
) -> None:
    """The base itself; an adapter beside a plain checkpoint, of which readers take the adapter."""
    base = shutil.copytree(mllm_dir, tmp_path / "base")
    before = {path.name: path.read_bytes() for path in base.iterdir()}
    line = run(arguments(tmp_path / "." / "base", sample_world, base))
    assert line == f"output_dir={base}: is model.checkpoint, which it would overwrite; take another"
    adapter = {"stage.llm": "true", "stage.adapter.kind": "lora"}
    assert "holds a plain checkpoint of another run" in run(arguments(base, sample_world, mllm_dir, **adapter))
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
    assert "holds an adapter of another run" in run(arguments(tmp_path / "adapter", sample_world, mllm_dir))
    assert {path.name: path.read_bytes() for path in base.iterdir()} == before


def test_an_output_folder_in_which_another_run_writes(
    run: Run, sample_world: Path, mllm_dir: Path, tmp_path: Path
) -> None:
    code = "import pathlib, sys\nfrom vision_tower.training.run_folder import only_run_in\n"
    code += "with only_run_in(pathlib.Path(sys.argv[1])): print(flush=True); sys.stdin.read()"
    other = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=ROOT
    )
    try:
        assert other.stdout is not None and other.stdout.readline()
        line = run(arguments(tmp_path, sample_world, mllm_dir), alone=False)
        assert line.startswith(f"{tmp_path}: another run is writing here (process {other.pid} on ")
        assert not list(tmp_path.glob("[!.]*"))
    finally:
        other.kill()  # and a run that was killed is in nobody's way
        other.communicate()
    with only_run_in(tmp_path):
        pass
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("rows", "line"),
    [
        ("[]", "with one at least"),
        ("{}", "expected a JSON list"),
        ('[{"image": "a.png"}]', 'entry 0: expected {"image": FILE, "question": TEXT}'),
        ("[", "not valid JSON"),
    ],
)
def test_examples(run: Run, mllm_dir: Path, tmp_path: Path, rows: str, line: str) -> None:
    (tmp_path / "rows.json").write_text(rows)
    said = run(["chat", str(mllm_dir), "--examples", str(tmp_path / "rows.json"), "--output", str(tmp_path / "kept")])
    assert said.startswith(f"{tmp_path / 'rows.json'}: ") and line in said
    assert not (tmp_path / "kept").exists()


@pytest.mark.parametrize("fault", ["misspelt", "missing weight"])
def test_a_failing_command_as_a_process(fault: str, mllm_dir: Path, sample_world: Path, tmp_path: Path) -> None:
    """The real thing: stderr is the line and nothing else, but for the bar of the weights."""
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
        timeout=60,
        check=False,
    )
    assert done.returncode == 2
    assert done.stdout == ""
    said = [line for line in done.stderr.splitlines() if line and not line.startswith("Loading weights:")]
    assert len(said) == 1 and said[0].startswith("error: ")
    assert {"misspelt": "data.templte", "missing weight": "1 missing key (first: "}[fault] in said[0]


# --- the disk and the loss --------------------------------------------------------------------------------------------

FULL = {
    "os": OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/disk/file"),
    "safetensors": SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
    "torch": RuntimeError("[enforce fail at inline_container.cc:671] . unexpected pos 576 vs 534"),
}


@pytest.mark.parametrize("kind", list(FULL))
def test_a_full_disk(
    kind: str, run: Run, sample_world: Path, mllm_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the last save: no half checkpoint stays, and the same command finishes once there is space."""
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
    assert "no space left on the device" in line
    assert "run the same command again" in line
    assert {path.name for path in out.iterdir()} == {"recipe.yaml", "environment.json", "metrics.jsonl"} & {
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


def test_a_folder_that_cannot_be_written(run: Run, sample_world: Path, mllm_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    line = run(arguments(tmp_path / "file" / "out", sample_world, mllm_dir), alone=False)
    assert line.startswith(f"{tmp_path / 'file'}") and "Not a directory" in line and "another folder" in line


def test_a_loss_that_is_no_number(run: Run, sample_world: Path, mllm_dir: Path, tmp_path: Path) -> None:
    """Weights that hold a NaN stop the run at once, with the step and what to do."""
    from safetensors.torch import load_file, save_file

    broken = tmp_path / "nan"
    shutil.copytree(mllm_dir, broken)
    state = load_file(broken / "model.safetensors")
    name = next(name for name in state if "linear_2.weight" in name)
    state[name] = torch.full_like(state[name], float("nan"))
    save_file(state, broken / "model.safetensors", metadata={"format": "pt"})
    line = run(arguments(tmp_path / "out", sample_world, broken), alone=False)
    assert line.startswith("step 1: loss nan") and "bad_step.json" in line
    assert not (tmp_path / "out" / "config.json").exists()
