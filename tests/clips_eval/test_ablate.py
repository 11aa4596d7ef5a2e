"""`clips-mllm ablate`: the grid, the verdicts by hand, and a small grid trained for real."""

from __future__ import annotations

import dataclasses
import json
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from clips_eval.ablate import main
from clips_eval.experiments.ablate_grid import AblateRecipe, Setting, length_curves, settings
from clips_eval.experiments.ablate_report import markdown, write_report
from clips_eval.experiments.ablate_results import directions, judge, mean
from clips_eval.experiments.ablate_runner import cells
from tests.helpers.errors import raises_user_error
from tests.helpers.train_runs import end_of, start, until
from vision_tower.common.errors import run_command
from vision_tower.common.recipe import parse_recipe
from vision_tower.pretraining.recipe import PretrainRecipe

ROOT = Path(__file__).parents[2]
RUN = {
    "output_dir": "unused",
    "model": {tower: {"width": 16, "layers": 1, "mlp": 32, "heads": 2} for tower in ("image", "text", "captioner")}
    | {
        "embed_dim": 16,
        "image_size": 96,
        "patch_size": 32,
        "text_length": 24,
        "target_length": 24,
        "vocabulary_size": 400,
    },
    "training": {
        "global_batch_size": 16,
        "device_batch_size": 16,
        "max_steps": 2,
        "precision": "fp32",
        "workers": 0,
        "log_every": 1,
    },
}
STEPS = 90  # of runs that are stopped


def recipe(folder: Path, **values: Any) -> AblateRecipe:
    given = {"output_dir": str(folder / "grid"), "pretrain": folder / "run.yaml", "data": folder / "test.json"}
    return AblateRecipe(**given | values)


def test_grid_has_each_run_once(tmp_path: Path) -> None:
    names = [setting.name for setting in settings(recipe(tmp_path, budgets=(12, 6), web_budgets=(4,)))]
    cut = [f"clip-synthetic-{kind}-{n}" for kind in ("truncation", "random", "block", "sub-caption") for n in (6, 12)]
    uncut = ["clip-synthetic", "clip-web", "clipa-mix", "coca", "clips"]
    assert sorted(names) == sorted([*cut, "clip-web-4", *uncut])
    assert [setting.name for setting in settings(recipe(tmp_path, reductions=()))] == uncut[1:]
    curves = length_curves(recipe(tmp_path, budgets=(12, 6)))
    assert [setting.budget for setting in curves["block"]] == [6, 12, None]  # uncut captions come last


def test_each_setting_is_a_valid_pretraining_recipe() -> None:
    """The options are real fields, and equal but for what the setting names."""
    base = ["--config", str(ROOT / "configs/vision/quickstart_ablate.yaml")]
    grid = parse_recipe(AblateRecipe, ["--config", str(ROOT / "configs/ablate/quickstart.yaml")], command="ablate")
    plain = parse_recipe(PretrainRecipe, base, command="pretrain")
    grid.check(plain.model.text_room)
    assert len(settings(grid)) * len(grid.seeds) == 57
    for setting in settings(grid):
        found = parse_recipe(PretrainRecipe, [*base, *setting.options], command="pretrain")
        found.check()
        assert dataclasses.replace(found, objective=plain.objective, captions=plain.captions) == plain
        kept = found.captions.web_budget if setting.objective == "clip-web" else found.captions.budget
        assert (found.objective, found.captions.reduction, kept) == (
            setting.objective,
            setting.reduction,
            setting.budget,
        )


def test_verdicts_match_hand_calculation() -> None:
    # Mean 2, deviation 1, error 1 / sqrt(3); Student's t at two degrees of freedom is 4.303: 2 +- 2.48.
    assert mean([1.0, 2.0, 3.0]).error == pytest.approx(3**-0.5)
    assert judge([1.0, 2.0, 3.0]) == "undecided"
    assert judge([2.0, 3.0, 4.0]) == "held"  # 3 +- 2.48
    assert judge([-2.0, -3.0, -4.0]) == "did not hold"
    assert judge([0.0, 0.0]) == "undecided"
    # Two seeds: 12.706 times half their distance.
    assert judge([1.0, 1.1]) == "held" and judge([1.0, 1.2]) == "undecided"


def made_up(grid: AblateRecipe) -> dict[Setting, list[float]]:
    """Scores by a rule: shorter synthetic captions are better, shorter web captions worse, clips best of all."""
    best = {"clip-web": 0.3, "clip-synthetic": 0.4, "clipa-mix": 0.4, "coca": 0.45, "clips": 0.2}
    scores = {}
    for setting in settings(grid):
        value = best[setting.objective]
        if setting.budget is not None:
            value += (1 if setting.objective == "clip-synthetic" else -1) / (10 + setting.budget)
        scores[setting] = [value + 0.001 * seed for seed in grid.seeds]
    return scores


def test_directions_follow_from_the_scores(tmp_path: Path) -> None:
    grid = recipe(tmp_path)
    found = {direction.claim: direction for direction in directions(grid, made_up(grid))}
    lengths = {claim for claim in found if "captions" in claim}
    assert len(lengths) == 5 and {found[claim].verdict for claim in lengths} == {"held"}
    for claim in lengths:
        budgets = grid.web_budgets if claim.startswith("web") else grid.budgets
        gain = sum(1 / (10 + budget) for budget in budgets) / len(budgets)
        assert found[claim].difference.value == pytest.approx(gain)
    assert found["clipa-mix beats clip-web"].verdict == "held"
    for other in ("coca", "clipa-mix", "clip-web"):
        assert found[f"clips beats {other}"].verdict == "did not hold"


def test_report_files(tmp_path: Path) -> None:
    grid = recipe(tmp_path)
    text = write_report(grid, made_up(grid), 76_800, "clips-mllm ablate")
    assert text == (tmp_path / "grid" / "ablation.md").read_text()
    assert "76,800 pairs" in text and "**did not hold**" in text
    rows = re.findall(r"^\| synthetic, block \|(.*)\|$", text, flags=re.MULTILINE)
    assert [cell.strip() for cell in rows[0].split("|")] == [
        "",
        "",
        "45.7 ± 0.1",
        "43.9 ± 0.1",
        "42.5 ± 0.1",
        "40.1 ± 0.1",
    ]
    tree = json.loads((tmp_path / "grid" / "ablation.json").read_text())
    assert len(tree["settings"]) == 19 and len(tree["directions"]) == 9
    assert all((tmp_path / "grid" / name).read_bytes()[:4] == b"\x89PNG" for name in ("length.png", "objectives.png"))
    bars = recipe(tmp_path, reductions=())
    assert "Caption length" not in markdown(bars, made_up(bars), 1, "")


@pytest.mark.parametrize(
    ("values", "key"),
    [
        ({"budgets": (21,)}, "budgets"),
        ({"budgets": (6,), "web_budgets": (0,)}, "web_budgets"),
        ({"budgets": ()}, "budgets"),
        ({"seeds": (1,)}, "seeds"),
        ({"seeds": (0, 1, 1)}, "seeds"),
        ({"reductions": (), "objectives": ()}, "reductions"),
        ({"threads": 0, "budgets": (6,)}, "threads"),
    ],
)
def test_invalid_grids_are_refused(tmp_path: Path, values: dict[str, Any], key: str) -> None:
    with raises_user_error(key=key):
        recipe(tmp_path, **values).check(21)


@pytest.fixture(scope="module")
def trained(sample_world: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """A grid of four runs, and the command that trained it."""
    folder = tmp_path_factory.mktemp("ablate")
    run = RUN | {"data": {"shards": str(sample_world / "pretrain" / "*.tar")}}
    (folder / "run.yaml").write_text(yaml.safe_dump(run))
    words = [f"--output_dir={folder / 'grid'}", f"--pretrain={folder / 'run.yaml'}", "--reductions=[]"]
    words += [f"--data={sample_world / 'retrieval' / 'test.json'}", "--objectives=[clip-web,clips]", "--seeds=[0,1]"]
    assert run_command(main, words) == 0
    return folder, words


def test_grid_is_trained_and_resumed(trained: tuple[Path, list[str]], capfd: pytest.CaptureFixture[str]) -> None:
    folder, words = trained
    tree = json.loads((folder / "grid" / "ablation.json").read_text())
    assert tree["samples_seen"] == 32 and {row["name"] for row in tree["settings"]} == {"clip-web", "clips"}
    for row in tree["settings"]:
        for seed, score in enumerate(row["scores"]):
            found = json.loads((folder / "grid/runs" / f"{row['name']}-seed{seed}" / "retrieval.json").read_text())
            assert score == pytest.approx((found["i2t_r1"] + found["t2i_r1"]) / 2)
    before = {file: file.stat().st_mtime_ns for file in folder.rglob("retrieval.json")}
    assert len(before) == 4
    next(iter(before)).unlink()  # an interrupted run
    capfd.readouterr()
    assert run_command(main, words) == 0
    again = {file: file.stat().st_mtime_ns for file in folder.rglob("retrieval.json")}
    assert sum(again[file] != before[file] for file in before) == 1  # the others were not trained again
    assert "4 runs, 3 done before" in capfd.readouterr().err


@pytest.mark.slow
def test_stopped_grid_leaves_no_process_and_resumes(
    sample_world: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Send each signal to the command only, while its second run trains. After SIGKILL it cannot wait for its runs."""
    run = RUN | {"data": {"shards": str(sample_world / "pretrain" / "*.tar")}}
    run["training"] = RUN["training"] | {"max_steps": STEPS, "save_every": 10}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(run))
    words = [f"--output_dir={tmp_path / 'grid'}", f"--pretrain={tmp_path / 'run.yaml'}", "--reductions=[]"]
    words += [f"--data={sample_world / 'retrieval' / 'test.json'}", "--objectives=[clip-web]", "--seeds=[0,1]"]
    first, second = (tmp_path / "grid/runs" / f"clip-web-seed{seed}" for seed in (0, 1))
    for how, code in ((signal.SIGTERM, 0), (signal.SIGINT, 130), (signal.SIGKILL, -9)):
        before = set(second.glob("checkpoint-*"))
        process = start([sys.executable, "-m"], "clips_eval.ablate", [*words, "--processes=1"])
        until(lambda before=before: bool(set(second.glob("checkpoint-*")) - before), process)  # type: ignore[misc]
        command = psutil.Process(process.pid)
        helpers, everything = command.children(), command.children(recursive=True)
        assert len(everything) == len(helpers) + 1, "a run"
        process.send_signal(how)
        output = end_of(process, 120)
        assert process.returncode == code, output
        if how == signal.SIGKILL:
            psutil.wait_procs(everything, timeout=60)
        assert not [child for child in everything if child not in helpers and child.is_running()]
        psutil.wait_procs(helpers, timeout=60)
        assert not [child for child in helpers if child.is_running()]
    scored, lines = (first / "retrieval.json").stat().st_mtime_ns, (second / "metrics.jsonl").read_text()
    assert not (second / "retrieval.json").exists() and 10 <= lines.count("\n") < STEPS
    assert run_command(main, words) == 0
    assert "2 runs, 1 done before" in capfd.readouterr().err
    assert (first / "retrieval.json").stat().st_mtime_ns == scored
    after = (second / "metrics.jsonl").read_text()
    assert [json.loads(line)["step"] for line in after.splitlines()] == list(range(1, STEPS + 1))
    assert after.startswith(lines), "resumed: times in these lines would differ after a restart"


def test_runs_of_another_recipe_are_refused(trained: tuple[Path, list[str]]) -> None:
    folder, words = trained
    grid = parse_recipe(AblateRecipe, words, command="ablate")
    assert all(cell.done for cell in cells(grid))
    text = (folder / "run.yaml").read_text()
    (folder / "run.yaml").write_text(text.replace("max_steps: 2", "max_steps: 3"))
    with raises_user_error() as caught:
        cells(grid)
    assert caught.value.file is not None and caught.value.file.endswith("cell.json")
    (folder / "run.yaml").write_text(text)


def test_mixed_precision_is_refused(trained: tuple[Path, list[str]], capfd: pytest.CaptureFixture[str]) -> None:
    """As when a grid resumes on another machine with `precision: auto`."""
    folder, words = trained
    file = folder / "grid/runs/clips-seed1/recipe.yaml"
    text = file.read_text()
    file.write_text(text.replace("precision: fp32", "precision: bf16"))
    assert run_command(main, words) == 2
    error = capfd.readouterr().err.strip().splitlines()[-1]
    assert "clips-seed1 in bf16" in error and "in fp32" in error
    file.write_text(text)


def test_log_of_a_failed_run_is_named(
    trained: tuple[Path, list[str]], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    _, words = trained
    words = [*words, f"--output_dir={tmp_path}", "--shards=nowhere/*.tar", "--objectives=[clips]"]
    assert run_command(main, words) == 2
    (line,) = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error: ")]
    log = Path(line.removeprefix("error: ").partition(": ")[0])
    assert "error: " in log.read_text()


@pytest.mark.slow
def test_run_ends_when_a_loader_process_fails(sample_world: Path, tmp_path: Path) -> None:
    """The error arrives while other loader processes are waiting, which ignore one SIGTERM."""
    named = {"shards": str(sample_world / "pretrain" / "*.tar"), "web_caption": "nowhere"}
    run = RUN | {"data": named, "training": {**RUN["training"], "workers": 2}}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(run))
    words = [f"--output_dir={tmp_path}", f"--pretrain={tmp_path / 'run.yaml'}", "--reductions=[]", "--seeds=[0,1]"]
    words += [f"--data={sample_world / 'retrieval' / 'test.json'}", "--objectives=[clips]"]
    command = [sys.executable, "-m", "clips_eval.ablate", *words]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert ended.returncode == 2 and ended.stderr.count("error: ") == 1
    assert "no 'nowhere'" in (tmp_path / "runs" / "clips-seed0" / "log.txt").read_text()
