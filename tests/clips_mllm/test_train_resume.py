"""Runs of every kind that are killed, stopped, or run out of disk resume bit-identically."""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from clips_mllm.model.build import build_mllm
from clips_mllm.model.checkpoint import load_mllm, save_mllm
from clips_mllm.train import main
from tests.helpers.errors import raises_user_error
from tests.helpers.train_runs import losses, stop_after, weights, words
from vision_tower.common.errors import run_command

pytestmark = pytest.mark.timeout(900)  # real processes, perhaps on a busy machine
STEPS = 16
# With dropout, which draws random numbers.
LORA = {
    "stage.llm": "true",
    "stage.adapter.kind": "lora",
    "stage.adapter.rank": 4,
}
MODES: dict[str, dict[str, Any]] = {
    "align": {"data.group_by_length": "false"},
    "full": {"stage.llm": "true", "data.group_by_length": "true"},
    "lora": LORA,
    "qlora": LORA | {"stage.adapter.kind": "qlora"},
}
# Passes over the data end between checkpoints, and checkpoints fall between lines of the log.
VALUES = {
    "training.max_steps": STEPS,
    "training.save_every": 2,
    "training.log_every": 3,
    "training.keep_checkpoints": 2,
    "training.global_batch_size": 6,
    "training.device_batch_size": 3,
}


def errors(stderr: str) -> list[str]:
    return [line for line in stderr.splitlines() if line.startswith("error: ")]


@pytest.mark.parametrize(
    "mode", [pytest.param(mode, marks=() if mode == "full" else pytest.mark.slow) for mode in MODES]
)
def test_resume_after_kill_is_bit_identical(mllm_dir: Path, sample_world: Path, tmp_path: Path, mode: str) -> None:
    """`kill -9`, then the same command: bit-identical losses and weights."""
    values = VALUES | {"model.checkpoint": mllm_dir} | MODES[mode]
    killed, uninterrupted = tmp_path / "killed", tmp_path / "uninterrupted"
    stop_after(killed, 2 * random.randrange(1, 5), words(killed, sample_world, **values), lambda p: p.kill())
    assert not {"config.json", "adapter_config.json"} & {path.name for path in killed.iterdir()}
    main(words(killed, sample_world, **values))
    main(words(uninterrupted, sample_world, **values))
    assert losses(killed, "step") == list(range(3, STEPS + 1, 3)), "every line once"
    assert losses(killed) == losses(uninterrupted)
    assert losses(killed, "grad_norm") == losses(uninterrupted, "grad_norm")
    before, after = weights(uninterrupted), weights(killed)
    assert all(torch.equal(before[name], after[name]) for name in before)
    checkpoints = sorted(path.name for path in killed.glob("checkpoint-*"))
    assert checkpoints == ["checkpoint-14", "checkpoint-16"] and not list(killed.glob(".*"))


@pytest.mark.slow
def test_resume_after_ctrl_c(mllm_dir: Path, sample_world: Path, tmp_path: Path) -> None:
    """Steps after the last checkpoint are lost; `save_every` may change on resume."""
    values = VALUES | {"model.checkpoint": mllm_dir, "training.workers": 1} | MODES["full"]
    folder, uninterrupted = tmp_path / "stopped", tmp_path / "uninterrupted"
    command = words(folder, sample_world, **values)
    code, stderr = stop_after(folder, 2, command, lambda p: os.killpg(p.pid, signal.SIGINT))  # as a terminal does
    assert code == 130 and "Traceback" not in stderr, stderr
    assert errors(stderr) == [stderr.splitlines()[-1]]
    main(words(folder, sample_world, **values | {"training.save_every": 4}))
    main(words(uninterrupted, sample_world, **values))
    assert losses(folder) == losses(uninterrupted)


@pytest.mark.slow
def test_sigterm_to_every_process(mllm_dir: Path, sample_world: Path, tmp_path: Path) -> None:
    """A scheduler signals all processes of a job, also the loader's: the run saves at any step, exits with code 0."""
    values = VALUES | {"model.checkpoint": mllm_dir, "training.workers": 1} | MODES["full"]
    folder, uninterrupted = tmp_path / "stopped", tmp_path / "uninterrupted"
    command = words(folder, sample_world, **values)
    code, stderr = stop_after(folder, 8, command, lambda p: os.killpg(p.pid, signal.SIGTERM))
    assert code == 0, stderr
    reached = max(int(path.name.rpartition("-")[2]) for path in folder.glob("checkpoint-*"))
    line = stderr.strip().splitlines()[-1]
    assert line.startswith(f"SIGTERM: stopped after step {reached} of {STEPS}, checkpoint saved in {folder}")
    assert not (folder / "config.json").exists()
    main(command)
    main(words(uninterrupted, sample_world, **values))
    assert losses(folder) == losses(uninterrupted)


@pytest.fixture(scope="module")
def finished(mllm_dir: Path, sample_world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("finished") / "run"
    main(words(folder, sample_world, **{"model.checkpoint": mllm_dir, "training.save_every": 1, "stage.llm": "true"}))
    return folder


def test_every_checkpoint_is_complete_by_itself(finished: Path, sample_world: Path) -> None:
    from clips_mllm.chat import main as chat

    folder = finished / "checkpoint-3"
    names = {path.name for path in folder.iterdir()}
    wanted = {"config.json", "model.safetensors", "generation_config.json", "processor_config.json", "tokenizer.json"}
    assert wanted | {"chat_template.jinja", "trainer_state.json"} <= names
    assert json.loads((folder / "config.json").read_text()).get("use_cache", True)
    before, after = weights(folder), weights(finished)
    assert all(torch.equal(before[name], after[name]) for name in before)
    image = next((sample_world / "llava" / "images").rglob("*.*g"))
    chat([str(folder), "--image", str(image), "--question", "What is this?", "--max_new_tokens", "3"])


@pytest.mark.parametrize(
    ("values", "key"),
    [
        (
            {"training.learning_rate": 1e-3, "stage.llm_learning_rate": 1e-4},
            "stage.llm_learning_rate, training.learning_rate",
        ),
        ({"data.max_length": 300}, "data.max_length"),
        ({"evaluation.every": 1, "evaluation.share": 0.5}, "evaluation.share"),
    ],
)
def test_different_recipe_is_refused(
    finished: Path, mllm_dir: Path, sample_world: Path, values: dict[str, Any], key: str
) -> None:
    options = {"model.checkpoint": mllm_dir, "training.save_every": 1, "stage.llm": "true"} | values
    with raises_user_error(file=finished, key=key):
        main(words(finished, sample_world, **options))


def test_result_of_another_command_is_refused(mllm_dir: Path, sample_world: Path, tmp_path: Path, capfd: Any) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "recipe.yaml").write_text("objective: clips\n")
    assert run_command(main, words(tmp_path, sample_world, **{"model.checkpoint": mllm_dir})) == 2
    (line,) = errors(capfd.readouterr().err)
    assert line.startswith(f"error: {tmp_path}: ") and f"{tmp_path}/recipe.yaml: objective: " in line


def test_result_without_checkpoints_is_not_overwritten(mllm_dir: Path, sample_world: Path, tmp_path: Path) -> None:
    """A different recipe is refused; the same one trains again."""
    folder, options = tmp_path / "run", {"model.checkpoint": mllm_dir, "training.save_every": 0}
    main(words(folder, sample_world, **options))
    before = weights(folder)
    with raises_user_error(file=folder, key="training.seed"):
        main(words(folder, sample_world, **options, **{"training.seed": 1}))
    held_out = {"evaluation.every": 1, "evaluation.share": 0.5}
    with raises_user_error(file=folder, key="evaluation.every, evaluation.share"):
        main(words(folder, sample_world, **options, **held_out))
    assert weights(folder).keys() == before.keys()
    main(words(folder, sample_world, **options))
    assert all(torch.equal(weights(folder)[name], before[name]) for name in before)


def test_resume_with_different_data_is_refused(mllm_dir: Path, sample_world: Path, tmp_path: Path) -> None:
    rows = json.loads((sample_world / "llava" / "stage2.json").read_text())
    file = tmp_path / "rows.json"
    file.write_text(json.dumps(rows))
    options = {
        "model.checkpoint": mllm_dir,
        "training.save_every": 2,
        "training.keep_checkpoints": 2,
        "data.file": file,
    }
    main(words(tmp_path / "run", sample_world, **options))
    shutil.rmtree(tmp_path / "run" / "checkpoint-3", ignore_errors=True)
    file.write_text(json.dumps(rows[:-1]))
    with raises_user_error(key="samples", value=len(rows) - 1):
        main(words(tmp_path / "run", sample_world, **options))


def test_resume_warns_if_a_data_file_changed(
    mllm_dir: Path, sample_world: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """With as many rows as before: a row may have been fixed after a NaN."""
    rows = json.loads((sample_world / "llava" / "stage2.json").read_text())
    file = tmp_path / "rows.json"
    file.write_text(json.dumps(rows))
    options = {"model.checkpoint": mllm_dir, "training.save_every": 2, "data.file": file}
    main(words(tmp_path / "run", sample_world, **options))
    main(words(tmp_path / "run", sample_world, **options))
    logger = "clips_mllm.provenance.training_inputs"
    assert not [record for record in caplog.records if record.name == logger]
    file.write_text(json.dumps(rows[::-1]))
    main(words(tmp_path / "run", sample_world, **options))
    (record,) = [record for record in caplog.records if record.name == logger]
    assert record.levelname == "WARNING" and str(file) in record.getMessage()


@pytest.mark.parametrize("stage", [{"stage.llm": "true"}, LORA])
def test_resume_with_another_tower_is_refused(
    mllm_dir: Path, encoder_dir: Path, sample_world: Path, tmp_path: Path, stage: dict[str, Any]
) -> None:
    """Stage 1 was run again with another tower, to the same folder."""
    from transformers import AutoImageProcessor, SiglipVisionConfig, SiglipVisionModel

    base, tower = tmp_path / "base", tmp_path / "tower"
    shutil.copytree(mllm_dir, base)
    command = words(tmp_path / "run", sample_world, **stage, **{"model.checkpoint": base, "training.save_every": 2})
    main(command)
    config = SiglipVisionConfig.from_pretrained(encoder_dir / "tower", intermediate_size=40)
    SiglipVisionModel(config).save_pretrained(tower)
    AutoImageProcessor.from_pretrained(encoder_dir / "tower").save_pretrained(tower)
    joined = build_mllm(
        str(tower), str(sample_world / "llm"), feature_layer=-2, feature_select="auto", dtype=torch.float32
    )
    save_mllm(*joined, base)
    with raises_user_error(file=tmp_path / "run", key="output_dir"):
        main(command)


def test_resume_of_an_adapter_with_another_base_is_refused(mllm_dir: Path, sample_world: Path, tmp_path: Path) -> None:
    """Stage 1 was run again, to the same folder; the adapter's checkpoint has no weights of the base."""
    base, run = tmp_path / "base", tmp_path / "run"
    shutil.copytree(mllm_dir, base)
    command = words(run, sample_world, **LORA, **{"model.checkpoint": base, "training.save_every": 2})
    main(command)
    state = load_file(base / "model.safetensors")
    next(weights for name, weights in state.items() if "language_model" in name).add_(1)
    save_file(state, base / "model.safetensors", metadata={"format": "pt"})
    with raises_user_error(file=run, key="output_dir"):
        main(command)


# --- a full disk ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["no room", "a write fails"])
def test_full_disk_skips_the_checkpoint_and_continues(
    mllm_dir: Path,
    sample_world: Path,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    how: str,
) -> None:
    from vision_tower.training import resume

    folder = tmp_path / "run"
    options = {"model.checkpoint": mllm_dir, "training.save_every": 1, "training.max_steps": 4}
    if how == "no room":  # from the second checkpoint to the third
        answers = iter([10**12, 0, 0, 0, 0])
        monkeypatch.setattr(resume, "free_bytes", lambda _: next(answers, 10**12))
    else:
        save = resume.ResumableTrainer._save_optimizer_and_scheduler

        def full(self: Any, output_dir: str) -> None:
            if self.state.global_step in (2, 3):
                raise OSError(errno.ENOSPC, "No space left on device", output_dir)
            save(self, output_dir)

        monkeypatch.setattr(resume.ResumableTrainer, "_save_optimizer_and_scheduler", full)
    main(words(folder, sample_world, **options))
    warnings = [record.args for record in caplog.records if record.name == resume.__name__]
    assert [(args[0], args[-1]) for args in warnings if isinstance(args, tuple)] == [
        (folder / name, str(folder / "checkpoint-1")) for name in ("checkpoint-2", "checkpoint-3")
    ]
    assert [path.name for path in folder.glob("checkpoint-*")] == ["checkpoint-4"]
    assert not list(folder.glob(".*")) and len(losses(folder)) == 4
    assert load_mllm(folder, device="cpu")


def test_full_disk_at_the_end_keeps_the_last_checkpoint(
    mllm_dir: Path, sample_world: Path, tmp_path: Path, capfd: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from clips_mllm.training import trainer

    folder, save = tmp_path / "run", trainer.save_mllm

    def full(model: Any, processor: Any, to: Path, state: Any = None) -> None:
        if to == folder:
            raise OSError(errno.ENOSPC, "No space left on device", str(to))
        save(model, processor, to, state)

    command = words(folder, sample_world, **{"model.checkpoint": mllm_dir, "training.save_every": 2})
    with monkeypatch.context() as patch:
        patch.setattr(trainer, "save_mllm", full)
        assert run_command(main, command) == 28
    (line,) = errors(capfd.readouterr().err)
    assert f"{folder}: no space left on the device" in line
    assert (folder / "checkpoint-3" / "trainer_state.json").exists() and not (folder / "config.json").exists()
    main(command)
    assert load_mllm(folder, device="cpu")
