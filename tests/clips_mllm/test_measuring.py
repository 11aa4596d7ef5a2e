"""Measuring inside a run: right, without touching the run; early stop and the best weights; what is shown and checked
before step 1, and what stops a run."""

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
from tests.helpers.tiny_llava import pope_rows, write_parquet
from tests.helpers.train_runs import deepspeed_launcher, launch_several, losses, weights, words
from vision_tower.common.errors import run_command

ROOT = Path(__file__).parents[2]


def measured(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "evaluation.jsonl").read_text().splitlines()]


@pytest.fixture
def scorer(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[str, Any]:
    """A stand-in for what measures tasks, by dotted name: it generates, draws, and says what it was given."""
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


def test_the_held_out_loss_is_right_and_disturbs_nothing(
    mllm_dir: Path, sample_world: Path, tmp_path: Path, scorer: dict[str, Any]
) -> None:
    """Over every supervised token, whatever the batches; the run with dropout learns the same as without measuring."""
    from clips_mllm.data.dataset import InstructionCollator, InstructionDataset
    from clips_mllm.data.recipe import InstructionRecipe
    from clips_mllm.training.trainer import supervised_loss

    stage1 = sample_world / "llava" / "stage1.json"
    values = {"model.checkpoint": mllm_dir, "stage.llm": "true", "stage.adapter.kind": "lora", "stage.adapter.rank": 4}
    main(words(tmp_path / "plain", sample_world, **values))
    extra = {"evaluation.every": 2, "evaluation.file": stage1, "evaluation.batch_size": 5, "training.max_steps": 3}
    main(words(tmp_path / "run", sample_world, **values, **extra, **scorer["values"]))
    assert losses(tmp_path / "run") == losses(tmp_path / "plain")
    rows = measured(tmp_path / "run")
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
    assert measured(tmp_path / "still")[0]["loss"] == pytest.approx(untrained, abs=1e-5)


@pytest.mark.slow
def test_lmms_eval_on_two_ranks(mllm_dir: Path, sample_world: Path, tmp_path: Path) -> None:
    """None waits for the other, also where weights are divided; the scores are those of one rank."""
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
        for two, one in zip(measured(tmp_path / zero), measured(tmp_path / "one"), strict=True):
            assert two["pope_random_accuracy"] == one["pope_random_accuracy"]
            assert two["loss"] == pytest.approx(one["loss"], abs=1e-3)


def test_tasks_beside_a_frozen_llm_in_bf16(mllm_dir: Path, sample_world: Path, tmp_path: Path) -> None:
    """Its projector is in fp32 while it trains."""
    data = write_parquet(tmp_path / "pope.parquet", pope_rows())
    tasks = tmp_path / "tasks.yaml"
    tasks.write_text(f"tasks: [{{task: clips_pope_random, data: {data}}}]\nbatch_size: 2\n")
    values = {"evaluation.every": 1, "evaluation.tasks": tasks, "training.max_steps": 1, "training.precision": "bf16"}
    main(words(tmp_path / "run", sample_world, **{"model.checkpoint": mllm_dir}, **values))
    assert 0 <= measured(tmp_path / "run")[0]["pope_random_accuracy"] <= 1


def test_early_stop_and_the_best_weights(
    mllm_dir: Path, sample_world: Path, tmp_path: Path, scorer: dict[str, Any]
) -> None:
    """Scores .1 .5 .3 .2: with patience 2 the run stops at the fourth, and ends with the weights of the second."""
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
    assert [row["pope"] for row in measured(folder)] == [0.1, 0.5, 0.3, 0.2]
    assert scorer["recipe"] == str(scorer["values"]["evaluation.tasks"])
    assert sorted(path.name for path in folder.glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-4"]
    best, last, final = (weights(place) for place in (folder / "checkpoint-2", folder / "checkpoint-4", folder))
    assert all(torch.equal(best[name], final[name]) for name in best)
    assert any(not torch.equal(last[name], final[name]) for name in best)
    state = json.loads((folder / "checkpoint-4" / "trainer_state.json").read_text())
    assert state["best_model_checkpoint"] == str(folder / "checkpoint-2")


def test_a_best_that_no_task_measures_is_said_before_step_1(
    mllm_dir: Path, sample_world: Path, tmp_path: Path, capfd: Any
) -> None:
    """Of lmms-eval's tasks by the names that its own metrics have here, not after hours at the first measurement."""
    data = write_parquet(tmp_path / "pope.parquet", pope_rows())
    tasks = tmp_path / "tasks.yaml"
    tasks.write_text(f"tasks: [{{task: clips_pope_random, data: {data}}}]\n")
    values = {"evaluation.every": 2, "evaluation.tasks": tasks, "evaluation.patience": 1, "training.max_steps": 2}
    given = {"model.checkpoint": mllm_dir, "evaluation.best_by": "pope_random_acuracy"} | values
    assert run_command(main, words(tmp_path / "run", sample_world, **given)) == 2
    (line,) = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error: ")]
    measured_names = [f"pope_random_{metric}" for metric in ("accuracy", "precision", "recall", "f1", "yes_ratio")]
    assert f"evaluation.best_by=pope_random_acuracy: not measured; there are {', '.join(measured_names)}" in line
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"evaluation.every": 1}, "evaluation.every: nothing to measure"),
        ({"evaluation.patience": 1}, "evaluation.every=0: nothing is measured to tell the best by"),
        (
            {"evaluation.every": 2, "evaluation.share": 0.1, "evaluation.keep_best": "true", "training.save_every": 3},
            "evaluation.keep_best: training.save_every=3 must be a multiple of evaluation.every=2",
        ),
        ({"evaluation.every": 1, "evaluation.share": 0.99}, "nothing is left to train on"),
        ({"evaluation.every": 1, "evaluation.tasks": "no.yaml"}, "no.yaml: no such recipe (evaluation.tasks)"),
    ],
)
def test_what_cannot_be_measured_is_one_line(
    mllm_dir: Path, sample_world: Path, tmp_path: Path, capfd: Any, values: dict[str, Any], message: str
) -> None:
    given = words(tmp_path / "run", sample_world, **{"model.checkpoint": mllm_dir} | values)
    assert run_command(main, given) == 2
    (line,) = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error: ")]
    assert message in line


def test_what_is_never_measured_is_told(mllm_dir: Path, sample_world: Path, tmp_path: Path, capfd: Any) -> None:
    given = {"model.checkpoint": mllm_dir, "evaluation.share": 0.1, "training.max_steps": 1}
    main(words(tmp_path / "run", sample_world, **given))
    assert "warning: evaluation.every=0, so nothing is measured or held out" in capfd.readouterr().err


# --- before step 1 ----------------------------------------------------------------------------------------------------


def test_the_first_rows_are_shown_with_what_is_learnt(
    mllm_dir: Path, sample_world: Path, tmp_path: Path, capfd: Any
) -> None:
    main(words(tmp_path / "run", sample_world, **{"model.checkpoint": mllm_dir, "training.max_steps": 1}))
    said = capfd.readouterr().err
    assert "[row 0: " in said
    assert "<|im_start|>assistant" in said and "<|im_end|>⟧" in said


def test_what_does_not_come_back_as_saved_stops_the_run(
    mllm_dir: Path, sample_world: Path, tmp_path: Path, capfd: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from clips_mllm.training import preflight

    given = words(tmp_path / "run", sample_world, **{"model.checkpoint": mllm_dir})
    save = preflight.save_mllm

    def other(model: Any, processor: Any, folder: Path, state: Any = None) -> None:
        save(model, processor, folder, state)
        (folder / "chat_template.jinja").write_text("{{ messages }}")

    with monkeypatch.context() as patch:
        patch.setattr(preflight, "save_mllm", other)
        assert run_command(main, given) == 2
    assert "dry save: the chat template does not come back as saved" in capfd.readouterr().err
    with monkeypatch.context() as patch:
        patch.setattr(preflight, "free_bytes", lambda _: 1000)
        assert run_command(main, given) == 2
    assert "0.0 MB free, the run will write at least" in capfd.readouterr().err
    assert not list((tmp_path / "run").glob("*")), "nothing is left behind"


# --- what stops a run -------------------------------------------------------------------------------------------------


def test_a_nan_is_named_with_its_samples(
    mllm_dir: Path, sample_world: Path, tmp_path: Path, capfd: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from clips_mllm.data.dataset import InstructionCollator

    collate, batches = InstructionCollator.__call__, 0

    def poisoned(self: Any, samples: Any) -> Any:
        nonlocal batches
        batches += 1
        batch = collate(self, samples)
        if batches == 4:  # one of them was shown before step 1
            batch["pixel_values"][0, 0, 3, 3] = float("nan")
        return batch

    monkeypatch.setattr(InstructionCollator, "__call__", poisoned)
    folder = tmp_path / "run"
    given = {"model.checkpoint": mllm_dir, "training.save_every": 1}
    assert run_command(main, words(folder, sample_world, **given)) == 2
    (line,) = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error: ")]
    assert "step 3: loss nan" in line and "bad_step.json" in line and "checkpoint-2" in line
    told = json.loads((folder / "bad_step.json").read_text())
    assert len(told["ranks"][0]["keys"]) == 8 and "user" in told["ranks"][0]["keys"][0]


def test_a_batch_without_supervision_is_named(
    mllm_dir: Path, sample_world: Path, tmp_path: Path, capfd: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from clips_mllm.data.dataset import InstructionCollator

    collate = InstructionCollator.__call__

    def silent(self: Any, samples: Any) -> Any:
        batch = collate(self, samples)
        return batch | {"labels": torch.full_like(batch["labels"], -100)}

    monkeypatch.setattr(InstructionCollator, "__call__", silent)
    assert run_command(main, words(tmp_path / "run", sample_world, **{"model.checkpoint": mllm_dir})) == 2
    (line,) = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error: ")]
    assert "step 1: no supervised token in the whole batch" in line and "data doctor" in line


def test_a_checkpoint_of_another_projector_shape_is_refused(
    mllm_dir: Path, sample_world: Path, tmp_path: Path, capfd: Any
) -> None:
    import shutil

    from safetensors.torch import load_file, save_file

    other = tmp_path / "other"
    shutil.copytree(mllm_dir, other)
    state = load_file(other / "model.safetensors")
    name = next(name for name in state if "linear_1.weight" in name)
    save_file(state | {name: state[name][:, :-4].contiguous()}, other / "model.safetensors", {"format": "pt"})
    assert run_command(main, words(tmp_path / "run", sample_world, **{"model.checkpoint": other})) == 2
    (line,) = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error: ")]
    assert "1 mismatched key " in line and "linear_1" in line
