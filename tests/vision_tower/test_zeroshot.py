"""Zero-shot classification: the command, comparison with a naive version, open_clip and CLIP_benchmark, bad input."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from clip_benchmark.metrics import zeroshot_classification
from open_clip import build_zero_shot_classifier
from PIL import Image

from clips_eval import report, zeroshot
from clips_eval.retrieval.scores import zeroshot_intervals
from clips_eval.stats.uncertainty import wilson
from tests.helpers import color_encoder
from tests.helpers.color_encoder import paint
from tests.helpers.errors import raises_user_error
from vision_tower.checkpoints.encoder import Encoder, load_encoder
from vision_tower.common.errors import NotFinite, UserError
from vision_tower.data.image_batches import SkipCounter
from vision_tower.data.image_folder import DEFAULT_TEMPLATES, load_task, read_templates
from vision_tower.data.karpathy import load_pairs
from vision_tower.evaluation.evaluate import evaluate_retrieval, evaluate_zeroshot
from vision_tower.evaluation.zeroshot import accuracies, best_classes, class_embeddings, classify

TEMPLATES = ["a photo of a {}.", "{} in an image", "a drawing of the {}, small"]


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two red, two green and three blue images; one of the blue folder's is green, one is in a subfolder."""
    for name, color in (
        ("red/1.png", "red"),
        ("red/2.JPG", "red"),
        ("green/1.png", "green"),
        ("green/2.png", "green"),
        ("blue/1.png", "blue"),
        ("blue/2.png", "green"),
        ("blue/deeper/3.webp", "blue"),
    ):
        paint(tmp_path / "data" / name, color)
    (tmp_path / "data" / "red" / "notes.txt").write_text("no image")
    color_encoder.install(tmp_path / "encoder", monkeypatch)
    return tmp_path


def run(root: Path, *options: str) -> dict[str, Any]:
    zeroshot.main([str(root / "encoder"), "--data", str(root / "data"), *options])
    return json.loads((root / "encoder" / "zeroshot.json").read_text())


def test_zeroshot_writes_scores_and_provenance(world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = run(world, "--batch_size", "2")
    assert found["top1"] == 6 / 7 and found["top5"] is None
    assert found["mean_per_class"] == pytest.approx((1 + 1 + 2 / 3) / 3)
    assert found["classes"] == [
        {"folder": "blue", "name": "blue", "n": 3, "top1": 2 / 3},
        {"folder": "green", "name": "green", "n": 2, "top1": 1.0},
        {"folder": "red", "name": "red", "n": 2, "top1": 1.0},
    ]
    templates = read_templates(DEFAULT_TEMPLATES)
    assert found["templates"] == templates and len(templates) == 8
    assert (found["n_images"], found["n_classes"], found["n_texts"], found["n_skipped"]) == (7, 3, 24, 0)
    assert found["sha256"] == hashlib.sha256(b"weights").hexdigest()
    assert found["preprocessing"]["size"] == {"height": 24, "width": 24} and found["seconds"] > 0
    assert found["command"].startswith("clips-mllm zeroshot ")
    assert "85.7%   95 %: " in capsys.readouterr().out
    assert found["format"] == 1 and set(found["intervals"]) == {"top1", "mean_per_class"}
    assert (found["intervals"]["top1"]["n"], found["intervals"]["top1"]["clusters"]) == (7, 7)
    report.main([str(world)])  # `report` reads the file
    assert json.loads((world / "report.json").read_text())["encoder"]["zeroshot"]["top1"] == found["top1"]


def test_names_and_templates_from_files(world: Path) -> None:
    """Names are in the order of the sorted folders; here blue and green are exchanged, so only red is right."""
    (world / "names.txt").write_text("light green\ndark blue\nred\n")
    (world / "templates.txt").write_text("# ours\n\n a {} thing\n{a} {} thing\n")
    found = run(world, "--classes", str(world / "names.txt"), "--templates", str(world / "templates.txt"))
    assert found["top1"] == 3 / 7  # the two red ones, and the green one in the blue folder
    assert [row["name"] for row in found["classes"]] == ["light green", "dark blue", "red"]
    assert found["templates"] == ["a {} thing", "{a} {} thing"] and found["n_texts"] == 6


def test_classes_with_equal_names_are_reported(
    world: Path, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    (world / "names.txt").write_text("cold\ncold\nred\n")
    run(world, "--classes", str(world / "names.txt"))
    assert "'cold'" in capfd.readouterr().err + caplog.text
    caplog.clear()
    run(world)
    assert "'cold'" not in capfd.readouterr().err + caplog.text


def test_underscores_in_folders_are_spaces(world: Path) -> None:
    (world / "data" / "red").rename(world / "data" / "deep_red")
    assert [row["name"] for row in run(world)["classes"]] == ["blue", "deep red", "green"]


def test_unreadable_images_are_skipped_and_counted(world: Path, caplog: pytest.LogCaptureFixture) -> None:
    (world / "data" / "blue" / "2.png").write_bytes(b"no image")
    found = run(world, "--max_bad_fraction", "0.2")
    assert (found["n_images"], found["n_skipped"], found["top1"], found["mean_per_class"]) == (6, 1, 1.0, 1.0)
    assert found["classes"][0] == {"folder": "blue", "name": "blue", "n": 2, "top1": 1.0}
    assert caplog.text.count("blue/2.png") == 1


def test_class_without_readable_images_is_not_counted(world: Path) -> None:
    for file in (world / "data" / "red").iterdir():
        file.write_bytes(b"")
    found = run(world, "--max_bad_fraction", "0.5")
    assert found["classes"][2] == {"folder": "red", "name": "red", "n": 0, "top1": None}
    assert found["mean_per_class"] == pytest.approx((1 + 2 / 3) / 2)


class Peer(torch.nn.Module):
    """Our encoder with open_clip's interface, which returns features that are not normalized."""

    def __init__(self, encoder: Encoder) -> None:
        super().__init__()
        self.model = encoder.model

    def encode_text(self, ids: torch.Tensor, normalize: bool = False) -> torch.Tensor:
        return (1 if normalize else 3.7) * self.model.embed_texts(ids)

    def encode_image(self, pixels: torch.Tensor) -> torch.Tensor:
        return 2.9 * self.model.embed_images(pixels)


@pytest.fixture(scope="module")
def encoder(encoder_dir: Path) -> Encoder:
    return load_encoder(encoder_dir, "cpu")


@pytest.fixture(scope="module")
def noise(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Seven classes of up to nine random images, for which all implementations must agree on an untrained encoder."""
    root = tmp_path_factory.mktemp("noise")
    random = np.random.default_rng(0)
    for index, name in enumerate(("cat", "dog", "big_bus", "red_car", "moon", "hat", "cup")):
        (root / name).mkdir()
        for number in range(9 - index % 3):
            tint = random.integers(0, 255, (1, 1, 3))
            pixels = (random.integers(0, 255, (40, 50, 3)) + 2 * tint) // 3
            Image.fromarray(pixels.astype(np.uint8)).save(root / name / f"{number}.png")
    return root


def test_classifier_equals_open_clip_and_clip_benchmark(encoder: Encoder) -> None:
    names = ["cat", "dog", "big bus", "red car", "moon", "hat", "cup"]
    length = encoder.model.config.text_config.max_position_embeddings

    def tokenize(texts: list[str]) -> torch.Tensor:
        return encoder.tokenizer.contrastive(texts, length)

    ours = class_embeddings(encoder, names, TEMPLATES, batch_size=5, progress=False)
    assert ours.shape == (7, 32) and torch.allclose(ours.norm(dim=1), torch.ones(7))
    theirs = build_zero_shot_classifier(Peer(encoder), tokenize, names, TEMPLATES, num_classes_per_batch=3)
    assert torch.allclose(ours, theirs.T, atol=1e-6)
    braces = [template.replace("{}", "{c}") for template in TEMPLATES]
    theirs = zeroshot_classification.zero_shot_classifier(Peer(encoder), tokenize, names, braces, "cpu", amp=False)
    assert torch.allclose(ours, theirs.T, atol=1e-6)
    for batch_size in (1, 3, 64):
        again = class_embeddings(encoder, names, TEMPLATES, batch_size=batch_size, progress=False)
        assert torch.allclose(ours, again, atol=1e-6)


def test_scores_equal_clip_benchmark(encoder: Encoder, noise: Path, tmp_path: Path) -> None:
    (tmp_path / "t.txt").write_text("\n".join(TEMPLATES))
    task = load_task(noise, tmp_path / "t.txt")
    ours = classify(encoder, task, 8, SkipCounter("noise"), progress=False)
    length = encoder.model.config.text_config.max_position_embeddings
    loader = []
    for entry in task.images:
        assert isinstance(entry.content, Path)
        image = Image.open(entry.content).convert("RGB")
        pixels = encoder.processor(images=[image], return_tensors="pt")["pixel_values"]
        loader.append((pixels, torch.tensor([entry.label])))
    classifier = zeroshot_classification.zero_shot_classifier(
        Peer(encoder),
        lambda texts: encoder.tokenizer.contrastive(texts, length),
        task.names,
        [template.replace("{}", "{c}") for template in TEMPLATES],
        "cpu",
        amp=False,
    )
    logits, labels = zeroshot_classification.run_classification(Peer(encoder), classifier, loader, "cpu", amp=False)
    # CLIP_benchmark's `accuracy` fails with this numpy version; this is its code.
    hits = logits.topk(5, 1, True, True)[1].t().eq(labels.view(1, -1))
    assert ours.top1 == hits[0].sum().item() / len(labels)
    assert ours.top5 == hits.any(dim=0).sum().item() / len(labels) and 0 < ours.top5 < 1
    balanced = zeroshot_classification.balanced_accuracy_score(labels, logits.argmax(dim=1))
    assert ours.mean_per_class == pytest.approx(balanced, abs=1e-12)


def test_accuracies_equal_the_naive_computation() -> None:
    random = torch.Generator().manual_seed(0)
    images, classifier = torch.randn(200, 8, generator=random), torch.randn(12, 8, generator=random)
    labels = torch.randint(11, (200,), generator=random)  # the last class has no image
    found = accuracies(best_classes(images, classifier), labels, classes=12)
    ranked = [sorted(range(12), key=lambda c: -float(image @ classifier[c])) for image in images]
    first = [order[0] == label for order, label in zip(ranked, labels.tolist(), strict=True)]
    assert found.top1 == sum(first) / 200
    assert found.top5 == sum(label in order[:5] for order, label in zip(ranked, labels.tolist(), strict=True)) / 200
    own = [[hit for hit, label in zip(first, labels.tolist(), strict=True) if label == c] for c in range(12)]
    assert found.per_class == [sum(hits) / len(hits) if hits else None for hits in own]
    assert found.images_per_class == [len(hits) for hits in own] and found.per_class[11] is None
    assert found.mean_per_class == pytest.approx(np.mean([np.mean(hits) for hits in own if hits]))


def test_intervals_resample_images() -> None:
    """Compared with a loop over the same draws; the classes are large enough that none is ever empty."""
    random = np.random.default_rng(0)
    labels = torch.from_numpy(random.integers(0, 5, 150))
    best = torch.from_numpy(np.array([random.permutation(6)[:5] for _ in range(150)]))  # the last has no image
    scores = accuracies(best, labels, classes=6)
    found = zeroshot_intervals(scores)
    assert set(found) == {"top1", "top5", "mean_per_class"} and scores.per_class[5] is None
    drawn = np.random.default_rng([0, 0]).multinomial(150, np.full(150, 1 / 150), 2000)
    # Clusters are sorted by name as text: "10" comes before "2".
    order = np.argsort([str(index) for index in range(150)])
    own, first, near = labels.numpy()[order], np.array(scores.first)[order], np.array(scores.near)[order]
    per_class = [(drawn * first)[:, own == c].sum(1) / drawn[:, own == c].sum(1) for c in range(5)]
    for key, values in (
        ("top1", (drawn * first).sum(1) / 150),
        ("top5", (drawn * near).sum(1) / 150),
        ("mean_per_class", np.mean(per_class, axis=0)),
    ):
        low, high = np.quantile(values, (0.025, 0.975))
        assert found[key] == pytest.approx({"low": low, "high": high, "n": 150, "clusters": 150})
        assert low < getattr(scores, key) < high


def test_intervals_are_wilson_if_all_are_right() -> None:
    scores = accuracies(torch.tensor([[0], [1], [2], [2]]), torch.tensor([0, 1, 2, 2]), classes=3)
    low, high = wilson(1.0, 4)
    assert zeroshot_intervals(scores)["top1"] == pytest.approx({"low": low, "high": high, "n": 4, "clusters": 4})


def test_encoder_with_nan_embeddings_is_refused(world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(NotFinite):
        best_classes(torch.full((1, 3), torch.nan), torch.ones(2, 3))
    broken = torch.full((2, 3), torch.nan)
    monkeypatch.setattr(color_encoder.ColorEncoder, "embed_images", lambda _, images: broken[: len(images)])
    with raises_user_error(file=world / "encoder"):
        run(world, "--batch_size", "2")


def test_evaluation_inside_training(
    encoder: Encoder, noise: Path, sample_world: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Scores equal the commands'; no progress bars; training mode and random state are restored."""
    model, task = encoder.model, load_task(noise)
    wanted = classify(encoder, task, 16, SkipCounter("noise"), progress=False)
    pairs = load_pairs(sample_world / "retrieval" / "test.json", sample_world / "retrieval", "test")
    model.train()
    state = torch.get_rng_state()
    found = evaluate_zeroshot(model, encoder.tokenizer, task, batch_size=7)
    recall = evaluate_retrieval(model, encoder.tokenizer, pairs, batch_size=7)
    assert model.training and all(module.training for module in model.modules())
    assert torch.equal(torch.get_rng_state(), state) and not capsys.readouterr().err
    assert found == {"top1": wanted.top1, "top5": wanted.top5, "mean_per_class": wanted.mean_per_class}
    assert set(recall) == {f"{way}_r{k}" for way in ("i2t", "t2i") for k in (1, 5, 10)} and recall["t2i_r10"] < 1
    model.eval()
    evaluate_zeroshot(model, encoder.tokenizer, task)
    assert not model.training


def empty(root: Path) -> None:
    (root / "data" / "gray").mkdir()
    (root / "data" / "gray" / "list.txt").write_text("")


def no_classes(root: Path) -> None:
    (root / "data").rename(root / "moved")
    (root / "data").mkdir()
    paint(root / "data" / "1.png", "red")


def corrupt(root: Path) -> None:
    (root / "data" / "red" / "1.png").write_bytes(b"no image")


def write(name: str, text: str) -> Any:
    return lambda root: (root / name).write_text(text)


@pytest.mark.parametrize(
    ("damage", "options", "expected"),
    [
        (lambda root: (root / "data").rename(root / "moved"), [], ["data"]),
        (no_classes, [], ["data"]),
        (empty, [], ["data/gray"]),
        (corrupt, [], ["1 of 7", "red/1.png", "0.01"]),
        (write("f", "red\ngreen\n"), ["--classes", "f"], ["f", "2", "3"]),
        (write("f", "red\n\nblue\n"), ["--classes", "f"], ["f", "2"]),
        (write("f", "a photo\n"), ["--templates", "f"], ["f", "a photo", "{}"]),
        (write("f", "# none\n"), ["--templates", "f"], ["f"]),
        (lambda root: None, ["--templates", "f"], ["f"]),
        (lambda root: None, ["--batch_size", "0"], ["batch_size=0"]),
        (lambda root: (root / "encoder" / "model.safetensors").unlink(), [], ["encoder", "model.safetensors"]),
    ],
)
def test_bad_input_of_zeroshot_is_refused(
    world: Path, monkeypatch: pytest.MonkeyPatch, damage: Any, options: list[str], expected: list[str]
) -> None:
    damage(world)
    monkeypatch.chdir(world)
    with pytest.raises(UserError) as caught:
        run(world, *options)
    assert all(part in str(caught.value) for part in expected) and "\n" not in str(caught.value)
    assert not (world / "encoder" / "zeroshot.json").exists()
