"""Shards to batches, and `clips-mllm pretrain` on the tiny sample world."""

from __future__ import annotations

import collections
import io
import itertools
import json
import os
import random
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import pytest
import torch

from vision_tower.captions import split_sentences
from vision_tower.data import CaptionSample, PairStream, find_shards, read_texts
from vision_tower.errors import UserError, run_command
from vision_tower.pretrain import main
from vision_tower.pretrain_recipe import Augmentation, PairsRecipe, PretrainRecipe
from vision_tower.recipe import parse_recipe

PLAIN = Augmentation(smallest_crop=1.0, jitter=0.0, gray_probability=0.0)


def png(color: int = 0, size: int = 8) -> bytes:
    from PIL import Image

    buffer = io.BytesIO()
    Image.new("RGB", (size, size), (color, 0, 0)).save(buffer, format="PNG")
    return buffer.getvalue()


def write_tar(file: Path, members: list[tuple[str, bytes]]) -> Path:
    with tarfile.open(file, "w") as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return file


def pair(
    key: str, web: Any = "web", full: Any = "Full caption.", picture: bytes | None = None
) -> list[tuple[str, bytes]]:
    row = {"web_caption": web, "synthetic_caption": full}
    return [(f"{key}.png", picture or png()), (f"{key}.json", json.dumps(row).encode())]


def numbered(folder: Path, shards: int, each: int) -> str:
    """Shards whose web captions count from 0."""
    for shard in range(shards):
        rows = [pair(f"{n:03d}", web=str(n)) for n in range(shard * each, (shard + 1) * each)]
        write_tar(folder / f"{shard}.tar", [member for row in rows for member in row])
    return str(folder / "*.tar")


def draw_letters(web: str, full: str, rng: random.Random) -> dict[str, list[int]]:
    """In place of an objective's texts: one sentence, letter by letter."""
    return {"sub": [ord(letter) for letter in rng.choice(split_sentences(full) or [full])]}


def stream(pattern: str, *, rank: int = 0, world: int = 1, seed: int = 0, **values: Any) -> PairStream:
    values = {"shuffle_buffer": 8, "augmentation": PLAIN} | values
    return PairStream(PairsRecipe(shards=pattern, **values), 8, seed, rank, world, draw_letters)


def take(source: PairStream, count: int) -> list[CaptionSample]:
    return list(itertools.islice(source, count))


@pytest.mark.parametrize("buffer", [0, 1, 8, 1000])
def test_every_sample_once_an_epoch(tmp_path: Path, buffer: int) -> None:
    source = stream(numbered(tmp_path, 3, 10), shuffle_buffer=buffer)
    seen = [sample.web for sample in take(source, 60)]
    for epoch in (seen[:30], seen[30:]):
        assert sorted(epoch, key=int) == [str(n) for n in range(30)]
    assert (seen[:30] != seen[30:]) or buffer == 0  # another order every time
    assert [sample.web for sample in take(source, 60)] == seen  # and the same one from the start
    if buffer > 1:
        assert seen[:10] != sorted(seen[:10], key=int)


def test_ranks_and_seeds(tmp_path: Path) -> None:
    pattern = numbered(tmp_path, 4, 5)
    halves = [{sample.web for sample in take(stream(pattern, rank=rank, world=2), 10)} for rank in (0, 1)]
    assert len(halves[0]) == len(halves[1]) == 10 and not halves[0] & halves[1]
    orders = [[sample.web for sample in take(stream(pattern, seed=seed), 20)] for seed in (0, 1)]
    assert orders[0] != orders[1]
    with pytest.raises(UserError, match="4 shards for 5 readers"):
        take(stream(pattern, world=5), 1)


def test_what_becomes_of_captions(tmp_path: Path) -> None:
    rows = [
        *pair("a", web="w", full="One. Two."),
        *pair("b", web="only web", full=""),
        *pair("c", web=None, full="Only full."),
        *pair("d", web=["x", "y"], full=None),
    ]
    write_tar(tmp_path / "a.tar", rows)
    samples = take(stream(str(tmp_path / "a.tar"), shuffle_buffer=0), 80)
    texts = {(sample.web, "".join(map(chr, sample.texts["sub"])), sample.full) for sample in samples}
    assert texts == {
        ("w", "One.", "One. Two."),
        ("w", "Two.", "One. Two."),
        ("only web", "only web", "only web"),  # the web caption stands in
        ("", "Only full.", "Only full."),
        ("x", "x", "x"),
        ("y", "y", "y"),
    }


def test_unreadable_samples_are_skipped_and_counted(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    good = [member for n in range(14) for member in pair(f"{n:02d}", web=str(n))]
    bad = [
        *pair("x1", picture=b"no picture"),
        *pair("x2", picture=png(size=64)[:60]),
        ("x3.png", png()),
        ("x4.png", png()),
        ("x4.json", b"{"),
        ("x5.png", png()),
        ("x5.json", b"[1]"),
        ("x6.json", b"{}"),
        ("x7.json", json.dumps({"web_caption": "", "synthetic_caption": " "}).encode()),
        ("x7.png", png()),
        ("x8.json", json.dumps({"web_caption": "w", "synthetic_caption": "f"}).encode()),
    ]
    write_tar(tmp_path / "a.tar", good + bad)
    source = stream(str(tmp_path / "a.tar"), most_bad=0.5, shuffle_buffer=0)
    assert sorted(int(sample.web) for sample in take(source, 15)[:14]) == list(range(14))  # the 15th is past the bad
    causes = {"corrupt image": 2, "no 'json'": 1, "malformed json": 2, "no 'web_caption'": 1, "no caption": 1}
    assert source.bad == collections.Counter(causes | {"no image": 1})
    lines = capfd.readouterr().err.strip().splitlines()
    assert len(lines) == 6 and all(str(tmp_path / "a.tar") in line for line in lines)  # one a cause
    assert len(read_texts(source.recipe, 100)) == 2 * 18  # the vocabulary does not stumble over them


def test_too_many_unreadable_samples_stop_the_run(tmp_path: Path) -> None:
    rows = [member for n in range(20) for member in pair(f"{n:02d}", picture=b"bad" if n < 2 else None)]
    write_tar(tmp_path / "a.tar", rows)
    assert len(take(stream(str(tmp_path / "a.tar"), most_bad=0.1), 100)) == 100
    with pytest.raises(UserError, match=r"2 of 20 samples are unreadable.*data\.most_bad=0\.09"):
        take(stream(str(tmp_path / "a.tar"), most_bad=0.09), 100)
    write_tar(tmp_path / "b.tar", pair("a", picture=b"bad"))
    with pytest.raises(UserError, match="no readable sample in 1 shards"):
        take(stream(str(tmp_path / "b.tar"), most_bad=1.0), 1)


def test_bad_shards(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no shard matches data\.shards"):
        find_shards(str(tmp_path / "*.tar"))
    write_tar(tmp_path / "empty.tar", [])
    (tmp_path / "zero.tar").write_bytes(b"")
    (tmp_path / "text.tar").write_text("hello " * 500)
    (tmp_path / "folder.tar").mkdir()
    for name in ("empty", "zero", "text", "folder"):
        file = str(tmp_path / f"{name}.tar")
        with pytest.raises(UserError, match=r"empty shard|not a readable tar") as caught:
            find_shards(file)
        assert str(caught.value).startswith(file) and "\n" not in str(caught.value)


@pytest.mark.parametrize("damage", ["cut in a member", "damaged header"])
def test_a_damaged_shard_is_named_not_taken_for_its_end(tmp_path: Path, damage: str) -> None:
    numbered(tmp_path, 1, 10)
    file = tmp_path / "0.tar"
    content = bytearray(file.read_bytes())
    if damage == "cut in a member":
        content = content[: 9 * 512 + 100]
    else:
        content[8 * 512 : 9 * 512] = b"x" * 512
    file.write_bytes(content)
    with pytest.raises(UserError, match=r"0\.tar: broken after '"):
        take(stream(str(file)), 10)


def test_damaged_pictures_never_escape_as_other_errors() -> None:
    from PIL import Image

    from vision_tower.images import BadImage, decode_image

    rng = random.Random(0)
    picture = Image.effect_noise((40, 40), 80).convert("RGB")
    refused = 0
    for form in ("PNG", "JPEG", "WEBP", "GIF", "BMP"):
        buffer = io.BytesIO()
        picture.save(buffer, format=form)
        for _ in range(60):
            content = bytearray(buffer.getvalue())
            for _ in range(rng.randint(1, 20)):
                content[rng.randrange(min(len(content), 200))] = rng.randrange(256)
            try:
                decode_image(bytes(content[: rng.randint(1, len(content))]))
            except BadImage:
                refused += 1
    assert refused > 200


# --- the command


TOWER = {"width": 32, "layers": 1, "mlp": 64, "heads": 2}


def arguments(world: Path, folder: Path, **values: Any) -> list[str]:
    fixed = {
        "output_dir": folder,
        "data.shards": world / "pretrain" / "*.tar",
        "data.augmentation.jitter": 0.2,
        "model.joint": 16,
        "model.image_size": 96,
        "model.patch_size": 32,
        "model.text_length": 16,
        "model.target_length": 24,
        "model.vocabulary_size": 400,
        "training.global_batch_size": 16,
        "training.device_batch_size": 16,
        "training.learning_rate": 2e-3,
        "training.max_steps": 6,
        "training.log_every": 1,
        "training.precision": "fp32",
        "training.workers": 0,
        "training.schedule": "constant_with_warmup",
    }
    for tower in ("image", "text", "captioner"):
        fixed |= {f"model.{tower}.{name}": value for name, value in TOWER.items()}
    return [f"--{name}={value}" for name, value in (fixed | values).items()]


def metrics(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def losses(folder: Path) -> list[float]:
    return [row["loss"] for row in metrics(folder)]


@pytest.fixture(scope="module")
def run(sample_world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pretrain") / "run"
    main(arguments(sample_world, folder, **{"training.max_steps": 30, "training.save_every": 20}))
    return folder


def test_a_run_leaves_what_the_next_step_needs(run: Path, sample_world: Path) -> None:
    from vision_tower.encoder import load_encoder

    assert load_encoder(run, "cpu").embed_texts(["a dog"]).shape == (1, 16)
    names = {path.name for path in (run / "tower").iterdir()}
    assert {"config.json", "model.safetensors", "preprocessor_config.json"} <= names
    assert not (run / "partial").exists() and not list(run.glob(".*"))
    expected = arguments(sample_world, run, **{"training.max_steps": 30, "training.save_every": 20})
    again = parse_recipe(PretrainRecipe, ["--config", str(run / "recipe.yaml")], command="pretrain")
    assert again == parse_recipe(PretrainRecipe, expected, command="pretrain")
    environment = json.loads((run / "environment.json").read_text())
    assert environment["packages"]["torch"] and environment["command"]


def test_metrics_name_every_term_and_the_loss_falls(run: Path) -> None:
    rows = metrics(run)
    assert [row["step"] for row in rows] == list(range(1, 31))
    for row in rows:
        assert row["loss"] == pytest.approx((row["loss_web"] + row["loss_sub"]) / 2 + 2 * row["loss_caption"], abs=1e-3)
        assert 0 < row["temperature"] <= 0.08 and row["grad_norm"] > 0
    assert sum(row["loss"] for row in rows[-5:]) < 0.8 * sum(row["loss"] for row in rows[:5])


def test_a_fixed_seed_fixes_the_losses(run: Path, sample_world: Path, tmp_path: Path) -> None:
    for seed, same in ((0, True), (1, False)):
        folder = tmp_path / str(seed)
        main(arguments(sample_world, folder, **{"training.max_steps": 4, "training.seed": seed}))
        assert (losses(folder) == losses(run)[:4]) is same


@pytest.mark.parametrize("workers", [0, 1])
def test_an_interrupted_run_goes_on_as_if_nothing_had_happened(
    run: Path, sample_world: Path, tmp_path: Path, workers: int
) -> None:
    """The second command finds the first one's checkpoint, drops the log lines behind it, and meets the same losses."""
    given = {
        "training.max_steps": 8,
        "training.save_every": 3,
        "training.keep_checkpoints": 2,
        "training.workers": workers,
    }
    reference = run
    if workers:
        reference = tmp_path / "whole"
        main(arguments(sample_world, reference, **given))
    folder = tmp_path / "halves"
    main(arguments(sample_world, folder, **given | {"training.max_steps": 5}))
    shutil.rmtree(folder / "checkpoint-5")
    first, *rest = (folder / "metrics.jsonl").read_text().splitlines(keepends=True)
    marked = json.dumps(json.loads(first) | {"marked": 1.0}) + "\n"
    cut = '{"step": 6, "lo'  # by the interruption
    (folder / "metrics.jsonl").write_text("".join([marked, *rest, cut]))
    main(arguments(sample_world, folder, **given))
    assert [row["step"] for row in metrics(folder)] == list(range(1, 9))
    assert "marked" in metrics(folder)[0]  # its first steps were not repeated
    assert losses(folder) == pytest.approx(losses(reference)[:8], abs=1e-5)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"model.patch_size": 36}, "model.image_size=96: patch_size=36 does not divide it; take 72 or 108"),
        ({"model.image.heads": 3}, "model.image.heads=3: does not divide width=32"),
        ({"model.vocabulary_size": 20}, "model.vocabulary_size=20; raise it"),
        ({"training.max_steps": 0}, "training.max_steps: pretraining reads an endless stream"),
        ({"captions.budget": 14}, "captions.budget=14: from 1 to 13, what model.text_length has room for"),
        ({"objective": "clip-web", "loss.caption": 1}, "loss.caption: objective 'clip-web' has only web; take another"),
        ({"loss.web": 0, "loss.sub": 0, "loss.caption": 0}, "loss: every term is switched off"),
        ({"training.global_batch_size": 24}, "not a multiple of device_batch_size=16 x 1 devices"),
        ({"data.shards": "nowhere/*.tar"}, "nowhere/*.tar: no shard matches data.shards"),
        ({"data.synthetic_caption": "recaption"}, "no readable sample in 5 shards ({\"no 'recaption'\": "),
    ],
)
def test_bad_input_is_one_line_and_leaves_no_model(
    sample_world: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], values: dict[str, Any], message: str
) -> None:
    folder = tmp_path / "run"
    # One loader process: what fails there must read the same.
    assert run_command(main, arguments(sample_world, folder, **{"training.workers": 1} | values)) == 2
    (line,) = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error: ")]
    assert message in line and "Traceback" not in line
    assert not (folder / "model.safetensors").exists() and not (folder / "tower").exists()


def test_two_ranks_through_the_launcher(sample_world: Path, tmp_path: Path) -> None:
    """The logged terms are those of the global batch, so the logged loss is their sum."""
    folder = tmp_path / "run"
    values = {"training.device_batch_size": 8, "training.max_steps": 3}
    words = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    words += ["-m", "vision_tower.pretrain", *arguments(sample_world, folder, **values)]
    done = subprocess.run(words, capture_output=True, text=True, timeout=240, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-2000:]
    for row in metrics(folder):
        assert row["loss"] == pytest.approx((row["loss_web"] + row["loss_sub"]) / 2 + 2 * row["loss_caption"], abs=1e-3)
    assert len(metrics(folder)) == 3 and (folder / "tower" / "model.safetensors").is_file()


def test_augmentation_keeps_left_and_right() -> None:
    """Captions speak of left and right: no augmentation may mirror a picture."""
    from PIL import Image

    from vision_tower.images import normalize, training_transform

    picture = Image.new("RGB", (64, 64))
    picture.paste((255, 255, 255), (0, 0, 32, 64))  # the left half is white
    transform: Any = training_transform(Augmentation(smallest_crop=0.9), 32)
    torch.manual_seed(0)
    for _ in range(50):
        pixels = transform(picture).float().mean(dim=0)
        assert pixels[:, :8].mean() > pixels[:, -8:].mean() + 50
    white = normalize(torch.full((1, 3, 2, 2), 255, dtype=torch.uint8))[0, :, 0, 0]
    expected = torch.tensor([(1 - 0.485) / 0.229, (1 - 0.456) / 0.224, (1 - 0.406) / 0.225])
    torch.testing.assert_close(white, expected)


def test_training_and_evaluation_see_the_same_pixels(encoder_dir: Path) -> None:
    """Without augmentation the stream's pixels are those of the processor saved beside the tower."""
    from PIL import Image

    from vision_tower.encoder import load_encoder
    from vision_tower.images import normalize, training_transform

    picture = Image.effect_noise((96, 96), 60).convert("RGB")
    transform: Any = training_transform(PLAIN, 96)
    ours = normalize(transform(picture)[None])[0]
    theirs = load_encoder(encoder_dir, "cpu").processor(images=picture, return_tensors="pt")["pixel_values"][0]
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)
