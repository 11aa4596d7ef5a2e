"""Evaluation inside the run: the same numbers as the commands, no trace in the training, and the best weights kept."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers.pretrain_runs import arguments, losses
from tests.helpers.shard_files import png
from vision_tower.common.errors import run_command
from vision_tower.pretrain import main

RECALLS = [f"{way}_r{k}" for way in ("i2t", "t2i") for k in (1, 5, 10)]


@pytest.fixture(scope="module")
def classes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("folders")
    for name, color in (("dog", 40), ("red_cat", 220)):
        (root / name).mkdir()
        for number in range(3):
            (root / name / f"{number}.png").write_bytes(png(color + number, 96))
    return root


def scored(world: Path, folder: Path, **values: Any) -> list[dict[str, float]]:
    """The lines of evaluation.jsonl of a run measured every second step."""
    given = {
        "evaluation.every": 2,
        "evaluation.retrieval": world / "retrieval" / "test.json",
        "evaluation.split": "test",
        "evaluation.batch_size": 7,
        "training.max_steps": 7,
    }
    main(arguments(world, folder, **given | values))
    return [json.loads(line) for line in (folder / "evaluation.jsonl").read_text().splitlines()]


def test_it_leaves_no_trace_in_the_training(
    sample_world: Path, classes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Even where measuring draws random numbers."""
    from vision_tower.pretraining import eval_callback as scoring

    measure = scoring.evaluate_retrieval

    def drawing(*args: Any, **kwargs: Any) -> dict[str, float]:
        random.seed(5)
        torch.manual_seed(5)
        return measure(*args, **kwargs)

    monkeypatch.setattr(scoring, "evaluate_retrieval", drawing)
    main(arguments(sample_world, tmp_path / "without", **{"training.max_steps": 7}))
    rows = scored(sample_world, tmp_path / "with", **{"evaluation.zeroshot": classes})
    assert [row["step"] for row in rows] == [2, 4, 6, 7]
    assert all(set(row) == {"step", "mean_recall", "top1", "mean_per_class", *RECALLS} for row in rows)
    for row in rows:
        assert row["mean_recall"] == pytest.approx(sum(row[name] for name in RECALLS) / 6)
    assert losses(tmp_path / "with") == losses(tmp_path / "without")


def test_best_holds_the_best_and_measures_as_the_command_does(sample_world: Path, tmp_path: Path) -> None:
    from clips_eval.retrieve import main as retrieve

    folder = tmp_path / "run"
    # So fast that the last weights are not the best.
    rows = scored(sample_world, folder, **{"training.learning_rate": 0.01, "training.max_steps": 20})
    told = json.loads((folder / "best" / "evaluation.json").read_text())
    first = max(rows, key=lambda row: row["mean_recall"])
    assert told == first
    assert (folder / "best" / "tower" / "model.safetensors").is_file() and not list(folder.glob(".best*"))
    for place, row in ((folder / "best", first), (folder, rows[-1])):
        retrieve([str(place), "--data", str(sample_world / "retrieval" / "test.json"), "--batch_size", "7"])
        measured = json.loads((place / "retrieval.json").read_text())
        assert {name: measured[name] for name in RECALLS} == {name: row[name] for name in RECALLS}


def test_the_average_is_what_is_measured(sample_world: Path, tmp_path: Path) -> None:
    from clips_eval.retrieve import main as retrieve

    folder = tmp_path / "run"
    own = scored(sample_world, tmp_path / "own", **{"training.learning_rate": 0.01})
    rows = scored(sample_world, folder, **{"training.learning_rate": 0.01, "training.ema_decay": 0.9})
    retrieve([str(folder / "ema"), "--data", str(sample_world / "retrieval" / "test.json"), "--batch_size", "7"])
    measured = json.loads((folder / "ema" / "retrieval.json").read_text())
    assert {name: measured[name] for name in RECALLS} == {name: rows[-1][name] for name in RECALLS}
    assert rows != own
    assert losses(folder) == losses(tmp_path / "own")


def test_an_interrupted_run_measures_on(sample_world: Path, tmp_path: Path) -> None:
    values = {"training.save_every": 3, "training.keep_checkpoints": 9, "training.learning_rate": 0.01}
    whole = scored(sample_world, tmp_path / "whole", **values)
    folder = tmp_path / "halves"
    monkey = pytest.MonkeyPatch()
    from vision_tower.pretraining import eval_callback as scoring

    calls = 0
    measure = scoring.evaluate_retrieval

    def interrupted(*args: Any, **kwargs: Any) -> dict[str, float]:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise KeyboardInterrupt
        return measure(*args, **kwargs)

    monkey.setattr(scoring, "evaluate_retrieval", interrupted)
    with pytest.raises(KeyboardInterrupt):
        scored(sample_world, folder, **values)
    monkey.undo()
    (folder / "best" / "mark").write_text("of the first half")
    assert scored(sample_world, folder, **values) == whole
    told = [json.loads((place / "best" / "evaluation.json").read_text()) for place in (folder, tmp_path / "whole")]
    assert told[0] == told[1]


@pytest.mark.parametrize(("by", "kept"), [("top1", 6), ("none", 4)])
def test_a_run_goes_on_with_another_score(
    sample_world: Path, classes: Path, tmp_path: Path, by: str, kept: int
) -> None:
    """The first measurement is the best by a score that was never taken before."""
    folder = tmp_path / "run"
    values = {"training.save_every": 4, "training.max_steps": 6, "training.keep_checkpoints": 9}
    scored(sample_world, folder, **values)
    shutil.rmtree(folder / "checkpoint-6")
    told = folder / "best" / "evaluation.json"
    told.write_text(json.dumps(json.loads(told.read_text()) | {"step": 4}))
    rows = scored(sample_world, folder, **values | {"evaluation.zeroshot": classes, "evaluation.best_by": by})
    assert [row["step"] for row in rows] == [2, 4, 6] and "top1" in rows[-1]
    assert json.loads(told.read_text())["step"] == kept


def test_a_run_that_diverged_says_so(
    sample_world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    from vision_tower.model import modeling

    monkeypatch.setattr(modeling.ClipsModel, "embed_texts", lambda self, ids: torch.full((len(ids), 16), torch.nan))
    values = {"evaluation.every": 1, "evaluation.split": "test"}
    values["evaluation.retrieval"] = sample_world / "retrieval" / "test.json"
    assert run_command(main, arguments(sample_world, tmp_path / "run", **values)) == 2
    assert "error: step 1: embeddings hold NaN or infinity" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, "evaluation.every=5: nothing to measure"),
        ({"evaluation.retrieval": "nowhere.json"}, "nowhere.json: no such file"),
        ({"evaluation.zeroshot": "."}, "evaluation.best_by=mean_recall: not measured"),
    ],
)
def test_bad_input_stops_before_the_first_step(
    sample_world: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], values: dict[str, Any], message: str
) -> None:
    folder = tmp_path / "run"
    assert run_command(main, arguments(sample_world, folder, **{"evaluation.every": 5} | values)) == 2
    (line,) = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error: ")]
    assert message in line and not (folder / "metrics.jsonl").exists()
