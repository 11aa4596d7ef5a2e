"""The examples of the documentation, run on tiny models."""

from __future__ import annotations

import csv
import importlib.util
import json
import shutil
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

EXAMPLES = Path(__file__).parents[2] / "docs" / "examples"
pytestmark = pytest.mark.integration


def example(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def images(sample_world: Path) -> list[str]:
    return [str(file) for file in sorted((sample_world / "retrieval" / "images").glob("*.png"))[:3]]


def test_embed_images(encoder_dir: Path, images: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    example("embed_images").main([str(encoder_dir), *images, "--captions", "a cat", "a red car"])
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition(": ")[0] for line in lines] == images
    assert all(("a cat" in line) != ("a red car" in line) for line in lines)


def test_zero_shot(encoder_dir: Path, images: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    example("zero_shot").main([str(encoder_dir), images[0], "--classes", "cat", "dog"])
    words = capsys.readouterr().out.replace(",", "").replace("%", "").split()
    assert sum(float(word) for word in words if word.replace(".", "").isdigit()) == pytest.approx(100, abs=0.2)


def test_ask(chat_mllm: Path, images: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    example("ask").main([str(chat_mllm), images[0], "What is this?", "--max_new_tokens", "8"])
    assert capsys.readouterr().out.strip()


def test_train_on_my_json(mllm_dir: Path, images: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # the doctor writes its report there
    for file in images:
        shutil.copy(file, tmp_path)
    with (tmp_path / "questions.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["image", "question", "answer"])
        writer.writerows([Path(image).name, "What is this?", "A scene."] for image in images)
    example("train_on_my_json").main(
        [
            *(str(tmp_path / "questions.csv"), "--images", str(tmp_path), "--checkpoint", str(mllm_dir)),
            *("--output", str(tmp_path / "run"), "--template", "chatml"),
            *("--training.max_steps", "2", "--training.global_batch_size", "2", "--training.device_batch_size", "2"),
            *("--training.workers", "0", "--training.precision", "fp32", "--training.log_every", "1"),
        ]
    )
    assert (tmp_path / "run" / "model.safetensors").is_file()
    losses = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert len([row for row in losses if "loss" in row]) == 2


def test_call_server(served_mllm: str, images: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    example("call_server").main([served_mllm, images[0], "What is this?"])
    assert capsys.readouterr().out.strip()


@pytest.fixture(scope="module")
def served_mllm(chat_mllm: Path) -> Any:
    """Address of `clips-mllm serve` in a process of its own."""
    import subprocess
    import sys

    command = [sys.executable, "-m", "clips_mllm.serve", str(chat_mllm), "--port", "0", "--device", "cpu"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        yield next(word for word in line.split() if word.startswith("http"))
    finally:
        process.terminate()
        process.wait(30)


def test_notebook(encoder_dir: Path, chat_mllm: Path, sample_world: Path, tmp_path: Path) -> None:
    import nbformat
    from nbclient import NotebookClient

    notebook = nbformat.read(EXAMPLES / "tour.ipynb", as_version=4)
    assert not any(cell.get("outputs") for cell in notebook.cells), "commit the notebook without outputs"
    (parameters,) = [cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", [])]
    paths = {"ENCODER": encoder_dir, "MLLM": chat_mllm, "IMAGES": sample_world / "retrieval" / "images"}
    parameters.source = "\n".join(f"{name} = {str(path)!r}" for name, path in paths.items())
    NotebookClient(notebook, timeout=240, kernel_name="python3", resources={"metadata": {"path": tmp_path}}).execute()
    shown = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert any("image/png" in output.get("data", {}) for output in shown)
