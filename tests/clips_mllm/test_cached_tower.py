"""Training on cached features: same losses, also under ZeRO; the tower does not run for cached images."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from clips_mllm.model import cached_tower, feature_store
from clips_mllm.model.checkpoint import load_mllm
from clips_mllm.train import main
from tests.helpers.errors import raises_user_error
from tests.helpers.train_runs import ROOT, deepspeed_launcher, launch_several


def words(folder: Path, world: Path, mllm: Path, file: Path | None = None, **values: Any) -> list[str]:
    defaults = {
        "output_dir": folder,
        "model.checkpoint": mllm,
        "data.file": file or world / "llava" / "stage2.json",
        "data.images": world / "llava" / "images",
        "data.template": "chatml",
        "training.global_batch_size": 8,
        "training.device_batch_size": 4,
        "training.epochs": 2,
        "training.log_every": 1,
        "training.workers": 0,
        "training.learning_rate": 3e-3,
    }
    return [word for name, value in (defaults | values).items() for word in (f"--{name}", str(value))]


class Summary(NamedTuple):
    found: int
    computed: int
    corrupt: int


def collect_summaries(monkeypatch: pytest.MonkeyPatch) -> list[Summary]:
    """The counters of each run's cache at its end."""
    collected: list[Summary] = []
    original = feature_store.FeatureStore.summary

    def summary(store: feature_store.FeatureStore) -> str:
        collected.append(Summary(store.found.value, store.computed.value, store.corrupt.value))
        return original(store)

    monkeypatch.setattr(feature_store.FeatureStore, "summary", summary)
    return collected


def losses(folder: Path) -> list[float]:
    return [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def few(sample_world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sixteen conversations with one image, two, or none."""
    rows = json.loads((sample_world / "llava" / "stage2.json").read_text())
    by_images: dict[int, list[Any]] = {}
    for row in rows:
        count = sum(turn["value"].count("<image>") for turn in row["conversations"])
        by_images.setdefault(count, []).append(row)
    file = tmp_path_factory.mktemp("few") / "few.json"
    file.write_text(json.dumps([*by_images[1][:9], *by_images[2][:3], *by_images[0][:4]]))
    return file


@pytest.mark.parametrize(("precision", "workers"), [("fp32", 0), ("bf16", 1)])
def test_cached_losses_equal_uncached_losses(
    sample_world: Path,
    mllm_dir: Path,
    few: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    precision: str,
    workers: int,
) -> None:
    """Two epochs without a cache, with an empty one, and with a full one: bit-identical in fp32.

    In bf16 a CPU's kernels round an image differently in a batch of another size, as when some of it are cached.
    """
    monkeypatch.setattr(feature_store, "CHUNK_SECONDS", 0.0)  # the second epoch reads what the first one wrote
    monkeypatch.setattr(feature_store, "SCAN_SECONDS", 0.0)
    summaries = collect_summaries(monkeypatch)
    options: dict[str, Any] = {"training.precision": precision, "training.workers": workers, "stage.llm": True}
    cached = options | {"data.feature_cache": tmp_path / "cache"}
    main(words(tmp_path / "plain", sample_world, mllm_dir, few, **options))
    main(words(tmp_path / "first", sample_world, mllm_dir, few, **cached))
    main(words(tmp_path / "second", sample_world, mllm_dir, few, **cached))
    first, second = summaries
    assert first.found > 0 and first.computed > 0 and first.corrupt == 0
    assert second.found > 0 and second.computed == 0 and second.corrupt == 0
    plain = losses(tmp_path / "plain")
    assert len(plain) == 4
    if precision == "bf16":
        assert losses(tmp_path / "first") == pytest.approx(plain, rel=1e-3)
        assert losses(tmp_path / "second") == pytest.approx(plain, rel=1e-3)
        return
    assert plain == losses(tmp_path / "first") == losses(tmp_path / "second")
    state = load_mllm(tmp_path / "plain", device="cpu", dtype="float32").model.state_dict()
    found = load_mllm(tmp_path / "second", device="cpu", dtype="float32").model.state_dict()
    assert all(torch.equal(value, found[name]) for name, value in state.items())


def test_tower_does_not_run_for_cached_images(
    sample_world: Path, mllm_dir: Path, few: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stage 1 fills the cache and stage 2 reads it, since the tower is the same."""
    cache = {"data.feature_cache": tmp_path / "cache", "training.precision": "fp32"}
    main(words(tmp_path / "align", sample_world, mllm_dir, few, **cache))

    def never(*_: Any) -> None:
        raise AssertionError("the tower ran")

    monkeypatch.setattr(cached_tower.CachedTower, "features", never)
    main(words(tmp_path / "finetune", sample_world, tmp_path / "align", few, **cache, **{"stage.llm": True}))
    assert len(list((tmp_path / "cache").iterdir())) == 1


@pytest.mark.usefixtures("one_thread")  # several threads would round an image computed alone in another way
def test_corrupt_features_are_computed_again(
    sample_world: Path, mllm_dir: Path, few: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    summaries = collect_summaries(monkeypatch)
    cache = {"data.feature_cache": tmp_path / "cache", "training.precision": "fp32"}
    main(words(tmp_path / "first", sample_world, mllm_dir, few, **cache))
    file = next((tmp_path / "cache").glob("*/*.safetensors"))
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 0xFF
    file.write_bytes(data)
    main(words(tmp_path / "second", sample_world, mllm_dir, few, **cache))
    assert (summaries[1].computed, summaries[1].corrupt) == (1, 1)
    assert losses(tmp_path / "first") == losses(tmp_path / "second")


def test_each_preprocessing_has_its_own_cache(sample_world: Path, mllm_dir: Path, few: Path, tmp_path: Path) -> None:
    cache = {"data.feature_cache": tmp_path / "cache", "training.precision": "fp32", "training.max_steps": 1}
    main(words(tmp_path / "one", sample_world, mllm_dir, few, **cache))
    main(words(tmp_path / "two", sample_world, mllm_dir, few, **cache, **{"data.image_aspect_ratio": "pad"}))
    folders = sorted((tmp_path / "cache").iterdir())
    assert len(folders) == 2
    about = [json.loads((folder / "about.json").read_text()) for folder in folders]
    assert about[0]["tower"] == about[1]["tower"] and about[0]["image_processor"] != about[1]["image_processor"]


def test_cache_of_a_trained_tower_is_refused(sample_world: Path, mllm_dir: Path, few: Path, tmp_path: Path) -> None:
    cache = {"data.feature_cache": tmp_path / "cache", "stage.tower": True}
    with raises_user_error(key="data.feature_cache", value=str(tmp_path / "cache")):
        main(words(tmp_path / "out", sample_world, mllm_dir, few, **cache))


@pytest.mark.slow
def test_ranks_with_and_without_images_do_not_deadlock(sample_world: Path, mllm_dir: Path, tmp_path: Path) -> None:
    """One rank has an image and the other only text; no rank waits for the other's tower."""
    rows = json.loads((sample_world / "llava" / "stage2.json").read_text())
    seen = [row for row in rows if sum(turn["value"].count("<image>") for turn in row["conversations"]) == 1][:4]
    text = [row for row in rows if not any("<image>" in turn["value"] for turn in row["conversations"])][:4]
    file = tmp_path / "mixed.json"
    file.write_text(json.dumps([row for pair in zip(seen, text, strict=True) for row in pair]))
    options: dict[str, Any] = {
        "training.precision": "fp32",
        "training.global_batch_size": 2,
        "training.device_batch_size": 1,
        "training.epochs": 1,
        "stage.llm": True,
    }
    runs = []
    for zero in ("zero2", "zero3"):
        plain = options | {"training.deepspeed": ROOT / "configs" / "deepspeed" / f"{zero}.json"}
        cached = plain | {"data.feature_cache": tmp_path / zero / "cache"}
        for name, values in {"plain": plain, "cached": cached, "again": cached}.items():
            runs.append(words(tmp_path / zero / name, sample_world, mllm_dir, file, **values))
    launch_several(deepspeed_launcher(), tmp_path / "runs.json", *runs)
    for zero in ("zero2", "zero3"):
        first, *others = (losses(tmp_path / zero / name) for name in ("plain", "cached", "again"))
        assert len(first) == 4 and others == [first, first]
