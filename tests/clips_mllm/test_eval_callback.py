"""Evaluation during training, early stopping, best weights; checks before step 1; errors that stop a run."""

from __future__ import annotations

import json
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch

from clips_mllm.model.checkpoint import Mllm, load_mllm
from clips_mllm.train import main
from clips_mllm.training.eval_callback import load_scorer
from clips_mllm.training.recipe import TrainEvaluationRecipe
from tests.helpers.errors import raises_user_error
from tests.helpers.tiny_llava import pope_rows, write_parquet
from tests.helpers.train_runs import deepspeed_launcher, launch_several, losses, weights, words

ROOT = Path(__file__).parents[2]


def evaluations(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "evaluation.jsonl").read_text().splitlines()]


@pytest.fixture
def scorer(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[str, Any]:
    """A fake scorer in an importable module: generates text, draws random numbers, records its calls."""
    seen: dict[str, Any] = {"scores": iter([0.1, 0.5, 0.3, 0.2, 0.1, 0.1])}

    class Scorer:
        names = ("pope",)

        def evaluate(self, mllm: Mllm, step: int) -> dict[str, float]:
            torch.rand(3)
            assert not mllm.model.training and mllm.tokenizer.padding_side == "left"
            ids = mllm.tokenizer("Hello", return_tensors="pt")
            mllm.model.generate(**ids, max_new_tokens=2, do_sample=True)
            seen.setdefault("steps", []).append(step)
            return {"pope": next(seen["scores"])}

    def load(recipe: str) -> Scorer:
        seen["recipe"] = recipe
        return Scorer()

    module = types.ModuleType("a_scorer")
    module.load = load  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "a_scorer", module)
    file = tmp_path / "tasks.yaml"
    file.write_text("tasks: []\n")
    seen["values"] = {"evaluation.tasks": file, "evaluation.scorer": "a_scorer:load"}
    return seen


def test_held_out_loss_is_exact_and_does_not_change_training(
    mllm_dir: Path, sample_world: Path, tmp_path: Path, scorer: dict[str, Any]
) -> None:
    """Mean over all supervised tokens, independent of batches; a run with dropout has the same losses as without it."""
    from clips_mllm.data.collator import InstructionCollator
    from clips_mllm.data.dataset import InstructionDataset
    from clips_mllm.data.recipe import InstructionRecipe
    from clips_mllm.training.trainer import supervised_loss

    stage1 = sample_world / "llava" / "stage1.json"
    values = {"model.checkpoint": mllm_dir, "stage.llm": "true", "stage.adapter.kind": "lora", "stage.adapter.rank": 4}
    main(words(tmp_path / "plain", sample_world, **values))
    extra = {"evaluation.every": 2, "evaluation.file": stage1, "evaluation.batch_size": 5, "training.max_steps": 3}
    main(words(tmp_path / "run", sample_world, **values, **extra, **scorer["values"]))
    assert losses(tmp_path / "run") == losses(tmp_path / "plain")
    rows = evaluations(tmp_path / "run")
    assert [(row["step"], row["pope"]) for row in rows] == [(2, 0.1), (3, 0.5)] and scorer["steps"] == [2, 3]
    mllm = load_mllm(mllm_dir, device="cpu", dtype="float32")
    recipe = InstructionRecipe(file=str(stage1), images=str(sample_world / "llava" / "images"), template="chatml")
    data = InstructionDataset(recipe, mllm.processor)
    collate = InstructionCollator(mllm.processor)
    base = torch.zeros(2)
    with torch.no_grad():
        for at in range(len(data)):
            base += torch.stack(supervised_loss(mllm.model, mllm.model, collate([data[at]])))
    untrained = float(base[0] / base[1])
    main(
        words(
            tmp_path / "still",
            sample_world,
            **values,
            **extra | {"training.learning_rate": 0, "training.max_steps": 2},
        )
    )
    assert evaluations(tmp_path / "still")[0]["loss"] == pytest.approx(untrained, abs=1e-5)


@pytest.mark.slow
def test_tasks_on_two_ranks_score_as_on_one(mllm_dir: Path, sample_world: Path, tmp_path: Path) -> None:
    """Also under ZeRO-3, which shards the weights."""
    data = write_parquet(tmp_path / "pope.parquet", pope_rows())
    tasks = tmp_path / "tasks.yaml"
    tasks.write_text(f"tasks: [{{task: clips_pope_random, data: {data}}}]\nbatch_size: 2\n")
    values = {
        "model.checkpoint": mllm_dir,
        "stage.llm": "true",
        "evaluation.every": 1,
        "evaluation.tasks": tasks,
        "evaluation.share": 0.2,
        "training.max_steps": 2,
    }
    main(words(tmp_path / "one", sample_world, **values))
    runs = []
    for zero in ("zero2", "zero3"):
        config = ROOT / "configs" / "deepspeed" / f"{zero}.json"
        own = {"training.deepspeed": config, "training.device_batch_size": 4}
        runs.append(words(tmp_path / zero, sample_world, **values, **own))
    launch_several(deepspeed_launcher(), tmp_path / "runs.json", *runs)
    for zero in ("zero2", "zero3"):
        for two, one in zip(evaluations(tmp_path / zero), evaluations(tmp_path / "one"), strict=True):
            assert two["pope_random_accuracy"] == one["pope_random_accuracy"]
            assert two["loss"] == pytest.approx(one["loss"], abs=1e-3)


def test_tasks_with_bf16_llm_and_fp32_projector(mllm_dir: Path, sample_world: Path, tmp_path: Path) -> None:
    data = write_parquet(tmp_path / "pope.parquet", pope_rows())
    tasks = tmp_path / "tasks.yaml"
    tasks.write_text(f"tasks: [{{task: clips_pope_random, data: {data}}}]\nbatch_size: 2\n")
    values = {"evaluation.every": 1, "evaluation.tasks": tasks, "training.max_steps": 1, "training.precision": "bf16"}
    main(words(tmp_path / "run", sample_world, **{"model.checkpoint": mllm_dir}, **values))
    assert 0 <= evaluations(tmp_path / "run")[0]["pope_random_accuracy"] <= 1


def test_early_stopping_and_best_weights(
    mllm_dir: Path, sample_world: Path, tmp_path: Path, scorer: dict[str, Any]
) -> None:
    """Scores .1 .5 .3 .2: with patience 2 the run stops at the fourth and loads the weights of the second."""
    values = scorer["values"] | {
        "model.checkpoint": mllm_dir,
        "stage.llm": "true",
        "evaluation.every": 1,
        "evaluation.share": 0.2,
        "evaluation.best_by": "pope",
        "evaluation.keep_best": "true",
        "evaluation.patience": 2,
        "training.save_every": 1,
        "training.max_steps": 9,
        "training.keep_checkpoints": 1,
    }
    folder = tmp_path / "run"
    main(words(folder, sample_world, **values))
    assert [row["pope"] for row in evaluations(folder)] == [0.1, 0.5, 0.3, 0.2]
    assert scorer["recipe"] == str(scorer["values"]["evaluation.tasks"])
    assert sorted(path.name for path in folder.glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-4"]
    best, last, final = (weights(place) for place in (folder / "checkpoint-2", folder / "checkpoint-4", folder))
    assert all(torch.equal(best[name], final[name]) for name in best)
    assert any(not torch.equal(last[name], final[name]) for name in best)
    state = json.loads((folder / "checkpoint-4" / "trainer_state.json").read_text())
    assert state["best_model_checkpoint"] == str(folder / "checkpoint-2")


def test_unknown_best_by_is_refused_before_step_1(mllm_dir: Path, sample_world: Path, tmp_path: Path) -> None:
    data = write_parquet(tmp_path / "pope.parquet", pope_rows())
    tasks = tmp_path / "tasks.yaml"
    tasks.write_text(f"tasks: [{{task: clips_pope_random, data: {data}}}]\n")
    values = {"evaluation.every": 2, "evaluation.tasks": tasks, "evaluation.patience": 1, "training.max_steps": 2}
    given = {"model.checkpoint": mllm_dir, "evaluation.best_by": "pope_random_acuracy"} | values
    with raises_user_error(key="evaluation.best_by", value="pope_random_acuracy") as caught:
        main(words(tmp_path / "run", sample_world, **given))
    names = [f"pope_random_{metric}" for metric in ("accuracy", "precision", "recall", "f1", "yes_ratio")]
    assert ", ".join(names) in str(caught.value.remedy)
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


@pytest.mark.parametrize(
    ("values", "key"),
    [
        ({"every": 1}, "evaluation.every"),
        ({"every": 1, "share": 1.0}, "evaluation.share"),
        ({"every": 1, "share": 0.1, "batch_size": 0}, "evaluation.batch_size"),
        ({"every": 1, "tasks": "t", "keep_best": True}, "evaluation.best_by"),
        ({"every": 1, "share": 0.1, "patience": 1, "best_by": "pope"}, "evaluation.best_by"),
        ({"every": 2, "share": 0.1, "keep_best": True}, "evaluation.keep_best"),
        # without effect
        ({"share": 0.1}, "evaluation.share"),
        ({"file": "f"}, "evaluation.file"),
        ({"tasks": "t"}, "evaluation.tasks"),
        ({"patience": 1}, "evaluation.patience"),
        ({"every": 1, "share": 0.1, "images": "i"}, "evaluation.images"),
        ({"every": 1, "file": "f", "share": 0.1}, "evaluation.share"),
        ({"every": 1, "tasks": "t", "batch_size": 4}, "evaluation.batch_size"),
        ({"every": 1, "share": 0.1, "scorer": "m:f"}, "evaluation.scorer"),
        ({"every": 1, "tasks": "t", "best_by": "pope"}, "evaluation.best_by"),
    ],
)
def test_invalid_evaluation_is_refused(values: dict[str, Any], key: str) -> None:
    with raises_user_error(key=key):
        TrainEvaluationRecipe(**values).check(save_every=3)


def test_evaluation_that_leaves_nothing_to_train_on_is_refused(
    mllm_dir: Path, sample_world: Path, tmp_path: Path
) -> None:
    values = {"model.checkpoint": mllm_dir, "evaluation.every": 1, "evaluation.share": 0.99}
    with raises_user_error(key="evaluation.share", value=0.99):
        main(words(tmp_path / "run", sample_world, **values))


def test_missing_recipe_of_tasks_is_refused() -> None:
    with raises_user_error(file="no.yaml", key="evaluation.tasks"):
        load_scorer(TrainEvaluationRecipe(every=1, tasks="no.yaml"))


# --- before step 1 ----------------------------------------------------------------------------------------------------


def test_first_rows_are_logged_with_their_supervised_tokens(
    mllm_dir: Path, sample_world: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("INFO", logger="clips_mllm"):
        main(words(tmp_path / "run", sample_world, **{"model.checkpoint": mllm_dir, "training.max_steps": 1}))
    assert "<|im_start|>assistant" in caplog.text and "<|im_end|>⟧" in caplog.text


def test_dry_save_finds_a_part_that_changes_when_saved(
    mllm_dir: Path, sample_world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from clips_mllm.training import preflight

    given = words(tmp_path / "run", sample_world, **{"model.checkpoint": mllm_dir})
    save = preflight.save_mllm

    def save_other_template(model: Any, processor: Any, folder: Path, state: Any = None) -> None:
        save(model, processor, folder, state)
        (folder / "chat_template.jinja").write_text("{{ messages }}")

    with monkeypatch.context() as patch:
        patch.setattr(preflight, "save_mllm", save_other_template)
        with raises_user_error() as caught:
            main(given)
        assert "the chat template" in caught.value.problem
    with monkeypatch.context() as patch:
        patch.setattr(preflight, "free_bytes", lambda _: 1000)
        with raises_user_error(file=tmp_path / "run"):
            main(given)
    assert not list((tmp_path / "run").glob("*")), "no files are left"


# --- errors that stop a run -------------------------------------------------------------------------------------------


def test_nan_is_reported_with_its_samples(
    mllm_dir: Path, sample_world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from clips_mllm.data.collator import InstructionCollator

    collate, batches = InstructionCollator.__call__, 0

    def collate_nan(self: Any, samples: Any) -> Any:
        nonlocal batches
        batches += 1
        batch = collate(self, samples)
        if batches == 4:  # step 3: the first batch is the one logged before step 1
            batch["pixel_values"][0, 0, 3, 3] = float("nan")
        return batch

    monkeypatch.setattr(InstructionCollator, "__call__", collate_nan)
    folder = tmp_path / "run"
    with raises_user_error() as caught:
        main(words(folder, sample_world, **{"model.checkpoint": mllm_dir, "training.save_every": 1}))
    assert all(fact in str(caught.value) for fact in ("step 3", "loss nan", "bad_step.json", "checkpoint-2"))
    report = json.loads((folder / "bad_step.json").read_text())
    assert len(report["ranks"][0]["keys"]) == 8 and "user" in report["ranks"][0]["keys"][0]


def test_batch_without_supervised_tokens_stops_the_run(
    mllm_dir: Path, sample_world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from clips_mllm.data.collator import InstructionCollator

    collate = InstructionCollator.__call__

    def collate_unsupervised(self: Any, samples: Any) -> Any:
        batch = collate(self, samples)
        return batch | {"labels": torch.full_like(batch["labels"], -100)}

    monkeypatch.setattr(InstructionCollator, "__call__", collate_unsupervised)
    with raises_user_error(key="data"):
        main(words(tmp_path / "run", sample_world, **{"model.checkpoint": mllm_dir}))


def test_checkpoint_with_a_projector_of_another_shape_is_refused(
    mllm_dir: Path, sample_world: Path, tmp_path: Path
) -> None:
    import shutil

    from safetensors.torch import load_file, save_file

    other = tmp_path / "other"
    shutil.copytree(mllm_dir, other)
    state = load_file(other / "model.safetensors")
    name = next(name for name in state if "linear_1.weight" in name)
    save_file(state | {name: state[name][:, :-4].contiguous()}, other / "model.safetensors", {"format": "pt"})
    with raises_user_error(file=other) as caught:
        main(words(tmp_path / "run", sample_world, **{"model.checkpoint": other}))
    assert "linear_1" in caught.value.problem
