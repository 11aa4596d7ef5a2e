"""Runs that are killed, stopped or crash resume bit-identically. Tested with real processes."""

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

from tests.helpers.errors import raises_user_error
from tests.helpers.pretrain_runs import arguments, metrics
from tests.helpers.processes import children, has_ended
from tests.helpers.train_runs import launch_several, torchrun_launcher
from vision_tower.common.errors import Stopped
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
    """Return the log without timings."""
    return [{name: value for name, value in row.items() if name not in TIMING} for row in metrics(folder)]


def reader_state(folder: Path, rank: int = 0) -> Any:
    """Return the readers' positions at the end of the run."""
    return json.loads((folder / f"checkpoint-{STEPS}" / f"readers_{rank}.json").read_text())


def weights(folder: Path) -> bytes:
    return (folder / "model.safetensors").read_bytes()


def start(world: Path, folder: Path, ranks: int = 1, **values: Any) -> subprocess.Popen[str]:
    """Start the command in a new process and session."""
    words = ["-m", "vision_tower.pretrain", *arguments(world, folder, **GIVEN | values)]
    if ranks > 1:
        words = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks), *words]
    # As many threads as the runs in this process, because the order of sums depends on it.
    environment = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    return subprocess.Popen(
        [sys.executable, *words], stderr=subprocess.PIPE, text=True, env=environment, start_new_session=True
    )


def wait_for_line(process: subprocess.Popen[str], folder: Path, step: int) -> None:
    """Wait until the log reaches `step`."""
    file = folder / "metrics.jsonl"
    until = time.monotonic() + 200
    while time.monotonic() < until:
        if file.exists() and any(json.loads(line)["step"] >= step for line in file.read_text().splitlines()[:-1]):
            return
        assert process.poll() is None, process.stderr.read() if process.stderr else ""
        time.sleep(0.005)
    raise AssertionError(f"step {step} not reached in time")


@pytest.fixture(scope="module", params=[pytest.param(0, marks=pytest.mark.slow), 2])
def uninterrupted(request: pytest.FixtureRequest, sample_world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train without interruption, with and without loader processes."""
    folder = tmp_path_factory.mktemp("uninterrupted") / str(request.param)
    main(arguments(sample_world, folder, **GIVEN | {"training.workers": request.param}))
    return folder


def test_resume_after_kill_is_bit_identical(uninterrupted: Path, sample_world: Path, tmp_path: Path) -> None:
    """`kill -9` at a random step, then the same command: same losses, samples and weights."""
    workers = int(uninterrupted.name)
    folder = tmp_path / "killed"
    process = start(sample_world, folder, **{"training.workers": workers})
    wait_for_line(process, folder, random.randrange(6, 24))
    workers_alive = children(process.pid)
    process.kill()
    process.wait()
    reached = latest_checkpoint(folder)
    assert reached is not None and len(workers_alive) >= workers
    first, *rest = (folder / "metrics.jsonl").read_text().splitlines(keepends=True)
    marked = json.dumps(json.loads(first) | {"marked": 1.0}) + "\n"
    (folder / "metrics.jsonl").write_text("".join([marked, *rest, '{"step": 99, "lo']))  # a truncated line
    main(arguments(sample_world, folder, **GIVEN | {"training.workers": workers}))
    resumed = curve(folder)
    assert resumed[0].pop("marked")  # the first steps were not trained again
    assert resumed == curve(uninterrupted)
    assert reader_state(folder) == reader_state(uninterrupted)
    assert weights(folder) == weights(uninterrupted)
    assert all(has_ended(worker) for worker in workers_alive)


def test_sigterm_saves_and_exits_with_0(sample_world: Path, tmp_path: Path, uninterrupted: Path) -> None:
    """A scheduler signals every process of a job at once, including loader processes."""
    workers = int(uninterrupted.name)
    folder = tmp_path / "stopped"
    process = start(sample_world, folder, **{"training.workers": workers, "training.save_every": 0})
    wait_for_line(process, folder, 6)
    os.killpg(process.pid, signal.SIGTERM)
    _, stderr = process.communicate(timeout=100)
    assert process.returncode == 0, stderr
    reached = latest_checkpoint(folder)
    assert reached is not None and not (folder / "model.safetensors").exists()
    step = reached.rpartition("-")[2]
    last_line = stderr.strip().splitlines()[-1]
    assert f"step {step} of {STEPS}" in last_line and str(folder) in last_line
    assert "Traceback" not in stderr
    main(arguments(sample_world, folder, **GIVEN | {"training.workers": workers}))  # saving more often is allowed
    assert curve(folder) == curve(uninterrupted)
    assert weights(folder) == weights(uninterrupted)


@pytest.mark.slow
def test_sigterm_to_one_rank_stops_both_after_the_same_step(sample_world: Path, tmp_path: Path) -> None:
    values = {"training.device_batch_size": 8, "training.workers": 1}
    runs = {name: tmp_path / name for name in ("uninterrupted", "stopped")}
    process = start(sample_world, runs["stopped"], 2, **values)
    wait_for_line(process, runs["stopped"], 6)
    os.kill(children(process.pid)[-1], signal.SIGTERM)
    _, stderr = process.communicate(timeout=100)
    assert process.returncode == 0 and stderr.count("SIGTERM: ") == 2, stderr
    both = [arguments(sample_world, folder, **GIVEN | values) for folder in runs.values()]
    launch_several(torchrun_launcher(), tmp_path / "runs.json", *both, command="pretrain")
    assert curve(runs["stopped"]) == curve(runs["uninterrupted"])
    for rank in (0, 1):
        assert reader_state(runs["stopped"], rank) == reader_state(runs["uninterrupted"], rank)
    readers = [reader for rank in (0, 1) for reader in reader_state(runs["uninterrupted"], rank)["cursors"]]
    assert [reader["places"][0]["seen"] for reader in readers] == [STEPS * 8] * 2


def test_complete_run_is_not_trained_further(sample_world: Path, tmp_path: Path) -> None:
    """With a constant schedule: at the end of a cosine one, an extra step would not change the weights."""
    folder = tmp_path / "run"
    given = arguments(sample_world, folder, **{"training.max_steps": 4, "training.save_every": 4})
    main(given)
    before, log = weights(folder), metrics(folder)
    main(given)
    assert weights(folder) == before and metrics(folder) == log
    assert [path.name for path in folder.glob("checkpoint-*")] == ["checkpoint-4"]


def test_resume_with_class_token_tower(sample_world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """ViTModel's weights have different names in files and in the model."""
    from vision_tower.training.sigterm import StopOnSigterm

    values = {"model.class_token": "true", "training.max_steps": 6, "training.save_every": 4}
    uninterrupted, folder = tmp_path / "uninterrupted", tmp_path / "stopped"
    main(arguments(sample_world, uninterrupted, **values))
    with monkeypatch.context() as patch:
        patch.setattr(StopOnSigterm, "_any_rank_requested", lambda self, world: (folder / "checkpoint-4").exists())
        with pytest.raises(Stopped):
            main(arguments(sample_world, folder, **values))
    main(arguments(sample_world, folder, **values))
    assert curve(folder) == curve(uninterrupted) and weights(folder) == weights(uninterrupted)


def test_crash_while_saving_keeps_previous_checkpoint(
    sample_world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After a crash during the second save the first checkpoint still exists, although only one is kept."""
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
    ("values", "key"),
    [
        (
            {"training.learning_rate": 1e-3, "data.shuffle_buffer": 21},
            "data.shuffle_buffer, training.learning_rate",
        ),
        ({"data.augmentation.jitter": 0.1}, "data.augmentation.jitter"),
        ({"model.embed_dim": 8}, "model.embed_dim"),
    ],
)
def test_different_recipe_is_refused(uninterrupted: Path, sample_world: Path, values: dict[str, Any], key: str) -> None:
    given = GIVEN | {"training.workers": int(uninterrupted.name)} | values
    with raises_user_error(file=uninterrupted, key=key):
        main(arguments(sample_world, uninterrupted, **given))


def test_result_without_checkpoints_is_not_overwritten(sample_world: Path, tmp_path: Path) -> None:
    given = GIVEN | {"training.max_steps": 2, "training.save_every": 0}
    main(arguments(sample_world, tmp_path / "run", **given))
    with raises_user_error(file=tmp_path / "run", key="training.seed"):
        main(arguments(sample_world, tmp_path / "run", **given | {"training.seed": 7}))


def test_resume_with_different_shards_is_refused(sample_world: Path, tmp_path: Path) -> None:
    """A shard that was added since would change the order of all samples."""
    folder = tmp_path / "run"
    shutil.copytree(sample_world / "pretrain", tmp_path / "world" / "pretrain")
    given = arguments(tmp_path / "world", folder, **GIVEN | {"training.max_steps": 4})
    main(given)
    (folder / "checkpoint-4").rename(folder / "checkpoint-3")
    file = folder / "checkpoint-3" / "trainer_state.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"global_step": 3}))
    shard = next((tmp_path / "world" / "pretrain").glob("*.tar"))
    shutil.copy(shard, shard.with_name("new.tar"))
    with raises_user_error(file=folder / "checkpoint-3" / "readers_0.json", key="shards"):
        main(given)
