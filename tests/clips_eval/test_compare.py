"""`clips-mllm compare`: a complete tiny comparison, resuming, and its two tests by hand."""

from __future__ import annotations

import dataclasses
import fcntl
import importlib
import json
import os
import pty
import re
import shutil
import struct
import sys
import termios
from pathlib import Path

import psutil
import pytest

from clips_eval import compare
from clips_eval.compare import main
from clips_eval.experiments import compare_report
from clips_eval.experiments import processes as children
from clips_eval.experiments.compare_recipe import CompareRecipe, jobs
from clips_eval.experiments.processes import sigterm_stops
from clips_eval.stats.uncertainty import Scores, value
from tests.helpers.errors import raises_user_error
from tests.helpers.run_folders import write_run
from vision_tower.common.errors import Stopped, run_command
from vision_tower.common.recipe import parse_recipe

CONFIGS = Path(__file__).parents[2] / "configs"


@pytest.fixture
def files(tmp_path: Path) -> list[str]:
    """Towers and recipes that need not run."""
    for name in ("a", "b"):
        (tmp_path / name / "tower").mkdir(parents=True)
    (tmp_path / "r.yaml").write_text("x: 1\n")
    recipe = [f"--{name}={tmp_path / 'r.yaml'}" for name in ("align", "finetune", "evaluate")]
    return [str(tmp_path / "a"), str(tmp_path / "b"), *recipe, f"--output_dir={tmp_path / 'out'}"]


def fill(out: Path) -> None:
    """Finished cells: tower b is better in every seed."""
    for seed in (0, 1):
        write_run(out / f"a-seed{seed}", 0.70 + 0.01 * seed, seed=seed)
        write_run(out / f"b-seed{seed}", 0.85 + 0.01 * seed, seed=seed)


def test_finished_jobs_are_skipped(files: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Commands are recorded by a stand-in for Python; the third of them fails once."""
    log = tmp_path / "ran.txt"
    stand_in = tmp_path / "python"
    stand_in.write_text(f'#!/bin/sh\necho "$@" >> {log}\n[ $(wc -l < {log}) -ne 3 ]\n')
    stand_in.chmod(0o755)
    monkeypatch.setattr(compare.sys, "executable", str(stand_in))
    words = [*files, "--seeds=[0,1]", "--stage_options=[--training.max_steps=2]"]
    with raises_user_error(file=tmp_path / "out" / "a-seed0" / "log.txt"):
        main(words)
    fill(tmp_path / "made")
    for folder in (tmp_path / "made").iterdir():
        shutil.copytree(folder, tmp_path / "out" / folder.name, dirs_exist_ok=True)
    main(words)
    ran = [line.split() for line in log.read_text().splitlines()]
    assert [line[1] for line in ran] == [
        *("clips_mllm.train", "clips_mllm.train", "clips_eval.evaluate", "clips_eval.evaluate"),  # the third again
        *("clips_mllm.train", "clips_mllm.train", "clips_eval.evaluate") * 3,
    ]
    assert f"{tmp_path / 'b' / 'tower'}" in ran[4] and "--training.max_steps=2" in ran[4]
    assert [word for word in ran[-2] if word.startswith("--training.seed")] == ["--training.seed=1"]
    main(words)
    assert len(log.read_text().splitlines()) == len(ran), "nothing is done twice"
    with raises_user_error():
        main([*files, "--seeds=[0,1]", "--stage_options=[--training.max_steps=3]"])


def test_sigterm_stops_the_active_job(files: list[str], tmp_path: Path) -> None:
    """A stand-in for a stage saves on SIGTERM: it is waited for, and its job counts as not done."""
    stand_in = tmp_path / "stage.py"
    stand_in.write_text(
        "import os, pathlib, signal, sys\n"
        "from vision_tower.common.errors import Stopped, run_command\n"
        "def main(argv):\n"
        "    def stop(*_): raise Stopped('saved')\n"
        "    signal.signal(signal.SIGTERM, stop)\n"
        f"    pathlib.Path({str(tmp_path / 'pid')!r}).write_text(str(os.getpid()))\n"
        f"    if len(argv) == 1: os.kill({os.getpid()}, signal.SIGTERM)\n"
        "    else: os.kill(os.getpid(), signal.SIGTERM)\n"
        "    signal.pause()\n"
        "sys.exit(run_command(main))\n"
    )
    # Under a launcher that dies of the signal, as DeepSpeed's does.
    launcher = [sys.executable, "-c", "import subprocess, sys; subprocess.run([sys.executable, *sys.argv[1:]])"]
    with pytest.raises(Stopped), sigterm_stops("compare"):
        compare._run([*launcher, str(stand_in), "the command gets the signal"], tmp_path / "log.txt")
    assert not psutil.pid_exists(int((tmp_path / "pid").read_text()))
    assert (tmp_path / "log.txt").read_text() == "saved\n"
    # If only the stage gets the signal, it exits with code 0 and is not done either.
    assert compare._run([sys.executable, str(stand_in), "it", "alone"], tmp_path / "log.txt") == 143


def test_terminal_shows_the_progress_of_active_jobs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in draws a progress bar and ends once it is shown; a second log halves the width."""
    terminal, stderr = pty.openpty()
    fcntl.ioctl(stderr, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 60, 0, 0))
    (tmp_path / "other.txt").write_text("0%\r" + "x" * 100 + "\r\n")
    draw = "import os, time; print('loaded\\n 10%\\r 20% of the steps', end='\\r', flush=True)"
    wait = f"while not os.path.exists({str(tmp_path / 'shown')!r}): time.sleep(0.05)"

    def show(logs: list[Path]) -> None:
        drawn = bool(logs) and "20%" in logs[0].read_text()
        children.show_progress(logs)
        if drawn:
            (tmp_path / "shown").touch()

    with open(stderr, "w") as stream:
        monkeypatch.setattr(sys, "stderr", stream)
        monkeypatch.setattr(compare, "show_progress", show)
        assert compare._run([sys.executable, "-c", f"{draw}\n{wait}"], tmp_path / "log.txt") == 0
        children.show_progress([tmp_path / "log.txt", tmp_path / "other.txt", tmp_path / "none.txt"])
        text = ""
        while not text.endswith("x | "):  # output of a terminal arrives in parts
            text += os.read(terminal, 65536).decode()
    os.close(terminal)
    shown = text.split("\r\x1b[K")
    assert shown[-3].strip() == "20% of the steps" and shown[-2] == "", "cleared at the end"
    assert shown[-1] == "20% of the steps | " + "x" * 17 + " | "


def test_both_tests_match_hand_calculation(files: list[str], tmp_path: Path) -> None:
    fill(tmp_path / "out")
    recipe = parse_recipe(CompareRecipe, [*files, "--seeds=[0,1]"], command="compare", positional=("runs",))
    rows = {row.metric: row for row in compare_report.compare_towers(recipe)[0]}
    row = rows["accuracy"]
    right = {}
    for tower in "ab":
        for seed in (0, 1):
            lines = (
                (tmp_path / "out" / f"{tower}-seed{seed}" / "finetune" / "lmms_samples.jsonl").read_text().splitlines()
            )
            right[tower, seed] = sum(json.loads(line)["correct"] for line in lines) / len(lines)
    assert row.gain == pytest.approx([right["b", seed] - right["a", seed] for seed in (0, 1)])
    assert row.documents.value == pytest.approx(sum(row.gain) / 2) and row.documents.verdict == "better"
    assert row.documents.n == 400
    text = compare_report.write_report(recipe, "the command")
    assert "against `a`" in text and "`the command`" in text and "easy_vqa: accuracy" in text
    tree = json.loads((tmp_path / "out" / "compare.json").read_text())
    assert tree["first"] == "a" and tree["rows"][0]["verdict"] == "better"
    page = (tmp_path / "out" / "compare.html").read_text()
    for line in text.splitlines():  # the page has the same cells as the Markdown
        if line.startswith("| easy_vqa"):
            name, *cells = (cell.strip() for cell in line.strip("| ").split(" | "))
            assert f'<th scope="row">{name}</th>' in page and all(f">{cell}</td>" in page for cell in cells)
    assert "<h2>b</h2>" in page and "<code>the command</code>" in page and "would another training" in page
    assert "<script" not in page and not re.search(r"https?://|(src|href)=", page), "one file, without a request"


def test_ratios_are_averaged_over_seeds_not_pooled(files: list[str], tmp_path: Path) -> None:
    """A precision of 1 of 1 and one of 1 of 3 are 2/3 in the mean, and 2 of 4 together."""
    clusters = ["p", "p", "q", "r"]
    seeds = [
        Scores(numerators=[1, 0, 0, 0], denominators=[1, 0, 0, 0], clusters=clusters),
        Scores(numerators=[0, 1, 0, 0], denominators=[0, 1, 1, 1], clusters=clusters),
    ]
    assert value(compare_report._over_seeds(seeds)) == pytest.approx(2 / 3)
    fill(tmp_path / "out")
    samples = tmp_path / "out" / "b-seed1" / "finetune" / "lmms_samples.jsonl"
    rows = [json.loads(line) for line in samples.read_text().splitlines()]
    for row in rows:  # as if this seed had no open question
        row["scores"]["open_accuracy"] = [0.0, 0.0]
    samples.write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = parse_recipe(CompareRecipe, [*files, "--seeds=[0,1]"], command="compare", positional=("runs",))
    text = compare_report.write_report(recipe, "the command")
    assert "Not compared: easy_vqa: open_accuracy has no value in some run." in text
    assert "Not compared: easy_vqa: yes_no_accuracy has no per-document scores in some run." in text
    assert "| easy_vqa: accuracy |" in text and "| easy_vqa: open_accuracy |" not in text


def test_invalid_recipes_are_refused(files: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a, b, *rest = files
    (tmp_path / "c" / "a" / "tower").mkdir(parents=True)
    cases = [
        ([a, *rest], "runs"),
        ([a, str(tmp_path / "c" / "a"), *rest], "runs"),
        ([a, str(tmp_path / "none"), *rest], str(tmp_path / "none")),
        ([a, b, *rest, "--seeds=[1,1]"], "seeds=[1, 1]"),
        ([a, b, *rest, f"--retrieval={tmp_path / 'none.json'}"], str(tmp_path / "none.json")),
    ]
    for words, place in cases:
        assert run_command(main, words) == 2
        error = capsys.readouterr().err.strip()
        assert error.startswith(f"error: {place}: ") and "\n" not in error


@pytest.mark.parametrize("file", sorted((CONFIGS / "compare").glob("*.yaml")), ids=lambda file: file.stem)
def test_shipped_recipes_pretrain_their_towers(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(CONFIGS.parent)
    command = file.read_text().splitlines()[0].removeprefix("# clips-mllm compare ").split()
    recipe = parse_recipe(CompareRecipe, command, command="compare", positional=("runs",))
    assert [spec.run for spec in recipe.pretrain] == recipe.runs
    assert len(jobs(recipe)) == 2 + len(recipe.seeds) * 2 * 5
    others = dataclasses.replace(recipe, runs=[recipe.runs[0], Path("runs/mine")])
    assert [job.folder for job in jobs(others) if job.title.endswith("pretrain")] == recipe.runs[:1]
    for path in (recipe.align, recipe.finetune, recipe.evaluate, *(spec.config for spec in recipe.pretrain)):
        assert path.is_file()


def test_compare_end_to_end(
    sample_world: Path, encoder_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two real towers (one with other weights), two steps of each stage, real benchmarks, one seed.

    The commands run in this process: eight that import torch anew would take a minute.
    """

    def here(words: list[str], _: Path) -> int:
        importlib.import_module(words[2]).main(words[3:])
        return 0

    monkeypatch.setattr(compare, "_run", here)
    import torch
    from safetensors.torch import load_file, save_file

    shutil.copytree(encoder_dir, tmp_path / "one")
    shutil.copytree(encoder_dir, tmp_path / "two")
    weights = load_file(tmp_path / "two" / "tower" / "model.safetensors")
    save_file(
        {name: torch.roll(w, 1, 0) for name, w in weights.items()},
        tmp_path / "two" / "tower" / "model.safetensors",
        metadata={"format": "pt"},
    )
    stage = {"images": str(sample_world / "llava" / "images"), "template": "chatml", "max_length": 400}
    training = {"max_steps": 2, "global_batch_size": 4, "device_batch_size": 4, "precision": "fp32"}
    recipes = {
        "align": {
            "model": {"tower": "x", "llm": str(sample_world / "llm")},
            "data": stage | {"file": str(sample_world / "llava" / "stage1.json")},
        },
        "finetune": {
            "model": {"checkpoint": "x"},
            "data": stage | {"file": str(sample_world / "llava" / "stage2.json")},
            "stage": {"llm": True},
        },
        "evaluate": {
            "tasks": [{"task": "clips_easy_vqa", "data": str(sample_world / "eval" / "easy_vqa.parquet")}],
            "device": "cpu",
        },
    }
    for name, tree in recipes.items():
        if name != "evaluate":
            tree |= {"output_dir": "x", "training": training}
        (tmp_path / f"{name}.yaml").write_text(json.dumps(tree))
    words = [str(tmp_path / "one"), str(tmp_path / "two"), f"--output_dir={tmp_path / 'out'}", "--seeds=[0]"]
    words += [f"--{name}={tmp_path / name}.yaml" for name in recipes]
    main([*words, f"--retrieval={sample_world / 'retrieval' / 'test.json'}"])
    tree = json.loads((tmp_path / "out" / "compare.json").read_text())
    found = {(row["task"], row["metric"]): row for row in tree["rows"]}
    assert ("clips_easy_vqa", "accuracy") in found and ("retrieval", "i2t_r1") in found
    assert found["retrieval", "i2t_r1"]["gain"] == [0.0], "the encoders differ only in their stock towers"
    assert all(row["verdict"] in ("better", "worse", "no difference") for row in tree["rows"])
    assert (tmp_path / "out" / "two-seed0" / "finetune" / "lmms.json").is_file()
    assert not list((tmp_path / "out").rglob("checkpoint-*")), "checkpoints of finished stages are removed"
    assert list((tmp_path / "out").rglob("align/model*.safetensors"))
