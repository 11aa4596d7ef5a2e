"""`clips-mllm pretrain` on the tiny sample world."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers.pretrain_runs import arguments, losses, metrics
from vision_tower.common.errors import run_command
from vision_tower.common.hashes import file_hash
from vision_tower.common.recipe import parse_recipe
from vision_tower.data.recipe import Augmentation
from vision_tower.pretrain import main
from vision_tower.pretraining.recipe import PretrainRecipe

PLAIN = Augmentation(smallest_crop=1.0, jitter=0.0, gray_probability=0.0)


@pytest.fixture(scope="module")
def run(sample_world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pretrain") / "run"
    main(arguments(sample_world, folder, **{"training.max_steps": 30, "training.save_every": 20}))
    return folder


def test_run_folder_has_encoder_tower_and_recipe(run: Path, sample_world: Path) -> None:
    from vision_tower.checkpoints.encoder import load_encoder

    assert load_encoder(run, "cpu").embed_texts(["a dog"]).shape == (1, 16)
    names = {path.name for path in (run / "tower").iterdir()}
    assert {"config.json", "model.safetensors", "preprocessor_config.json"} <= names
    assert not (run / "partial").exists() and not list(run.glob(".*"))
    expected = arguments(sample_world, run, **{"training.max_steps": 30, "training.save_every": 20})
    again = parse_recipe(PretrainRecipe, ["--config", str(run / "recipe.yaml")], command="pretrain")
    assert again == parse_recipe(PretrainRecipe, expected, command="pretrain")
    provenance = json.loads((run / "provenance.json").read_text())
    assert provenance["versions"]["torch"] and provenance["ranks"] == 1
    assert provenance["outputs"] == {"model.safetensors": file_hash(run / "model.safetensors")}


def test_metrics_have_every_loss_term_and_the_loss_falls(run: Path) -> None:
    rows = metrics(run)
    assert [row["step"] for row in rows] == list(range(1, 31))
    for row in rows:
        assert row["loss"] == pytest.approx((row["loss_web"] + row["loss_sub"]) / 2 + 2 * row["loss_caption"], abs=1e-3)
        assert 0 < row["temperature"] <= 0.08 and row["grad_norm"] > 0
    assert sum(row["loss"] for row in rows[-5:]) < 0.8 * sum(row["loss"] for row in rows[:5])


def test_losses_depend_on_the_seed_only(run: Path, sample_world: Path, tmp_path: Path) -> None:
    for seed, same in ((0, True), (1, False)):
        folder = tmp_path / str(seed)
        main(arguments(sample_world, folder, **{"training.max_steps": 4, "training.seed": seed}))
        assert (losses(folder) == losses(run)[:4]) is same


@pytest.mark.parametrize(
    ("values", "name"),
    [
        ({"model.patch_size": 36}, "model.image_size=96"),
        ({"model.image.heads": 3}, "model.image.heads=3"),
        ({"model.captioner.layers": 0}, "model.captioner.layers=0"),
        ({"model.patch_size": 0}, "model.patch_size=0"),
        ({"data.augmentation.smallest_crop": 0}, "data.augmentation.smallest_crop=0"),
        ({"data.augmentation.gray_probability": 2}, "data.augmentation.gray_probability=2"),
        ({"training.device_batch_size": 0}, "training.device_batch_size=0"),
        ({"training.workers": -1}, "training.workers=-1"),
        ({"model.vocabulary_size": 20}, "model.vocabulary_size=20"),
        ({"training.max_steps": 0}, "training.max_steps=0"),
        ({"captions.budget": 14}, "captions.budget=14"),
        ({"captions.web_share": 0.5}, "captions.web_share=0.5"),
        ({"objective": "clip-web", "loss.caption": 1}, "loss.caption"),
        ({"loss.web": 0, "loss.sub": 0, "loss.caption": 0}, "loss"),
        ({"training.global_batch_size": 24}, "training.global_batch_size=24"),
        ({"data.shards": "nowhere/*.tar"}, "nowhere/*.tar"),
        ({"data.synthetic_caption": "recaption"}, "recaption"),
    ],
)
def test_bad_input_is_one_line_and_leaves_no_model(
    sample_world: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], values: dict[str, Any], name: str
) -> None:
    """The line names the key with its value, or the file. Errors of a loader process look like any other."""
    folder = tmp_path / "run"
    assert run_command(main, arguments(sample_world, folder, **{"training.workers": 1} | values)) == 2
    (line,) = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error: ")]
    assert name in line and "Traceback" not in line
    assert not (folder / "model.safetensors").exists() and not (folder / "tower").exists()


def test_augmentation_does_not_mirror() -> None:
    """Captions mention left and right."""
    from PIL import Image

    from vision_tower.data.augmentation import TrainingTransform
    from vision_tower.data.images import normalize

    image = Image.new("RGB", (64, 64))
    image.paste((255, 255, 255), (0, 0, 32, 64))  # the left half is white
    transform = TrainingTransform(Augmentation(smallest_crop=0.9), 32)
    torch.manual_seed(0)
    for _ in range(50):
        pixels = transform(image).float().mean(dim=0)
        assert pixels[:, :8].mean() > pixels[:, -8:].mean() + 50
    white = normalize(torch.full((1, 3, 2, 2), 255, dtype=torch.uint8))[0, :, 0, 0]
    expected = torch.tensor([(1 - 0.485) / 0.229, (1 - 0.456) / 0.224, (1 - 0.406) / 0.225])
    torch.testing.assert_close(white, expected)


def test_training_pixels_equal_those_of_the_saved_processor(encoder_dir: Path) -> None:
    """Without augmentation."""
    from PIL import Image

    from vision_tower.checkpoints.encoder import load_encoder
    from vision_tower.data.augmentation import TrainingTransform
    from vision_tower.data.images import normalize

    image = Image.effect_noise((96, 96), 60).convert("RGB")
    transform = TrainingTransform(PLAIN, 96)
    ours = normalize(transform(image)[None])[0]
    theirs = load_encoder(encoder_dir, "cpu").processor(images=image, return_tensors="pt")["pixel_values"][0]
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)
