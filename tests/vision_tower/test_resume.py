"""Runs that are killed, stopped or crash go on as if nothing had happened: real processes, bit-identical curves."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers.pretrain_runs import arguments, metrics
from tests.helpers.processes import children, has_ended
from tests.helpers.train_runs import launch_several, torchrun_launcher
from vision_tower.common.errors import Stopped, run_command
from vision_tower.pretrain import main
from vision_tower.training.run_folder import latest_checkpoint

STEPS = 40
TIMING = {"samples_per_second", "data_wait", "tflops", "mfu"}
# Checkpoints fall between lines of the log, and passes end between checkpoints.
GIVEN = {
    "training.max_steps": STEPS,
    "training.log_every": 3,
    "training.save_every": 4,
    "training.schedule": "cosine",
    "training.warmup_steps": 5,
    "data.shuffle_buffer": 20,
}


def curve(folder: Path) -> list[dict[str, float]]:
    """The log without what a clock says."""
    return [{name: value for name, value in row.items() if name not in TIMING} for row in metrics(folder)]


def places(folder: Path, rank: int = 0) -> Any:
    """Where the readers stood at the end."""
    return json.loads((folder / f"checkpoint-{STEPS}" / f"readers_{rank}.json").read_text())


def weights(folder: Path) -> bytes:
    return (folder / "model.safetensors").read_bytes()


def start(world: Path, folder: Path, ranks: int = 1, **values: Any) -> subprocess.Popen[str]:
    """The command in a process of its own, in a session of its own."""
    words = ["-m", "vision_tower.pretrain", *arguments(world, folder, **GIVEN | values)]
    if ranks > 1:
        words = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks), *words]
    # The other runs are in this process: as many threads, or sums come in another order.
    environment = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    return subprocess.Popen(
        [sys.executable, *words], stderr=subprocess.PIPE, text=True, env=environment, start_new_session=True
    )


def wait_for_line(process: subprocess.Popen[str], folder: Path, step: int) -> None:
    """Until the log has reached `step`."""
    file = folder / "metrics.jsonl"
    until = time.monotonic() + 200
    while time.monotonic() < until:
        if file.exists() and any(json.loads(line)["step"] >= step for line in file.read_text().splitlines()[:-1]):
            return
        assert process.poll() is None, process.stderr.read() if process.stderr else ""
        time.sleep(0.005)
    raise AssertionError(f"no step {step} in time")


@pytest.fixture(scope="module", params=[pytest.param(0, marks=pytest.mark.slow), 2])
def whole(request: pytest.FixtureRequest, sample_world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing interrupts, without and with loader processes."""
    folder = tmp_path_factory.mktemp("whole") / str(request.param)
    main(arguments(sample_world, folder, **GIVEN | {"training.workers": request.param}))
    return folder


def test_kill_at_a_random_step(whole: Path, sample_world: Path, tmp_path: Path) -> None:
    """`kill -9`, and the same command again: the same losses to the last digit, the same samples, the same weights."""
    workers = int(whole.name)
    folder = tmp_path / "killed"
    process = start(sample_world, folder, **{"training.workers": workers})
    wait_for_line(process, folder, random.randrange(6, 24))
    helpers = children(process.pid)
    process.kill()
    process.wait()
    reached = latest_checkpoint(folder)
    assert reached is not None and len(helpers) >= workers
    first, *rest = (folder / "metrics.jsonl").read_text().splitlines(keepends=True)
    marked = json.dumps(json.loads(first) | {"marked": 1.0}) + "\n"
    (folder / "metrics.jsonl").write_text("".join([marked, *rest, '{"step": 99, "lo']))  # a line was cut
    main(arguments(sample_world, folder, **GIVEN | {"training.workers": workers}))
    resumed = curve(folder)
    assert resumed[0].pop("marked")  # the first steps were not repeated
    assert resumed == curve(whole)
    assert places(folder) == places(whole)
    assert weights(folder) == weights(whole)
    assert all(has_ended(helper) for helper in helpers)


def test_sigterm_saves_and_ends_with_0(sample_world: Path, tmp_path: Path, whole: Path) -> None:
    """A scheduler signals every process of a job at once, loader processes too."""
    workers = int(whole.name)
    folder = tmp_path / "stopped"
    process = start(sample_world, folder, **{"training.workers": workers, "training.save_every": 0})
    wait_for_line(process, folder, 6)
    os.killpg(process.pid, signal.SIGTERM)
    _, said = process.communicate(timeout=100)
    assert process.returncode == 0, said
    reached = latest_checkpoint(folder)
    assert reached is not None and not (folder / "model.safetensors").exists()
    step = reached.rpartition("-")[2]
    line = said.strip().splitlines()[-1]
    assert line.startswith(f"SIGTERM: stopped after step {step} of {STEPS}, checkpoint saved in {folder}")
    assert "Traceback" not in said
    main(arguments(sample_world, folder, **GIVEN | {"training.workers": workers}))  # saving more often is allowed
    assert curve(folder) == curve(whole)
    assert weights(folder) == weights(whole)


@pytest.mark.slow
def test_sigterm_to_one_of_two_ranks_stops_both_at_one_step(sample_world: Path, tmp_path: Path) -> None:
    values = {"training.device_batch_size": 8, "training.workers": 1}
    runs = {name: tmp_path / name for name in ("whole", "stopped")}
    process = start(sample_world, runs["stopped"], 2, **values)
    wait_for_line(process, runs["stopped"], 6)
    os.kill(children(process.pid)[-1], signal.SIGTERM)
    _, said = process.communicate(timeout=100)
    assert process.returncode == 0 and said.count("SIGTERM: stopped after step") == 2, said
    both = [arguments(sample_world, folder, **GIVEN | values) for folder in runs.values()]
    launch_several(torchrun_launcher(), tmp_path / "runs.json", *both, command="pretrain")
    assert curve(runs["stopped"]) == curve(runs["whole"])
    for rank in (0, 1):
        assert places(runs["stopped"], rank) == places(runs["whole"], rank)
    readers = [reader for rank in (0, 1) for reader in places(runs["whole"], rank)["cursors"]]
    assert [reader["places"][0]["seen"] for reader in readers] == [STEPS * 8] * 2


def test_a_finished_run_is_not_trained_further(sample_world: Path, tmp_path: Path) -> None:
    """Whatever the schedule: at the end of a cosine a further step would change no weight, and hide itself."""
    folder = tmp_path / "run"
    given = arguments(sample_world, folder, **{"training.max_steps": 4, "training.save_every": 4})
    main(given)
    before, log = weights(folder), metrics(folder)
    main(given)
    assert weights(folder) == before and metrics(folder) == log
    assert [path.name for path in folder.glob("checkpoint-*")] == ["checkpoint-4"]


def test_a_tower_with_class_token_goes_on_from_its_weights(
    sample_world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """ViTModel's weights have other names in files than in the model."""
    from vision_tower.training.sigterm import StopOnSigterm

    values = {"model.class_token": "true", "training.max_steps": 6, "training.save_every": 4}
    whole, folder = tmp_path / "whole", tmp_path / "stopped"
    main(arguments(sample_world, whole, **values))
    with monkeypatch.context() as patch:
        patch.setattr(StopOnSigterm, "_agreed", lambda self, world: (folder / "checkpoint-4").exists())
        with pytest.raises(Stopped):
            main(arguments(sample_world, folder, **values))
    main(arguments(sample_world, folder, **values))
    assert curve(folder) == curve(whole) and weights(folder) == weights(whole)


def test_a_checkpoint_is_there_whole_or_not_at_all(
    sample_world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A crash in the middle of the second save: the first one is still there, though only one is kept."""
    from vision_tower.training.resume import STAGING, ResumableTrainer

    folder = tmp_path / "run"
    save = ResumableTrainer._save_rng_state

    def crash(self: ResumableTrainer, output_dir: str) -> None:
        if self.state.global_step == 8:
            raise InterruptedError
        save(self, output_dir)

    given = arguments(sample_world, folder, **GIVEN | {"training.max_steps": 10, "training.keep_checkpoints": 1})
    with monkeypatch.context() as patch:
        patch.setattr(ResumableTrainer, "_save_rng_state", crash)
        with pytest.raises(InterruptedError):
            main(given)
    assert [path.name for path in folder.glob("checkpoint-*")] == ["checkpoint-4"]
    assert (folder / STAGING / "checkpoint-8" / "model.safetensors").exists()
    main(given)
    assert [path.name for path in folder.glob("checkpoint-*")] == ["checkpoint-10"]
    assert not (folder / STAGING).exists()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"training.learning_rate": 1e-3, "data.shuffle_buffer": 21},
            "data.shuffle_buffer=21 (was 20), training.learning_rate=0.001 (was 0.002);",
        ),
        ({"data.augmentation.jitter": 0.1}, "data.augmentation.jitter=0.1 (was 0.2);"),
        ({"model.embed_dim": 8}, "model.embed_dim=8 (was 16);"),
    ],
)
def test_another_recipe_is_refused(
    whole: Path,
    sample_world: Path,
    capfd: pytest.CaptureFixture[str],
    values: dict[str, Any],
    message: str,
) -> None:
    given = GIVEN | {"training.workers": int(whole.name)} | values
    assert run_command(main, arguments(sample_world, whole, **given)) == 2
    line = capfd.readouterr().err.splitlines()[-1]
    assert line.startswith(f"error: {whole}: holds a run of another recipe: {message}")


def test_a_result_without_checkpoints_is_not_overwritten(
    sample_world: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    given = GIVEN | {"training.max_steps": 2, "training.save_every": 0}
    main(arguments(sample_world, tmp_path / "run", **given))
    assert run_command(main, arguments(sample_world, tmp_path / "run", **given | {"training.seed": 7})) == 2
    assert "holds a run of another recipe: training.seed=7 (was " in capfd.readouterr().err.splitlines()[-1]


def test_other_shards_are_refused(sample_world: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """A shard that was added since would change the order of everything."""
    folder = tmp_path / "run"
    shutil.copytree(sample_world / "pretrain", tmp_path / "world" / "pretrain")
    given = arguments(tmp_path / "world", folder, **GIVEN | {"training.max_steps": 4})
    main(given)
    (folder / "checkpoint-4").rename(folder / "checkpoint-3")
    file = folder / "checkpoint-3" / "trainer_state.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"global_step": 3}))
    shard = next((tmp_path / "world" / "pretrain").glob("*.tar"))
    shutil.copy(shard, shard.with_name("new.tar"))
    assert run_command(main, given) == 2
    line = capfd.readouterr().err.splitlines()[-1]
    assert "readers_0.json: the checkpoint was written with shards=" in line
