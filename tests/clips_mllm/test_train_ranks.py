"""Ranks, accumulation and ZeRO give the same losses, also if a rank has only text, and resume exactly."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from clips_mllm.model.checkpoint import load_mllm, save_mllm
from clips_mllm.model.tiles import with_tiles
from clips_mllm.train import main
from tests.helpers.processes import children
from tests.helpers.train_runs import (
    ROOT,
    accelerate_launcher,
    deepspeed_launcher,
    end_of,
    free_port,
    launch,
    launch_several,
    losses,
    machine_launcher,
    start,
    torchrun_launcher,
    weights,
    words,
)

TIED = "lm_head.weight", "model.language_model.embed_tokens.weight"
ADAPTER = {"stage.adapter.kind": "lora", "stage.adapter.rank": 4, "stage.adapter.dropout": 0}
KINDS: dict[str, dict[str, Any]] = {
    "full": {},
    "lora": ADAPTER,
    "qlora": ADAPTER | {"stage.adapter.kind": "qlora"},
    "tiles": ADAPTER,  # on a checkpoint with tiles
}
RUNS = [  # engine, kind
    *(("zero2", kind) for kind in KINDS),
    *((engine, kind) for engine in ("zero3", "ddp") for kind in ("full", "lora")),
    ("zero0", "full"),
    ("zero1", "full"),
    ("accelerate", "full"),
]
OFFLOAD = ("zero2_offload", "zero3_offload")
pytestmark = pytest.mark.timeout(900)  # several launches of two ranks


@pytest.fixture(scope="module")
def common(mllm_dir: Path, sample_world: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Values of all runs. In file order, the second rank's first batch of four is text only, later ones are mixed."""
    rows = json.loads((sample_world / "llava" / "stage2.json").read_text())
    texts = [row for row in rows if "image" not in row]
    pairs = [row for row in rows if isinstance(row.get("image"), list)]
    singles = [row for row in rows if isinstance(row.get("image"), str)]
    assert min(len(texts), len(pairs)) >= 4
    assert len(singles) >= 12
    file = tmp_path_factory.mktemp("rows") / "rows.json"
    file.write_text(json.dumps([*singles[:4], *texts[:4], *pairs[:2], *singles[4:8], *texts[:2], *singles[8:12]]))
    return {
        "data.file": file,
        "model.checkpoint": mllm_dir,
        "stage.llm": "true",
        "training.max_steps": 2,
        "training.extra": '{"train_sampling_strategy": "sequential"}',
    }


@pytest.fixture(scope="module")
def tiled(mllm_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny checkpoint in LLaVA-NeXT's classes."""
    loaded = load_mllm(mllm_dir, device="cpu")
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("tiled")
    save_mllm(*with_tiles(loaded.model, loaded.processor, 2), folder)
    return folder


@pytest.fixture(scope="module")
def values(common: dict[str, Any], tiled: Path) -> dict[str, dict[str, Any]]:
    """Values of each kind of run."""
    return {
        kind: common | own | ({"model.checkpoint": tiled} if kind == "tiles" else {}) for kind, own in KINDS.items()
    }


@pytest.fixture(scope="module")
def alone(
    values: dict[str, dict[str, Any]], sample_world: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Path]:
    """Return a function that runs a kind once by one rank, in batches of 8 and without DeepSpeed."""
    folder = tmp_path_factory.mktemp("alone")

    def run(kind: str) -> Path:
        if not (folder / kind).exists():
            main(words(folder / kind, sample_world, **values[kind]))
        return folder / kind

    return run


@pytest.fixture(scope="module")
def ranked(values: dict[str, dict[str, Any]], sample_world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs of two ranks in batches of 4, each resumed after losing its last checkpoint. One launch per launcher."""
    folder = tmp_path_factory.mktemp("ranks")
    launchers = {"ddp": torchrun_launcher(), "accelerate": accelerate_launcher(), "deepspeed": deepspeed_launcher()}
    plans: dict[str, list[dict[str, Any]]] = {name: [] for name in launchers}
    for engine, kind in RUNS:
        run = folder / f"{engine}-{kind}"
        given = values[kind] | {"training.device_batch_size": 4}
        given |= {"training.save_every": 1, "training.keep_checkpoints": 2}
        if engine not in launchers:
            given["training.deepspeed"] = ROOT / "configs" / "deepspeed" / f"{engine}.json"
        arguments = {"command": "train", "arguments": words(run, sample_world, **given)}
        plan = plans[engine if engine in launchers else "deepspeed"]
        plan += [arguments, {"remove": str(run / "checkpoint-2")}, arguments]
    for name, plan in plans.items():
        file = folder / f"{name}.json"
        file.write_text(json.dumps(plan))
        launch(launchers[name], "tests.helpers.several_runs", [str(file)])
    return folder


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_accumulation_gives_the_same_losses(
    kind: str,
    alone: Callable[[str], Path],
    values: dict[str, dict[str, Any]],
    sample_world: Path,
    tmp_path: Path,
) -> None:
    main(words(tmp_path / "run", sample_world, **values[kind], **{"training.device_batch_size": 1}))
    assert losses(tmp_path / "run") == pytest.approx(losses(alone(kind)), abs=1e-4)
    assert losses(tmp_path / "run", "grad_norm") == pytest.approx(losses(alone(kind), "grad_norm"), rel=1e-3)


@pytest.mark.parametrize(("engine", "kind"), RUNS)
def test_two_ranks_give_the_same_losses_and_resume(
    engine: str, kind: str, alone: Callable[[str], Path], ranked: Path
) -> None:
    folder, run = alone(kind), ranked / f"{engine}-{kind}"
    wanted, norms = losses(folder), losses(folder, "grad_norm")
    assert len(wanted) == 2 and wanted[1] < wanted[0]
    assert (run / "checkpoint-2" / "progress_1.json").is_file(), "there was a second rank"
    assert losses(run, "step") == [1, 2], "the second step ran twice, with one line"
    assert losses(run) == pytest.approx(wanted, abs=1e-4)
    if engine != "zero0":  # DeepSpeed reports no norm without ZeRO
        assert losses(run, "grad_norm") == pytest.approx(norms, rel=1e-3)
    file = "model.safetensors" if kind == "full" else "adapter_model.safetensors"
    for one in (run, run / "checkpoint-2"):
        assert set(load_file(one / file)) == set(load_file(folder / file)), "stock names, a tied layer once"
    before, after = weights(folder), weights(run)
    assert set(before) == set(after), "every weight is saved"
    assert torch.equal(after[TIED[0]], after[TIED[1]])
    moved = torch.cat([(before[name] - after[name]).abs().flatten() for name in before])
    assert moved.mean() < 1e-5
    last = weights(run / "checkpoint-2")
    assert all(torch.equal(after[name], last[name]) for name in after), "the last checkpoint is the run's result"


@pytest.mark.slow
def test_deepspeed_recipe_runs_without_launcher(
    alone: Callable[[str], Path], values: dict[str, dict[str, Any]], sample_world: Path, tmp_path: Path
) -> None:
    given = values["full"] | {"training.deepspeed": ROOT / "configs" / "deepspeed" / "zero2.json"}
    launch([sys.executable, "-m"], "clips_mllm.train", words(tmp_path, sample_world, **given))
    assert losses(tmp_path) == pytest.approx(losses(alone("full")), abs=1e-4)


@pytest.mark.slow
def test_two_machines_give_the_same_losses(
    alone: Callable[[str], Path], values: dict[str, dict[str, Any]], sample_world: Path, tmp_path: Path
) -> None:
    """A launcher per machine (both are this one), one rank each, a shared folder."""
    port = free_port()
    given = values["full"] | {"training.device_batch_size": 4}
    given["training.deepspeed"] = ROOT / "configs" / "deepspeed" / "zero2.json"
    machines = [
        start(machine_launcher(number, port), "clips_mllm.train", words(tmp_path / "run", sample_world, **given))
        for number in range(2)
    ]
    outputs = [end_of(machine) for machine in machines]
    assert [machine.returncode for machine in machines] == [0, 0], outputs[0][-3000:] + outputs[1][-3000:]
    assert losses(tmp_path / "run", "step") == [1, 2]
    assert losses(tmp_path / "run") == pytest.approx(losses(alone("full")), abs=1e-4)


@pytest.mark.slow
def test_offload_gives_the_same_losses(
    alone: Callable[[str], Path], values: dict[str, dict[str, Any]], sample_world: Path, tmp_path: Path
) -> None:
    """Optimizer, and with ZeRO-3 weights, in host memory. DeepSpeed compiles its CPU Adam for a minute."""
    engines = {tmp_path / name: ROOT / "configs" / "deepspeed" / f"{name}.json" for name in OFFLOAD}
    given = values["full"] | {"training.device_batch_size": 4}
    runs = [words(run, sample_world, **given, **{"training.deepspeed": file}) for run, file in engines.items()]
    launch_several(deepspeed_launcher(), tmp_path / "runs.json", *runs)
    for run in engines:
        assert losses(run) == pytest.approx(losses(alone("full")), abs=1e-4)
        assert losses(run, "grad_norm") == pytest.approx(losses(alone("full"), "grad_norm"), rel=1e-3)
        before, after = weights(alone("full")), weights(run)
        assert torch.cat([(before[name] - after[name]).abs().flatten() for name in before]).mean() < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize(
    ("engine", "kind"),
    [("zero2", "full"), ("zero0", "full"), ("zero3", "full"), ("zero3", "lora"), ("zero2", "qlora")],
)
def test_killed_rank_ends_all_ranks_and_the_run_resumes(
    engine: str, kind: str, common: dict[str, Any], sample_world: Path, tmp_path: Path
) -> None:
    """`kill -9` of a rank: the launcher ends with an error; the same command then resumes with equal losses."""
    values = (
        common
        | KINDS[kind]
        | {
            "training.device_batch_size": 4,
            "training.max_steps": 8,
            "training.save_every": 2,
            "training.keep_checkpoints": 9,
            "training.deepspeed": ROOT / "configs" / "deepspeed" / f"{engine}.json",
        }
    )
    folder = tmp_path / "run"
    process = start(deepspeed_launcher(), "clips_mllm.train", words(folder, sample_world, **values))
    end = time.monotonic() + 120
    while not (folder / "checkpoint-2").exists():
        assert process.poll() is None and time.monotonic() < end
        time.sleep(0.005)
    (launcher,) = children(process.pid)
    os.kill(children(launcher)[-1], signal.SIGKILL)
    output = end_of(process, 100)
    assert process.returncode != 0
    assert "return code = -9" in output or "another rank" in output, output[-3000:]
    assert not (folder / "config.json").exists() or not list(folder.glob("partial"))
    uninterrupted = tmp_path / "uninterrupted"
    both = [words(each, sample_world, **values) for each in (folder, uninterrupted)]
    launch_several(deepspeed_launcher(), tmp_path / "both.json", *both)
    assert losses(folder, "step") == list(range(1, 9))
    assert losses(folder) == pytest.approx(losses(uninterrupted), abs=1e-5)
