"""`clips-mllm retrieve` on Karpathy JSON, CSV and shards, with an encoder that reads colors."""

from __future__ import annotations

import csv
import hashlib
import json
import shutil
from importlib.metadata import version
from pathlib import Path
from typing import Any

import fsspec
import pytest
import torch
from safetensors.torch import load_file, save_file

from clips_eval import report, retrieve
from clips_eval.retrieval.scores import recalls_of
from tests.helpers import color_encoder
from tests.helpers.color_encoder import COLORS, paint
from tests.helpers.errors import raises_user_error
from tests.helpers.shard_files import write_parquet, write_tar
from vision_tower.common.errors import UserError
from vision_tower.evaluation.embedding import EmbeddedPairs


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, dict[str, Any]]:
    """Three images with two captions each, wrong ones for the blue image, and one image of another split."""
    rows = []
    for number, color in enumerate(COLORS):
        paint(tmp_path / "val" / f"{color}.png", color)
        named = ["red", "red"] if color == "blue" else [color, color]
        sentences = [{"raw": f"a {name} square"} for name in named]
        rows.append(
            {"filepath": "val", "filename": f"{color}.png", "split": "test", "imgid": number, "sentences": sentences}
        )
    rows.append({"filepath": "val", "filename": "none.png", "split": "train", "imgid": 3, "sentences": []})
    color_encoder.install(tmp_path / "encoder", monkeypatch)
    return tmp_path, {"images": rows, "dataset": "sample"}


def dump(path: Path, tree: Any) -> None:
    path.write_text(json.dumps(tree))


def run(root: Path, *options: str, data: str = "test.json") -> dict[str, Any]:
    retrieve.main([str(root / "encoder"), "--data", str(root / data), *options])
    return json.loads((root / "encoder" / "retrieval.json").read_text())


def test_retrieve_karpathy_json(world: tuple[Path, dict[str, Any]], capsys: pytest.CaptureFixture[str]) -> None:
    root, tree = world
    dump(root / "test.json", tree)
    found = run(root, "--batch_size", "2")
    # The blue image's captions say red: it is never first, and its two captions rank the red image before it.
    assert (found["i2t_r1"], found["t2i_r1"]) == pytest.approx((2 / 3, 4 / 6))
    assert (found["t2i_r5"], found["n_images"], found["n_texts"], found["n_skipped"]) == (1.0, 3, 6, 0)
    assert found["sha256"] == hashlib.sha256(b"weights").hexdigest()
    assert found["command"].startswith("clips-mllm retrieve ") and found["versions"]["torch"] == version("torch")
    assert found["preprocessing"]["size"] == {"height": 24, "width": 24} and found["seconds"] > 0
    assert found["preprocessing"]["image_mean"] == [0.485, 0.456, 0.406]
    for row in found["examples"]["text_to_image"]:
        assert all((root / "encoder" / name).is_file() for name in row["images"])
    assert found["format"] == 1 and found["by_object"] == []
    # Three images are too few for an interval of the median rank; with one right answer mAP@R is recall@1.
    assert found["median_rank"]["intervals"]["t2i"] == {"low": None, "high": None, "n": 6, "clusters": 3}
    assert found["map_at_r"]["t2i"] == pytest.approx(4 / 6)
    assert found["map_at_r"]["intervals"]["t2i"] == found["intervals"]["t2i_r1"]
    assert "66.7%" in capsys.readouterr().out
    report.main([str(root)])  # `report` reads the result
    assert "### Beyond recall" in (root / "report.md").read_text()
    assert json.loads((root / "report.json").read_text())["encoder"]["retrieval"]["t2i_r1"] == found["t2i_r1"]


def test_names_without_a_caption_are_printed(
    world: tuple[Path, dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    root, tree = world
    dump(root / "test.json", tree)
    (root / "names.txt").write_text("cat\nred\ndog\nsquare\nbus\nhat\ncup\nmoon\n")
    found = run(root, "--objects", str(root / "names.txt"))
    assert [row["object"] for row in found["by_object"]] == ["red", "square"]
    note = capsys.readouterr().out.splitlines()[-1]
    assert note.startswith(f"{root / 'names.txt'}: 6 of 8 ") and note.endswith("(cat, dog, bus, hat, cup, ...)")
    (root / "names.txt").write_text("red\n")
    run(root, "--objects", str(root / "names.txt"))
    assert "names.txt" not in capsys.readouterr().out


def test_data_digest_covers_images_and_captions(world: tuple[Path, dict[str, Any]]) -> None:
    root, tree = world
    dump(root / "test.json", tree)
    first = run(root)["data_sha256"]
    assert run(root, "--batch_size", "1")["data_sha256"] == first
    (root / "val" / "red.png").rename(root / "val" / "crimson.png")  # another name for the same image
    tree["images"][0]["filename"] = "crimson.png"
    dump(root / "test.json", tree)
    assert run(root)["data_sha256"] == first
    image = (root / "val" / "blue.png").read_bytes()
    paint(root / "val" / "blue.png", "green")
    assert run(root)["data_sha256"] != first
    (root / "val" / "blue.png").write_bytes(image)
    tree["images"][1]["sentences"][0]["raw"] += "."
    dump(root / "test.json", tree)
    assert run(root)["data_sha256"] != first


def test_split_option(world: tuple[Path, dict[str, Any]]) -> None:
    root, tree = world
    tree["images"][1]["split"] = "val"
    dump(root / "test.json", tree)
    found = run(root, "--split", "val")
    assert (found["split"], found["n_images"], found["n_texts"], found["t2i_r1"]) == ("val", 1, 2, 1.0)


def write_csv(file: Path, rows: list[tuple[str, ...]], separator: str = ",") -> None:
    with file.open("w", newline="", encoding="utf-8") as stream:
        csv.writer(stream, delimiter=separator).writerows(rows)


def test_csv_equals_the_karpathy_json(world: tuple[Path, dict[str, Any]]) -> None:
    """Rows of one image are not adjacent; captions contain separator, quotes and newlines."""
    root, tree = world
    dump(root / "test.json", tree)
    expected = run(root)
    rows = [
        (f"val/{row['filename']}", sentence["raw"] + ',\t"quoted"\nsecond line')
        for index in range(2)
        for row in tree["images"][:3]
        for sentence in [row["sentences"][index]]
    ]
    write_csv(root / "a.csv", [("image", "caption"), *rows])
    write_csv(root / "b.tsv", [("title", "other", "filepath"), *((text, "x", file) for file, text in rows)], "\t")
    other = ("--separator", "\t", "--image_column", "filepath", "--caption_column", "title")
    for data, options in (("a.csv", ()), ("b.tsv", other)):
        found = run(root, "--format", "csv", *options, data=data)
        for key in ("i2t_r1", "i2t_r5", "t2i_r1", "t2i_r5", "n_images", "n_texts"):
            assert found[key] == expected[key]
        assert found["split"] is None
    assert found["examples"]["text_to_image"][0]["query"] == 'a red square,\t"quoted"\nsecond line'


def rows_of(tree: dict[str, Any], root: Path) -> list[tuple[str, bytes, list[str]]]:
    """Key, image and captions of the test split."""
    rows = [row for row in tree["images"] if row["split"] == "test"]
    names = [f"val/{row['filename']}" for row in rows]
    texts = [[sentence["raw"] for sentence in row["sentences"]] for row in rows]
    pairs = zip(names, texts, strict=True)
    return [(name.split(".")[0], (root / name).read_bytes(), captions) for name, captions in pairs]


def write_shards(root: Path, kind: str, rows: list[tuple[str, bytes, list[str]]]) -> list[str]:
    """Write two shards and return the options that read them."""
    for number, part in enumerate((rows[:2], rows[2:])):
        match kind:
            case "json":
                members = [
                    member
                    for key, content, texts in part
                    for member in ((f"{key}.png", content), (f"{key}.json", json.dumps({"texts": texts}).encode()))
                ]
                write_tar(root / f"s{number}.tar", members)
            case "txt":
                lines = [(f"{key}.txt", ("\n".join(texts) + "\n").encode()) for key, _, texts in part]
                images = [(f"{key}.pic", content) for key, content, _ in part]
                write_tar(root / f"s{number}.tar", [each for pair in zip(lines, images, strict=True) for each in pair])
            case "parquet":
                images = [{"bytes": content, "path": None} for _, content, _ in part]
                columns = {"photo": images, "texts": [texts for _, _, texts in part], "other": [1] * len(part)}
                write_parquet(root / f"s{number}.parquet", columns)
    return {
        "json": ["--data", str(root / "s{0..1}.tar"), "--caption_column", "texts"],
        "txt": ["--data", str(root / "s*.tar"), "--image_column", "pic", "--caption_column", "txt"],
        "parquet": ["--data", str(root / "*.parquet"), "--image_column", "photo", "--caption_column", "texts"],
    }[kind]


def run_shards(root: Path, options: list[str]) -> dict[str, Any]:
    retrieve.main([str(root / "encoder"), "--format", "shards", *options])
    return json.loads((root / "encoder" / "retrieval.json").read_text())


@pytest.mark.parametrize("kind", ["json", "txt", "parquet"])
def test_shards_equal_the_karpathy_json(
    world: tuple[Path, dict[str, Any]], kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    root, tree = world
    dump(root / "test.json", tree)
    expected = run(root)
    options = write_shards(root, kind, rows_of(tree, root))
    capsys.readouterr()
    found = run_shards(root, options)
    for key in ("i2t_r1", "i2t_r5", "t2i_r1", "t2i_r5", "n_images", "n_texts", "n_skipped", "data_sha256"):
        assert found[key] == expected[key]
    assert found["examples"]["image_to_text"][0]["query"].startswith(f"{root}/s0.")
    assert "3/3" in capsys.readouterr().err  # local shards are counted for the progress bar


def test_incomplete_shard_rows_are_skipped_and_counted(world: tuple[Path, dict[str, Any]]) -> None:
    root, tree = world
    good = rows_of(tree, root)[:2]
    options = write_shards(root, "json", good)
    bad = [
        *[("a.png", good[0][1]), ("a.json", b'{"texts": []}')],
        *[("b.png", good[0][1]), ("b.json", b'{"other": "text"}')],
        *[("c.png", good[0][1]), ("c.json", b"{")],
        ("d.json", b'{"texts": "no image"}'),
        *[("e.png", good[0][1][:40]), ("e.json", b'{"texts": "half an image"}')],
        *[("f.png", good[0][1]), ("f.json", b'{"texts": null}')],
    ]
    write_tar(root / "s1.tar", bad)
    found = run_shards(root, [*options, "--max_bad_fraction", "0.8"])
    assert (found["n_images"], found["n_texts"], found["n_skipped"], found["t2i_r1"]) == (2, 4, 6, 1.0)
    with raises_user_error(file=options[1]) as caught:
        run_shards(root, options)
    assert "6 of 8" in str(caught.value) and f"{root / 's1.tar'}: a" in str(caught.value)


def cut(root: Path) -> None:
    (root / "s1.tar").write_bytes((root / "s1.tar").read_bytes()[:700])


@pytest.mark.parametrize(
    ("damage", "options", "names"),
    [
        (cut, [], ["s1.tar"]),
        (lambda root: (root / "s1.tar").unlink(), [], ["s1.tar"]),
        (lambda root: None, ["--caption_column", "title"], ["s0.tar: val/red", "caption_column=title"]),
        (lambda root: None, ["--image_column", "pic", "--data", "{root}/none*.tar"], ["none*.tar"]),
    ],
)
def test_bad_shard_is_named(
    world: tuple[Path, dict[str, Any]], damage: Any, options: list[str], names: list[str]
) -> None:
    root, tree = world
    given = write_shards(root, "json", rows_of(tree, root))
    damage(root)
    with pytest.raises(UserError) as caught:
        run_shards(root, [*given, *(word.format(root=root) for word in options)])
    assert all(name in str(caught.value) for name in names)
    assert not (root / "encoder" / "retrieval.json").exists()


def test_unreadable_images_are_skipped_and_counted(world: tuple[Path, dict[str, Any]]) -> None:
    """Its captions are skipped too: no image could match them."""
    root, tree = world
    (root / "val" / "blue.png").write_bytes(b"no image")
    dump(root / "test.json", tree)
    found = run(root, "--max_bad_fraction", "0.4", "--batch_size", "1")
    assert (found["n_images"], found["n_texts"], found["n_skipped"]) == (2, 4, 1)
    assert (found["i2t_r1"], found["t2i_r1"]) == (1.0, 1.0)  # only the blue image had wrong captions


def test_diverged_encoder_is_refused(tmp_path: Path) -> None:
    """Comparisons with NaN are false, so recall would be perfect."""
    images = torch.full((1, 3), torch.nan)
    found = EmbeddedPairs(
        images=images, texts=torch.ones(1, 3), owner=torch.zeros(1).long(), names=["i"], captions=[""]
    )
    with raises_user_error(file=tmp_path):
        recalls_of(tmp_path, found)


def break_json(root: Path, tree: dict[str, Any]) -> None:
    (root / "test.json").write_text("[")


def break_split(root: Path, tree: dict[str, Any]) -> None:
    dump(root / "test.json", {"images": tree["images"][3:]})


def break_caption(root: Path, tree: dict[str, Any]) -> None:
    tree["images"][1]["sentences"][1]["raw"] = " "
    dump(root / "test.json", tree)


def break_missing_image(root: Path, tree: dict[str, Any]) -> None:
    (root / "val" / "green.png").unlink()
    dump(root / "test.json", tree)


def break_corrupt_image(root: Path, tree: dict[str, Any]) -> None:
    file = root / "val" / "green.png"
    file.write_bytes(file.read_bytes()[:40])
    dump(root / "test.json", tree)


def break_every_image(root: Path, tree: dict[str, Any]) -> None:
    for file in (root / "val").iterdir():
        file.write_bytes(b"")
    dump(root / "test.json", tree)


def break_encoder(root: Path, tree: dict[str, Any]) -> None:
    (root / "encoder" / "model.safetensors").unlink()
    dump(root / "test.json", tree)


@pytest.mark.parametrize(
    ("damage", "names"),
    [
        (lambda root, tree: None, ["test.json"]),
        (break_json, ["test.json"]),
        (break_split, ["test.json", "train"]),
        (break_caption, ["test.json", "images[1].sentences[1]"]),
        (break_missing_image, ["green.png", "images[1]"]),
        (break_corrupt_image, ["test.json", "1 of 3", "green.png", "0.01"]),
        (break_every_image, ["test.json", "3 of 3"]),
        (break_encoder, ["encoder", "model.safetensors"]),
    ],
)
def test_bad_karpathy_data_or_encoder_is_named(
    world: tuple[Path, dict[str, Any]], damage: Any, names: list[str]
) -> None:
    root, tree = world
    damage(root, tree)
    with pytest.raises(UserError) as caught:
        run(root)
    assert all(name in str(caught.value) for name in names)
    assert not (root / "encoder" / "retrieval.json").exists()


@pytest.mark.parametrize(
    ("text", "key", "value"),
    [
        (None, None, None),
        ("", "image_column", "image"),
        ("image,caption\n", None, None),
        ("file,caption\nval/red.png,red\n", "image_column", "image"),
        ("image,text\nval/red.png,red\n", "caption_column", "caption"),
        ("image\tcaption\nval/red.png\tred\n", "image_column", "image"),
        ("image,caption\nval/red.png,red, round\n", None, None),
        ("image,caption\nval/red.png\n", None, None),
        ("image,caption\nval/red.png,red\nval/green.png, \n", "caption", None),
        ('image,caption\nval/red.png,"red\n', None, None),
        (b"image,caption\nval/red.png,\xff\n", None, None),
    ],
)
def test_bad_csv_is_named(
    world: tuple[Path, dict[str, Any]], text: str | bytes | None, key: str | None, value: str | None
) -> None:
    root, _ = world
    if text is not None:
        (root / "data.csv").write_bytes(text if isinstance(text, bytes) else text.encode())
    with raises_user_error(file=root / "data.csv", key=key, value=value):
        run(root, "--format", "csv", data="data.csv")


def test_missing_image_of_a_csv_is_named_with_its_line(world: tuple[Path, dict[str, Any]]) -> None:
    root, _ = world
    (root / "data.csv").write_text("image,caption\nval/red.png,red\nval/gray.png,gray\n")
    with raises_user_error(file=root / "val" / "gray.png") as caught:
        run(root, "--format", "csv", data="data.csv")
    assert f"line 3 of {root / 'data.csv'}" in str(caught.value)


@pytest.mark.parametrize(
    ("options", "key", "value"),
    [
        (["--format", "csv", "--separator", ";;"], "separator", ";;"),
        (["--max_bad_fraction", "1"], "max_bad_fraction", 1.0),
        (["--batch_size", "0"], "batch_size", 0),
        (["--format", "csv", "--split", "val"], "split", "val"),
        (["--format", "shards", "--images", "val"], "images", Path("val")),
        (["--image_column", "path"], "image_column", "path"),
        (["--format", "csv", "--positives", "p.json"], "positives", Path("p.json")),
    ],
)
def test_bad_option_or_one_of_another_format_is_refused(options: list[str], key: str, value: Any) -> None:
    with raises_user_error(key=key, value=value):
        retrieve.main(["encoder", "--data", "data", *options])


def test_retrieve_with_saved_encoder_on_sample_world(encoder_dir: Path, sample_world: Path, tmp_path: Path) -> None:
    output = tmp_path / "scores.json"
    data = sample_world / "retrieval" / "test.json"
    retrieve.main([str(encoder_dir), "--data", str(data), "--output", str(output), "--device", "cpu"])
    found = json.loads(output.read_text())
    assert (found["n_images"], found["n_texts"]) == (20, 100)
    assert found["sha256"] == hashlib.sha256((encoder_dir / "model.safetensors").read_bytes()).hexdigest()
    assert found["t2i_r1"] <= found["t2i_r5"] <= found["t2i_r10"] < 1


def test_encoder_with_wrong_shapes_is_refused(encoder_dir: Path, sample_world: Path, tmp_path: Path) -> None:
    folder = tmp_path / "old"
    shutil.copytree(encoder_dir, folder)
    state = load_file(folder / "model.safetensors")
    save_file(state | {"logit_scale": state["logit_scale"].squeeze()}, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError) as caught:
        retrieve.main([str(folder), "--data", str(sample_world / "retrieval" / "test.json")])
    assert str(folder) in str(caught.value) and "logit_scale" in str(caught.value)


def test_remote_shards(world: tuple[Path, dict[str, Any]], capsys: pytest.CaptureFixture[str]) -> None:
    """Rows of remote shards are not counted first, which would download them twice."""
    root, tree = world
    write_shards(root, "json", rows_of(tree, root))
    for number in range(2):
        with fsspec.open(f"memory://held_out/s{number}.tar", "wb") as stream:
            stream.write((root / f"s{number}.tar").read_bytes())
    found = run_shards(root, ["--data", "memory://held_out/s{0..1}.tar", "--caption_column", "texts"])
    assert (found["n_images"], found["n_texts"], found["data"]) == (3, 6, "memory://held_out/s{0..1}.tar")
    assert found["i2t_r1"] == pytest.approx(2 / 3) and "3/3" not in capsys.readouterr().err
