"""Options of pretraining: ZeRO, weight average, locked towers, gradient checkpointing, compilation, NaN guard, log."""

from __future__ import annotations

import functools
import json
import logging
import math
import shutil
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from tests.helpers.errors import raises_user_error
from tests.helpers.pretrain_runs import arguments, losses, metrics
from tests.helpers.shard_files import pair, png, write_tar
from tests.helpers.train_runs import deepspeed_launcher, launch_several, subprocess_environment
from vision_tower.checkpoints.loading import load_model
from vision_tower.common.errors import UserError
from vision_tower.pretrain import main
from vision_tower.training.process import _use_one_device

ROOT = Path(__file__).parents[2]
NAMES = ["dog", "cat", "sun", "tree", "boat", "moon", "fish", "star"]
FULL_BATCH = {
    "data.augmentation.jitter": 0,
    "data.augmentation.gray_probability": 0,
    "data.augmentation.smallest_crop": 1,
}


@pytest.fixture(scope="module")
def tiny_world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two shards of eight pairs with one sentence each: a batch of sixteen is an epoch."""
    world = tmp_path_factory.mktemp("tiny")
    (world / "pretrain").mkdir()
    for shard in range(2):
        rows = [
            pair(
                f"{shard}{n}",
                web=f"a {name} {shard}",
                full=f"There is one {name} in {shard}.",
                image=png(shard * 120 + 15 * n, 96),
            )
            for n, name in enumerate(NAMES)
        ]
        write_tar(world / "pretrain" / f"{shard}.tar", [member for row in rows for member in row])
    images = []
    for number, name in enumerate(NAMES):
        (world / f"{name}.png").write_bytes(png(30 * number, 96))
        images.append({"filename": f"{name}.png", "split": "val", "sentences": [{"raw": f"a {name} 0"}]})
    (world / "val.json").write_text(json.dumps({"images": images}))
    return world


def distance(first: Path, second: Path) -> float:
    """Return the mean absolute difference of all weights of two files with the same names."""
    one, other = load_file(first), load_file(second)
    assert one.keys() == other.keys()
    return float(torch.cat([(one[name].float() - other[name].float()).abs().flatten() for name in one]).mean())


@pytest.mark.slow
def test_two_ranks_with_zero_equal_one_rank(tiny_world: Path, tmp_path: Path) -> None:
    """Compares losses, gradient norms, scores, weights and their average after three steps of ZeRO-1, 2 and 3."""
    values = FULL_BATCH | {
        "training.max_steps": 3,
        "training.weight_decay": 0.2,
        "training.ema_decay": 0.9,
        "evaluation.every": 2,
        "evaluation.retrieval": tiny_world / "val.json",
    }
    one = tmp_path / "one"
    main(arguments(tiny_world, one, **values))
    moved = distance(one / "model.safetensors", one / "ema" / "model.safetensors")
    assert moved > 1e-4, "too close to tell the average from the weights"
    values |= {"training.device_batch_size": 8, "training.save_every": 2}
    engines = {tmp_path / zero: ROOT / "configs" / "deepspeed" / f"{zero}.json" for zero in ("zero1", "zero2", "zero3")}
    runs = [arguments(tiny_world, two, **values | {"training.deepspeed": file}) for two, file in engines.items()]
    launch_several(deepspeed_launcher(), tmp_path / "runs.json", *runs, command="pretrain")
    for two in engines:
        assert losses(two) == pytest.approx(losses(one), abs=1e-5)
        norms = [[row["grad_norm"] for row in metrics(folder)] for folder in (one, two)]
        assert norms[1] == pytest.approx(norms[0], rel=1e-4)
        assert (two / "evaluation.jsonl").read_text() == (one / "evaluation.jsonl").read_text() != ""
        for file in ("model.safetensors", "ema/model.safetensors", "tower/model.safetensors", "best/model.safetensors"):
            assert distance(one / file, two / file) < 1e-5, (two.name, file)


@pytest.mark.slow
def test_deepspeed_bf16_clamps_logit_scale_and_averages_in_fp32(tiny_world: Path, tmp_path: Path) -> None:
    """The limit is set to the initial value, so the optimizer's master weight would exceed it."""
    limit = 1 / 0.07
    values = FULL_BATCH | {"training.ema_decay": 0.9, "training.precision": "bf16", "training.learning_rate": 0.01}
    values |= {"training.deepspeed": ROOT / "configs" / "deepspeed" / "zero1.json", "training.max_steps": 6}
    given = arguments(tiny_world, tmp_path / "run", **values)
    code = f"import vision_tower.model.modeling as m; m.MAX_SCALE = {limit}\n"
    code += f"from vision_tower.pretrain import main; main({given!r})"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, env=subprocess_environment())
    scale = load_file(tmp_path / "run" / "model.safetensors")["logit_scale"].item()
    assert scale == pytest.approx(math.log(limit), abs=1e-6) or scale < math.log(limit)
    average = load_file(tmp_path / "run" / "ema" / "model.safetensors")[
        "vision_model.embeddings.patch_embedding.weight"
    ]
    assert not torch.equal(average, average.bfloat16().float())


def test_process_uses_one_gpu() -> None:
    """With n_gpu > 1, transformers wraps the model in nn.DataParallel, which splits the batch over all GPUs."""
    arguments = types.SimpleNamespace(n_gpu=4, _n_gpu=4)
    _use_one_device(arguments)  # type: ignore[arg-type]
    assert arguments._n_gpu == 1


# --- what trains, and how


def test_only_weight_matrices_have_weight_decay() -> None:
    from transformers import set_seed

    from vision_tower.model.modeling import ClipsModel
    from vision_tower.training.model_tools import parameter_groups

    set_seed(0)
    tower = {"hidden_size": 8, "num_hidden_layers": 1, "intermediate_size": 8, "num_attention_heads": 2}
    config = ClipsModel.config_class(
        vision_config=tower | {"model_type": "vit", "image_size": 32, "patch_size": 16},
        text_config=tower | {"vocab_size": 10, "max_position_embeddings": 4, "projection_size": 8},
        captioner_width=8,
        captioner_layers=1,
        captioner_heads=2,
        captioner_mlp=8,
        captioner_queries=3,
        projection_dim=8,
    )
    model = ClipsModel.from_scratch(config)
    decaying, rest = parameter_groups(model, 0.2)
    assert (decaying["weight_decay"], rest["weight_decay"]) == (0.2, 0.0)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    decayed = {names[id(parameter)] for parameter in decaying["params"]}
    assert all(names[id(parameter)] not in decayed for parameter in rest["params"])
    assert len(decayed) + len(rest["params"]) == sum(p.requires_grad for p in model.parameters())
    # 6 matrices in each of three blocks, the patch stem, two projections, two more into the captioner, its output.
    assert len(decayed) == 3 * 6 + 1 + 2 + 2 + 1
    assert all(name.endswith("weight") and "norm" not in name and "embedding." not in name for name in decayed)
    spared = {names[id(parameter)] for parameter in rest["params"]}
    assert {"logit_scale", "captioner.queries", "vision_model.embeddings.cls_token"} <= spared
    assert {"text_model.embeddings.token_embedding.weight", "text_model.embeddings.position_embedding.weight"} <= spared


def test_gradient_checkpointing_recomputes_with_equal_losses(
    tiny_world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers.models.siglip.modeling_siglip import SiglipMLP

    calls = 0
    forward = SiglipMLP.forward

    def counting(self: Any, *args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(SiglipMLP, "forward", counting)
    counts = []
    for value in ("false", "true"):
        calls = 0
        values = FULL_BATCH | {"training.gradient_checkpointing": value, "training.max_steps": 3}
        main(arguments(tiny_world, tmp_path / value, **values))
        counts.append(calls)
    assert counts[1] == 2 * counts[0]
    assert losses(tmp_path / "true") == pytest.approx(losses(tmp_path / "false"), abs=1e-6)


@pytest.mark.gpu
def test_losses_on_gpu_equal_those_on_cpu(tiny_world: Path, tmp_path: Path) -> None:
    for device, extra in (("gpu", "{}"), ("cpu", '{"use_cpu": true}')):
        main(arguments(tiny_world, tmp_path / device, **FULL_BATCH, **{"training.extra": extra}))
    assert losses(tmp_path / "gpu") == pytest.approx(losses(tmp_path / "cpu"), rel=1e-3)


def test_bf16_keeps_fp32_weights(tiny_world: Path, tmp_path: Path) -> None:
    for precision in ("fp32", "bf16"):
        main(arguments(tiny_world, tmp_path / precision, **FULL_BATCH, **{"training.precision": precision}))
    assert losses(tmp_path / "bf16") != losses(tmp_path / "fp32")
    assert losses(tmp_path / "bf16") == pytest.approx(losses(tmp_path / "fp32"), rel=0.02)
    assert {value.dtype for value in load_file(tmp_path / "bf16" / "model.safetensors").values()} == {torch.float32}
    # The attention implementation of the run is not saved in the checkpoint.
    configs = [(tmp_path / run / "config.json").read_text() for run in ("fp32", "bf16")]
    assert configs[0] == configs[1]


def test_auto_precision_is_fp32_without_bf16_hardware(
    tiny_world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run folder records the precision; resuming in bf16 on another machine is refused."""
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": False}, raising=False)
    options = FULL_BATCH | {"training.save_every": 1}
    own = arguments(tiny_world, tmp_path / "auto", **options, **{"training.precision": "auto"})
    main(own)
    assert yaml.safe_load((tmp_path / "auto" / "recipe.yaml").read_text())["training"]["precision"] == "fp32"
    main(arguments(tiny_world, tmp_path / "fp32", **options))
    assert losses(tmp_path / "auto") == losses(tmp_path / "fp32")
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_bf16": True}, raising=False)
    with raises_user_error(key="training.precision"):
        main(own)


def test_warmup_longer_than_the_run_is_a_warning(
    tiny_world: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def warnings() -> list[logging.LogRecord]:
        return [record for record in caplog.records if record.name == "vision_tower.training.resume"]

    options = FULL_BATCH | {"training.max_steps": 2}
    main(arguments(tiny_world, tmp_path / "long", **options, **{"training.warmup_steps": 1}))
    assert not warnings()
    main(arguments(tiny_world, tmp_path / "short", **options, **{"training.warmup_steps": 2}))
    (warning,) = warnings()
    assert warning.levelno == logging.WARNING and warning.args == (2, 2)


def test_compiled_blocks_have_equal_losses(tiny_world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Uses the aot_eager backend: inductor's code generation would take half a minute."""
    from torch._dynamo.utils import counters

    quick = functools.partialmethod(torch.nn.Module.compile, backend="aot_eager")
    monkeypatch.setattr(torch.nn.Module, "compile", quick)
    monkeypatch.setattr("vision_tower.training.model_tools.check_cpp", lambda: None)
    main(arguments(tiny_world, tmp_path / "plain", **FULL_BATCH))
    counters.clear()
    main(arguments(tiny_world, tmp_path / "compiled", **FULL_BATCH, **{"training.compile": "true"}))
    assert counters["stats"]["unique_graphs"] > 0
    assert losses(tmp_path / "compiled") == pytest.approx(losses(tmp_path / "plain"), abs=1e-3)
    names = [set(load_file(tmp_path / run / "model.safetensors")) for run in ("plain", "compiled")]
    assert names[0] == names[1]


# --- weight average


AVERAGED = {
    "training.ema_decay": 0.3,
    "training.max_steps": 4,
    "training.save_every": 1,
    "training.keep_checkpoints": 9,
}


@pytest.fixture(scope="module")
def averaged(tiny_world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("averaged") / "run"
    main(arguments(tiny_world, folder, **AVERAGED))
    return folder


def test_weight_average_follows_its_formula(averaged: Path, tiny_world: Path, tmp_path: Path) -> None:
    main(arguments(tiny_world, tmp_path / "start", **{"training.max_steps": 1, "training.learning_rate": 0}))
    expected = load_file(tmp_path / "start" / "model.safetensors")
    for step in range(1, 5):
        weights = load_file(averaged / f"checkpoint-{step}" / "model.safetensors")
        decay = min(0.3, (1 + step) / (10 + step))
        expected = {name: decay * value + (1 - decay) * weights[name] for name, value in expected.items()}
    found = load_file(averaged / "ema" / "model.safetensors")
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, atol=1e-6, rtol=0, msg=name)
    tower = load_file(averaged / "tower" / "model.safetensors")
    for name, value in tower.items():
        assert torch.equal(value, found[f"vision_model.{name}"]), name
    own, last = (load_file(averaged / path / "model.safetensors") for path in (".", "checkpoint-4"))
    assert all(torch.equal(own[name], last[name]) for name in own), "the exported model is not averaged"


def test_weight_average_resumes_exactly(averaged: Path, tiny_world: Path, tmp_path: Path) -> None:
    folder = tmp_path / "halves"
    main(arguments(tiny_world, folder, **AVERAGED))
    for checkpoint in folder.glob("checkpoint-*"):  # as if killed in step 3
        if checkpoint.name > "checkpoint-2":
            shutil.rmtree(checkpoint)
    main(arguments(tiny_world, folder, **AVERAGED))
    assert distance(folder / "ema" / "model.safetensors", averaged / "ema" / "model.safetensors") == 0
    with raises_user_error(file=folder, key="training.ema_decay"):
        main(arguments(tiny_world, folder, **AVERAGED | {"training.ema_decay": 0}))


# --- locked towers


@pytest.mark.parametrize("tower", ["image", "text"])
def test_locked_tower_keeps_its_weights(averaged: Path, tiny_world: Path, tmp_path: Path, tower: str) -> None:
    values = {"lock.tower": tower, "lock.checkpoint": averaged, "training.weight_decay": 0.2, "training.seed": 1}
    main(arguments(tiny_world, tmp_path / "run", **values))
    before, after = load_file(averaged / "model.safetensors"), load_file(tmp_path / "run" / "model.safetensors")
    locked = {"image": ("vision_model.", "visual_projection."), "text": ("text_model.",)}[tower]
    for name in before:
        assert torch.equal(before[name], after[name]) or not name.startswith(locked), name
    trained = "text_model.head.weight" if tower == "image" else "visual_projection.weight"
    assert not torch.equal(before[trained], after[trained])
    tokens = [json.loads((folder / "tokenizer.json").read_text()) for folder in (averaged, tmp_path / "run")]
    assert tokens[0] == tokens[1]


def test_locked_tower_keeps_its_config(averaged: Path, tiny_world: Path, tmp_path: Path) -> None:
    """A checkpoint with a layer_norm_eps that differs from ours keeps its embeddings."""
    checkpoint = tmp_path / "checkpoint"
    shutil.copytree(averaged, checkpoint)
    config = json.loads((checkpoint / "config.json").read_text())
    config["vision_config"]["layer_norm_eps"] = 1e-2
    (checkpoint / "config.json").write_text(json.dumps(config))
    values = {"lock.tower": "image", "lock.checkpoint": checkpoint, "training.max_steps": 1}
    main(arguments(tiny_world, tmp_path / "run", **values))
    pixels = torch.rand(2, 3, *[config["vision_config"]["image_size"]] * 2, generator=torch.Generator().manual_seed(0))
    before, after = (load_model(folder).eval().embed_images(pixels) for folder in (checkpoint, tmp_path / "run"))
    assert torch.equal(before, after)


@pytest.mark.parametrize(
    ("values", "key"),
    [
        ({"lock.tower": "image"}, "lock.checkpoint"),
        ({"lock.tower": "image", "model.image.width": 64}, "model.image"),
        ({"lock.tower": "image", "model.class_token": "true"}, "model.class_token"),
        ({"lock.tower": "image", "model.positions": "learned"}, "model.positions"),
        ({"lock.tower": "text", "model.padding": "masked"}, "model.padding"),
        ({"lock.tower": "text", "model.vocabulary": "vocab.txt"}, "lock.tower"),
        ({"training.ema_decay": 1}, "training.ema_decay"),
        ({"training.peak_tflops": 0}, "training.peak_tflops"),
    ],
)
def test_bad_options_are_refused(averaged: Path, tiny_world: Path, tmp_path: Path, values: Any, key: str) -> None:
    if len(values) > 1:
        values = values | {"lock.checkpoint": averaged}
    with raises_user_error(key=key):
        main(arguments(tiny_world, tmp_path / "run", **values))


# --- NaN


def test_nan_stops_the_run_before_the_bad_step_is_saved(
    tiny_world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An image with NaN at step 4: the report names step and samples; without it, the resumed run is bit-identical."""
    from vision_tower.data.pairs import PairCollator

    values = {"training.max_steps": 6, "training.save_every": 1}
    main(arguments(tiny_world, tmp_path / "whole", **values))
    collate, batches = PairCollator.__call__, 0

    def poisoned(self: PairCollator, samples: list[Any]) -> dict[str, Any]:
        nonlocal batches
        batches += 1
        batch = collate(self, samples)
        if batches == 4:
            batch["pixel_values"] = batch["pixel_values"].float()  # bytes have no NaN
            batch["pixel_values"][3, 0, 5, 5] = math.nan
        return batch

    monkeypatch.setattr(PairCollator, "__call__", poisoned)
    folder = tmp_path / "run"
    with raises_user_error(file=folder / "bad_step.json") as caught:
        main(arguments(tiny_world, folder, **values))
    assert str(folder / "checkpoint-3") in str(caught.value.remedy)
    report = json.loads((folder / "bad_step.json").read_text())
    assert report["step"] == 4 and [rank["loss"] for rank in report["ranks"]] == ["nan"]
    keys = report["ranks"][0]["keys"]
    assert len(set(keys)) == 16 and all("pretrain" in key for key in keys)
    assert [path.name for path in folder.glob("checkpoint-*")] == ["checkpoint-3"]
    state = load_file(folder / "checkpoint-3" / "model.safetensors")
    assert all(value.isfinite().all() for value in state.values())
    assert not (folder / "model.safetensors").exists()
    monkeypatch.undo()
    main(arguments(tiny_world, folder, **values))
    assert losses(folder) == losses(tmp_path / "whole")


def _infinite_on_rank_1(rank: int, folder: str) -> None:
    import torch.distributed as dist

    from vision_tower.training.nan_guard import stop_if_not_finite

    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    stop_if_not_finite({"loss": torch.tensor(1.0)}, 6, lambda: [f"early-{rank}"], Path(folder))
    try:
        loss = torch.tensor(math.inf if rank else 2.0)
        stop_if_not_finite({"loss": loss}, 7, lambda: [f"key-{rank}"], Path(folder))
    except UserError:
        (Path(folder) / f"stopped-{rank}").touch()
    dist.destroy_process_group()


def test_all_ranks_stop_if_one_is_not_finite(tmp_path: Path) -> None:
    torch.multiprocessing.spawn(_infinite_on_rank_1, args=(str(tmp_path),), nprocs=2)
    assert all((tmp_path / f"stopped-{rank}").exists() for rank in (0, 1))
    report = json.loads((tmp_path / "bad_step.json").read_text())
    assert report["step"] == 7
    assert report["ranks"] == [
        {"rank": 0, "loss": "2.0", "keys": ["key-0"]},
        {"rank": 1, "loss": "inf", "keys": ["key-1"]},
    ]


# --- the log


def test_log_has_throughput_and_mfu(tiny_world: Path, tmp_path: Path) -> None:
    values = {"training.peak_tflops": 0.5, "training.log_every": 2, "training.report_to": "[tensorboard]"}
    main(arguments(tiny_world, tmp_path / "run", **values))
    rows = metrics(tmp_path / "run")
    assert [row["step"] for row in rows] == [2, 4, 6]
    batch = yaml.safe_load((tmp_path / "run" / "recipe.yaml").read_text())["training"]["global_batch_size"]
    assert [row["samples_seen"] for row in rows] == [2 * batch, 4 * batch, 6 * batch]
    for row in rows:
        assert "epoch" not in row, "a stream has no length"
        assert row["samples_per_second"] > 0 and 0 < row["data_wait"] < 1
        assert row["mfu"] == pytest.approx(row["tflops"] / 0.5, abs=1e-5)
    (events,) = (tmp_path / "run").rglob("events.out.tfevents.*")
    content = events.read_bytes()
    for name in (
        "loss",
        "loss_web",
        "loss_sub",
        "loss_caption",
        "temperature",
        "grad_norm",
        "samples_per_second",
        "mfu",
    ):
        assert f"train/{name}".encode() in content, name


def test_no_mfu_without_known_peak(averaged: Path) -> None:
    assert all("mfu" not in row and row["tflops"] > 0 for row in metrics(averaged))
    assert not list(averaged.rglob("events.out.tfevents.*")), "no tracker is used by default"


# --- images


def test_jpeg_is_decoded_at_the_smallest_sufficient_size() -> None:
    import io

    from PIL import Image

    from vision_tower.data.augmentation import min_decoded_size
    from vision_tower.data.images import decode_image
    from vision_tower.data.recipe import Augmentation

    assert min_decoded_size(Augmentation(smallest_crop=0.25), 112) == 224
    assert min_decoded_size(Augmentation(smallest_crop=1.0), 112) == 112
    photo = Image.radial_gradient("L").resize((900, 700)).convert("RGB")
    for kind, least, expected in (
        ("JPEG", None, (900, 700)),
        ("JPEG", 224, (450, 350)),
        ("JPEG", 112, (225, 175)),
        ("JPEG", 500, (900, 700)),
        ("PNG", 112, (900, 700)),
    ):
        buffer = io.BytesIO()
        photo.save(buffer, format=kind)
        found = decode_image(buffer.getvalue(), least)
        assert found.size == expected and found.mode == "RGB", (kind, least)
        small, whole = (torch.tensor(list(image.resize((20, 16)).tobytes())) for image in (found, photo))
        assert (small - whole).abs().float().mean() < 3
