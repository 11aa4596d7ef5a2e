"""Training through the real command: the loss, what a stage changes, ranks and accumulation, resuming."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import cross_entropy

from clips_mllm.checkpoint import load_mllm
from clips_mllm.data import InstructionCollator, InstructionDataset
from clips_mllm.prompts import IGNORED
from clips_mllm.stages import apply_stage, optimizer_groups
from clips_mllm.train import main
from clips_mllm.train_recipe import InstructionRecipe, StageRecipe
from clips_mllm.trainer import supervised_loss
from vision_tower.errors import UserError

ROOT = Path(__file__).parent.parent
TIED = "lm_head.weight", "model.language_model.embed_tokens.weight"


def losses(folder: Path, field: str = "loss") -> list[float]:
    return [json.loads(line)[field] for line in (folder / "metrics.jsonl").read_text().splitlines()]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    state = load_mllm(folder, device="cpu", dtype="float32").model.state_dict()
    return {name: value.clone() for name, value in state.items()}


def part(name: str) -> str:
    for key, told in (("vision_tower", "tower"), ("multi_modal_projector", "projector")):
        if key in name:
            return told
    return "llm"


def words(folder: Path, world: Path, **values: Any) -> list[str]:
    """A command line for `train`: fp32, one sample after the other, small batches, a line of metrics every step."""
    defaults = {
        "output_dir": folder,
        "data.file": world / "llava" / "stage2.json",
        "data.images": world / "llava" / "images",
        "data.template": "chatml",
        "training.precision": "fp32",
        "training.global_batch_size": 8,
        "training.device_batch_size": 8,
        "training.max_steps": 3,
        "training.log_every": 1,
        "training.workers": 0,
        "training.learning_rate": 3e-3,
    }
    return [word for name, value in (defaults | values).items() for word in (f"--{name}", str(value))]


def subprocess_environment() -> dict[str, str]:
    """Also: as many threads as here, for sums in another order differ in the last bit."""
    paths = os.pathsep.join([str(ROOT), str(ROOT / "eval")])
    threads = str(torch.get_num_threads())
    return os.environ | {
        "PYTHONPATH": paths,
        "OMP_NUM_THREADS": threads,
        "HF_HUB_OFFLINE": "1",
        "DS_ACCELERATOR": "cpu",
    }


# --- the loss ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def batch(sample_world: Path, mllm_dir: Path) -> dict[str, torch.Tensor]:
    """Multi-turn, two pictures and text-only in one batch."""
    recipe = InstructionRecipe(
        file=str(sample_world / "llava" / "stage2.json"),
        images=str(sample_world / "llava" / "images"),
        template="chatml",
    )
    processor = load_mllm(mllm_dir, device="cpu", dtype="float32").processor
    processor.tokenizer.padding_side = "right"
    dataset = InstructionDataset(recipe, processor)
    by_images: dict[int, int] = {len(example.images): at for at, example in enumerate(dataset.examples)}
    assert set(by_images) == {0, 1, 2}
    return InstructionCollator(processor)([dataset[at] for at in by_images.values()])


def test_loss_equals_the_stock_loss(mllm_dir: Path, batch: dict[str, torch.Tensor]) -> None:
    model = load_mllm(mllm_dir, device="cpu", dtype="float32").model
    stock = model(**batch).loss
    stock.backward()
    wanted = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    seen: list[torch.Size] = []
    watcher = model.lm_head.register_forward_hook(lambda _, inputs, __: seen.append(inputs[0].shape))
    summed, count = supervised_loss(model, model, batch)
    watcher.remove()
    (summed / count).backward()
    assert count == (batch["labels"][:, 1:] != IGNORED).sum()
    assert seen == [torch.Size([1, int(count), model.config.text_config.hidden_size])]
    assert (summed / count - stock).abs() < 1e-6
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert set(found) == set(wanted)
    assert max((found[name] - wanted[name]).abs().max() for name in wanted) < 1e-5
    assert model(**batch).logits.shape[:2] == batch["input_ids"].shape, "the vocabulary layer is whole again"


def test_loss_by_hand(mllm_dir: Path, batch: dict[str, torch.Tensor]) -> None:
    """Every supervised token is predicted by the logits one place before it."""
    model = load_mllm(mllm_dir, device="cpu", dtype="float32").model
    labels = batch["labels"]
    with torch.no_grad():
        summed, _ = supervised_loss(model, model, batch)
        logits = model(**{name: value for name, value in batch.items() if name != "labels"}).logits
        by_hand = torch.zeros(())
        for row, places in enumerate(labels):
            for at in range(1, len(places)):
                if places[at] != IGNORED:
                    by_hand += cross_entropy(logits[row, at - 1], places[at])
    torch.testing.assert_close(summed, by_hand)


# --- stages -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("own", [None, 1e-5])
def test_every_trainable_parameter_is_in_one_group(mllm_dir: Path, own: float | None) -> None:
    model = load_mllm(mllm_dir, device="cpu", dtype="float32").model
    stage = StageRecipe(llm=True, projector_learning_rate=own)
    apply_stage(model, stage)
    groups = optimizer_groups(model, stage, weight_decay=0.1)
    placed = [id(p) for group in groups for p in group["params"]]
    trainable = {id(p) for p in model.parameters() if p.requires_grad}
    assert sorted(placed) == sorted(trainable), "tied weights once, the frozen tower never"
    names = {id(p): name for name, p in model.named_parameters()}
    for group in groups:
        for parameter in group["params"]:
            name = names[id(parameter)]
            assert group.get("lr") == (own if part(name) == "projector" else None), name
            norm_or_bias = parameter.ndim == 1
            assert not (norm_or_bias and group["weight_decay"]), name


def test_a_stage_that_trains_nothing(mllm_dir: Path) -> None:
    model = load_mllm(mllm_dir, device="cpu", dtype="float32").model
    with pytest.raises(UserError, match="nothing trains"):
        apply_stage(model, StageRecipe(projector=False))


@pytest.fixture(scope="module")
def stages(sample_world: Path, encoder_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The two stages by the command: align from tower and LLM, finetune from align's checkpoint."""
    folder = tmp_path_factory.mktemp("stages")
    main(
        words(
            folder / "align",
            sample_world,
            **{
                "data.file": sample_world / "llava" / "stage1.json",
                "data.template": "plain",
                "model.tower": encoder_dir / "tower",
                "model.llm": sample_world / "llm",
                "training.gradient_checkpointing": "true",
            },
        )
    )
    main(words(folder / "finetune", sample_world, **{"model.checkpoint": folder / "align", "stage.llm": "true"}))
    return folder / "align", folder / "finetune"


def test_stage_1_changes_the_projector_alone(stages: tuple[Path, Path], sample_world: Path, encoder_dir: Path) -> None:
    from transformers import AutoModel, AutoModelForCausalLM

    model = load_mllm(stages[0], device="cpu", dtype="float32").model
    llm = AutoModelForCausalLM.from_pretrained(sample_world / "llm", dtype=torch.float32)
    rows = llm.get_input_embeddings().num_embeddings
    trained = model.model.language_model.state_dict()
    for name, value in llm.model.state_dict().items():
        same = trained[name][:rows] if name == "embed_tokens.weight" else trained[name]
        assert torch.equal(same, value), name
    tower = AutoModel.from_pretrained(encoder_dir / "tower", dtype=torch.float32).state_dict()
    found = model.model.vision_tower.state_dict()
    assert set(found) == set(tower)
    assert all(torch.equal(found[name], value) for name, value in tower.items())
    assert len(set(losses(stages[0]))) == 3, "the projector learns"


def test_stage_2_changes_llm_and_projector(stages: tuple[Path, Path]) -> None:
    before, after = (weights(folder) for folder in stages)
    changed = {name: not torch.equal(before[name], after[name]) for name in before}
    assert set(before) == set(after)
    assert not any(moved for name, moved in changed.items() if part(name) == "tower")
    assert all(moved for name, moved in changed.items() if part(name) == "projector")
    assert all(moved for name, moved in changed.items() if part(name) == "llm")


def test_tied_embeddings_stay_tied(stages: tuple[Path, Path]) -> None:
    from safetensors import safe_open

    for folder in stages:
        model = load_mllm(folder, device="cpu").model
        assert model.lm_head.weight is model.model.language_model.embed_tokens.weight
        with safe_open(folder / "model.safetensors", "pt") as file:
            assert sum("embed_tokens" in name or "lm_head" in name for name in file.keys()) == 1  # noqa: SIM118


def test_the_run_folder_is_complete(stages: tuple[Path, Path]) -> None:
    """The checkpoint carries the stage's own template; recipe.yaml repeats the run; no temporary files stay."""
    from clips_mllm.prompts import load_template
    from clips_mllm.train_recipe import TrainRecipe
    from vision_tower.recipe import dump_recipe, parse_recipe

    for folder, template in zip(stages, ("plain", "chatml"), strict=True):
        assert load_mllm(folder).processor.chat_template == load_template(template)  # type: ignore[arg-type]
        recipe = parse_recipe(TrainRecipe, ["--config", str(folder / "recipe.yaml")], command="train")
        assert dump_recipe(recipe) == (folder / "recipe.yaml").read_text()
        assert {"environment.json", "metrics.jsonl"} <= {path.name for path in folder.iterdir()}
        assert not list(folder.glob("partial*"))


def test_gradient_checkpointing_changes_nothing(stages: tuple[Path, Path], sample_world: Path, tmp_path: Path) -> None:
    main(
        words(
            tmp_path / "run",
            sample_world,
            **{"model.checkpoint": stages[0], "stage.llm": "true", "training.gradient_checkpointing": "true"},
        )
    )
    assert losses(tmp_path / "run") == pytest.approx(losses(stages[1]), abs=1e-5)


# --- ranks and accumulation -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def ordered_rows(sample_world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """In file order, the second rank's first batch of four is text only, and later ones are mixed."""
    rows = json.loads((sample_world / "llava" / "stage2.json").read_text())
    texts = [row for row in rows if "image" not in row]
    pairs = [row for row in rows if isinstance(row.get("image"), list)]
    singles = [row for row in rows if isinstance(row.get("image"), str)]
    assert min(len(texts), len(pairs)) >= 4
    assert len(singles) >= 12
    file = tmp_path_factory.mktemp("rows") / "rows.json"
    file.write_text(json.dumps([*singles[:4], *texts[:4], *pairs[:2], *singles[4:8], *texts[:2], *singles[8:12]]))
    return file


def launch(arguments: list[str]) -> None:
    """Two ranks by DeepSpeed's launcher; a hang is killed and fails."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launcher = [sys.executable, "-m", "deepspeed.launcher.runner", "--num_gpus", "2", "--master_port", str(port)]
    process = subprocess.Popen(
        [*launcher, "--module", "clips_mllm.train", *arguments],
        env=subprocess_environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        said, _ = process.communicate(timeout=240)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        pytest.fail(f"two ranks hang:\n{process.communicate()[0][-3000:]}")
    assert process.returncode == 0, said[-3000:]


def test_ranks_and_accumulation_give_one_curve(
    mllm_dir: Path, sample_world: Path, ordered_rows: Path, tmp_path: Path
) -> None:
    """8 x 1, accumulation 1 x 8 and two ranks x 4 under ZeRO-2 are the same training; one rank meets only text.

    Two ranks that go on from a checkpoint end where they would have ended.
    """
    common = {
        "data.file": ordered_rows,
        "model.checkpoint": mllm_dir,
        "stage.llm": "true",
        "training.max_steps": 2,
        "training.extra": '{"train_sampling_strategy": "sequential"}',
    }
    main(words(tmp_path / "plain", sample_world, **common))
    main(words(tmp_path / "accumulated", sample_world, **common, **{"training.device_batch_size": 1}))
    zero = {
        "training.device_batch_size": 4,
        "training.deepspeed": ROOT / "configs" / "deepspeed" / "zero2.json",
        "training.save_every": 1,
        "training.keep_checkpoints": 2,
    }
    launch(words(tmp_path / "ranks", sample_world, **common, **zero))
    wanted, norms = losses(tmp_path / "plain"), losses(tmp_path / "plain", "grad_norm")
    assert len(wanted) == 2
    assert wanted[1] < wanted[0]
    for other in ("accumulated", "ranks"):
        assert losses(tmp_path / other) == pytest.approx(wanted, abs=1e-4), other
        assert losses(tmp_path / other, "grad_norm") == pytest.approx(norms, rel=1e-3), other
    plain, ranks = weights(tmp_path / "plain"), weights(tmp_path / "ranks")
    assert set(plain) == set(ranks), "ZeRO-2 saves every weight"
    assert torch.equal(ranks[TIED[0]], ranks[TIED[1]])
    moved = torch.cat([(plain[name] - ranks[name]).abs().flatten() for name in plain])
    assert moved.mean() < 1e-5

    shutil.rmtree(tmp_path / "ranks" / "checkpoint-2")
    launch(words(tmp_path / "ranks", sample_world, **common, **zero))
    assert losses(tmp_path / "ranks", "step") == [1, 2]
    assert losses(tmp_path / "ranks") == pytest.approx(wanted, abs=1e-4)
    again = weights(tmp_path / "ranks")
    assert max((ranks[name] - again[name]).abs().max() for name in ranks) < 1e-6


# --- resuming ---------------------------------------------------------------------------------------------------------


def stop_after(folder: Path, checkpoint: int, arguments: list[str], stop: Callable[[Any], None]) -> str:
    """Start the command, stop it once the checkpoint is complete; returns what it said."""
    process = subprocess.Popen(
        [sys.executable, "-m", "clips_mllm.cli", "train", *arguments],
        env=subprocess_environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        # Whoever starts the tests in the background leaves Ctrl-C ignored, and children inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    end = time.monotonic() + 120
    while not (folder / f"checkpoint-{checkpoint}" / "trainer_state.json").exists():
        assert process.poll() is None, process.communicate()[1][-3000:]
        assert time.monotonic() < end, "no checkpoint in two minutes"
        time.sleep(0.005)
    stop(process)
    _, said = process.communicate(timeout=60)
    stop_after.code = process.returncode  # type: ignore[attr-defined]
    return str(said)


def test_interrupted_runs_go_on_as_if_nothing_happened(mllm_dir: Path, sample_world: Path, tmp_path: Path) -> None:
    """Ctrl-C after one checkpoint, kill -9 after a later one, then to the end: bit for bit the uninterrupted run."""
    values = {
        "model.checkpoint": mllm_dir,
        "stage.llm": "true",
        "data.group_by_length": "true",
        "training.max_steps": 30,
        "training.save_every": 6,
        "training.keep_checkpoints": 9,
    }
    folder = tmp_path / "stopped"
    said = stop_after(folder, 6, words(folder, sample_world, **values), lambda p: p.send_signal(signal.SIGINT))
    assert stop_after.code == 130  # type: ignore[attr-defined]
    assert "Traceback" not in said, said
    lines = [line for line in said.splitlines() if line.startswith("error: ")]
    assert lines == [said.splitlines()[-1]]
    assert "run the same command again" in lines[0]
    assert not (folder / "config.json").exists()

    stop_after(folder, 18, words(folder, sample_world, **values), lambda p: p.kill())
    assert not (folder / "config.json").exists(), "killed before the end"
    main(words(folder, sample_world, **values))

    whole = tmp_path / "whole"
    main(words(whole, sample_world, **values))
    steps = [json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(1, 31)), "every step once"
    assert losses(folder) == losses(whole)
    before, after = weights(folder), weights(whole)
    assert all(torch.equal(before[name], after[name]) for name in before)
