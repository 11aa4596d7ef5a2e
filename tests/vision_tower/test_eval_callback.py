"""Evaluation during a run: the same scores as the commands, no effect on training, and the best weights saved."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers.errors import raises_user_error
from tests.helpers.pretrain_runs import arguments, losses
from tests.helpers.shard_files import png
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


def evaluate_every_2(world: Path, folder: Path, **values: Any) -> list[dict[str, float]]:
    """Train, evaluating every second step, and return the lines of evaluation.jsonl."""
    given = {
        "evaluation.every": 2,
        "evaluation.retrieval": world / "retrieval" / "test.json",
        "evaluation.split": "test",
        "evaluation.batch_size": 7,
        "training.max_steps": 7,
    }
    main(arguments(world, folder, **given | values))
    return [json.loads(line) for line in (folder / "evaluation.jsonl").read_text().splitlines()]


def test_evaluation_does_not_change_training(
    sample_world: Path, classes: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also if the evaluation draws random numbers."""
    from vision_tower.pretraining import eval_callback

    measure = eval_callback.evaluate_retrieval

    def drawing(*args: Any, **kwargs: Any) -> dict[str, float]:
        random.seed(5)
        torch.manual_seed(5)
        return measure(*args, **kwargs)

    monkeypatch.setattr(eval_callback, "evaluate_retrieval", drawing)
    main(arguments(sample_world, tmp_path / "without", **{"training.max_steps": 7}))
    rows = evaluate_every_2(sample_world, tmp_path / "with", **{"evaluation.zeroshot": classes})
    assert [row["step"] for row in rows] == [2, 4, 6, 7]
    assert all(set(row) == {"step", "mean_recall", "top1", "mean_per_class", *RECALLS} for row in rows)
    for row in rows:
        assert row["mean_recall"] == pytest.approx(sum(row[name] for name in RECALLS) / 6)
    assert losses(tmp_path / "with") == losses(tmp_path / "without")


def test_best_has_the_best_scores_and_equals_the_command(sample_world: Path, tmp_path: Path) -> None:
    from clips_eval.retrieve import main as retrieve

    folder = tmp_path / "run"
    # A learning rate so high that the last weights are not the best.
    rows = evaluate_every_2(sample_world, folder, **{"training.learning_rate": 0.01, "training.max_steps": 20})
    best = json.loads((folder / "best" / "evaluation.json").read_text())
    first = max(rows, key=lambda row: row["mean_recall"])
    assert best == first
    assert (folder / "best" / "tower" / "model.safetensors").is_file() and not list(folder.glob(".best*"))
    for place, row in ((folder / "best", first), (folder, rows[-1])):
        retrieve([str(place), "--data", str(sample_world / "retrieval" / "test.json"), "--batch_size", "7"])
        measured = json.loads((place / "retrieval.json").read_text())
        assert {name: measured[name] for name in RECALLS} == {name: row[name] for name in RECALLS}


def test_weight_average_is_evaluated(sample_world: Path, tmp_path: Path) -> None:
    from clips_eval.retrieve import main as retrieve

    folder = tmp_path / "run"
    own = evaluate_every_2(sample_world, tmp_path / "own", **{"training.learning_rate": 0.01})
    rows = evaluate_every_2(sample_world, folder, **{"training.learning_rate": 0.01, "training.ema_decay": 0.9})
    retrieve([str(folder / "ema"), "--data", str(sample_world / "retrieval" / "test.json"), "--batch_size", "7"])
    measured = json.loads((folder / "ema" / "retrieval.json").read_text())
    assert {name: measured[name] for name in RECALLS} == {name: rows[-1][name] for name in RECALLS}
    assert rows != own
    assert losses(folder) == losses(tmp_path / "own")


def test_resumed_run_repeats_no_evaluation(sample_world: Path, tmp_path: Path) -> None:
    values = {"training.save_every": 3, "training.keep_checkpoints": 9, "training.learning_rate": 0.01}
    uninterrupted = evaluate_every_2(sample_world, tmp_path / "uninterrupted", **values)
    folder = tmp_path / "halves"
    monkey = pytest.MonkeyPatch()
    from vision_tower.pretraining import eval_callback

    calls = 0
    measure = eval_callback.evaluate_retrieval

    def interrupted(*args: Any, **kwargs: Any) -> dict[str, float]:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise KeyboardInterrupt
        return measure(*args, **kwargs)

    monkey.setattr(eval_callback, "evaluate_retrieval", interrupted)
    with pytest.raises(KeyboardInterrupt):
        evaluate_every_2(sample_world, folder, **values)
    monkey.undo()
    (folder / "best" / "mark").write_text("of the first half")
    assert evaluate_every_2(sample_world, folder, **values) == uninterrupted
    best = [json.loads((run / "best" / "evaluation.json").read_text()) for run in (folder, tmp_path / "uninterrupted")]
    assert best[0] == best[1]


@pytest.mark.parametrize(("by", "kept"), [("top1", 6), ("none", 4)])
def test_best_by_may_change_on_resume(sample_world: Path, classes: Path, tmp_path: Path, by: str, kept: int) -> None:
    """A score that was not computed before starts a new best."""
    folder = tmp_path / "run"
    values = {"training.save_every": 4, "training.max_steps": 6, "training.keep_checkpoints": 9}
    evaluate_every_2(sample_world, folder, **values)
    shutil.rmtree(folder / "checkpoint-6")
    best = folder / "best" / "evaluation.json"
    best.write_text(json.dumps(json.loads(best.read_text()) | {"step": 4}))
    rows = evaluate_every_2(sample_world, folder, **values | {"evaluation.zeroshot": classes, "evaluation.best_by": by})
    assert [row["step"] for row in rows] == [2, 4, 6] and "top1" in rows[-1]
    assert json.loads(best.read_text())["step"] == kept


def test_nan_embeddings_end_the_run(sample_world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from vision_tower.model import modeling

    monkeypatch.setattr(modeling.ClipsModel, "embed_texts", lambda self, ids: torch.full((len(ids), 16), torch.nan))
    values = {"evaluation.every": 1, "evaluation.split": "test"}
    values["evaluation.retrieval"] = sample_world / "retrieval" / "test.json"
    with raises_user_error(key="training.learning_rate"):
        main(arguments(sample_world, tmp_path / "run", **values))


@pytest.mark.parametrize(
    ("values", "fields"),
    [
        ({}, {"key": "evaluation.every"}),
        ({"evaluation.retrieval": "nowhere.json"}, {"file": "nowhere.json"}),
        ({"evaluation.zeroshot": "."}, {"key": "evaluation.best_by"}),
        ({"evaluation.every": 0, "evaluation.zeroshot": "."}, {"key": "evaluation.zeroshot"}),
        ({"evaluation.every": 0, "evaluation.batch_size": 8}, {"key": "evaluation.batch_size"}),
    ],
)
def test_bad_input_ends_before_the_first_step(
    sample_world: Path, tmp_path: Path, values: dict[str, Any], fields: dict[str, Any]
) -> None:
    folder = tmp_path / "run"
    with raises_user_error(**fields):
        main(arguments(sample_world, folder, **{"evaluation.every": 5} | values))
    assert not (folder / "metrics.jsonl").exists()
