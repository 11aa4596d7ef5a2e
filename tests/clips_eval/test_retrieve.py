"""`clips-mllm retrieve` on Karpathy JSON, CSV and shards, with an encoder that reads colours."""

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
from clips_eval.retrieval.scores import score
from tests.helpers import colour_encoder
from tests.helpers.colour_encoder import COLOURS, paint
from tests.helpers.shard_files import write_parquet, write_tar
from vision_tower.common.errors import UserError
from vision_tower.evaluation.embedding import EmbeddedPairs


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, dict[str, Any]]:
    """Three images with two captions each, one of them described wrongly, and one image of another split."""
    rows = []
    for number, colour in enumerate(COLOURS):
        paint(tmp_path / "val" / f"{colour}.png", colour)
        named = ["red", "red"] if colour == "blue" else [colour, colour]
        sentences = [{"raw": f"a {name} square"} for name in named]
        rows.append(
            {"filepath": "val", "filename": f"{colour}.png", "split": "test", "imgid": number, "sentences": sentences}
        )
    rows.append({"filepath": "val", "filename": "none.png", "split": "train", "imgid": 3, "sentences": []})
    colour_encoder.install(tmp_path / "encoder", monkeypatch)
    return tmp_path, {"images": rows, "dataset": "sample"}


def dump(path: Path, tree: Any) -> None:
    path.write_text(json.dumps(tree))


def run(root: Path, *options: str, data: str = "test.json") -> dict[str, Any]:
    retrieve.main([str(root / "encoder"), "--data", str(root / data), *options])
    return json.loads((root / "encoder" / "retrieval.json").read_text())


def test_retrieve(world: tuple[Path, dict[str, Any]], capsys: pytest.CaptureFixture[str]) -> None:
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
    shown = capsys.readouterr().out
    assert "66.7%" in shown and "names" not in shown
    report.main([str(root)])  # what it writes, `report` reads
    assert "### Beyond recall" in (root / "report.md").read_text()
    assert json.loads((root / "report.json").read_text())["encoder"]["retrieval"]["t2i_r1"] == found["t2i_r1"]


def test_names_that_no_caption_contains_are_told_of(
    world: tuple[Path, dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    root, tree = world
    dump(root / "test.json", tree)
    (root / "names.txt").write_text("cat\nred\ndog\nsquare\nbus\nhat\ncup\nmoon\n")
    found = run(root, "--objects", str(root / "names.txt"))
    assert [row["object"] for row in found["by_object"]] == ["red", "square"]
    told = "names.txt: 6 of its 8 names are in no caption and have no row (cat, dog, bus, hat, cup, ...)"
    assert told in capsys.readouterr().out
    (root / "names.txt").write_text("red\n")
    run(root, "--objects", str(root / "names.txt"))
    assert "in no caption" not in capsys.readouterr().out


def test_the_data_digest_covers_images_and_captions(world: tuple[Path, dict[str, Any]]) -> None:
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


def test_another_split(world: tuple[Path, dict[str, Any]]) -> None:
    root, tree = world
    tree["images"][1]["split"] = "val"
    dump(root / "test.json", tree)
    found = run(root, "--split", "val")
    assert (found["split"], found["n_images"], found["n_texts"], found["t2i_r1"]) == ("val", 1, 2, 1.0)


def write_csv(file: Path, rows: list[tuple[str, ...]], separator: str = ",") -> None:
    with file.open("w", newline="", encoding="utf-8") as stream:
        csv.writer(stream, delimiter=separator).writerows(rows)


def test_csv_equals_the_karpathy_json(world: tuple[Path, dict[str, Any]]) -> None:
    """Rows of one image need not be neighbours; columns and separator are the user's, captions may hold both."""
    root, tree = world
    dump(root / "test.json", tree)
    wanted = run(root)
    rows = [
        (f"val/{row['filename']}", sentence["raw"] + ',\t"quoted"\nsecond line')
        for place in range(2)
        for row in tree["images"][:3]
        for sentence in [row["sentences"][place]]
    ]
    write_csv(root / "a.csv", [("image", "caption"), *rows])
    write_csv(root / "b.tsv", [("title", "other", "filepath"), *((text, "x", file) for file, text in rows)], "\t")
    other = ("--separator", "\t", "--image_column", "filepath", "--caption_column", "title")
    for data, options in (("a.csv", ()), ("b.tsv", other)):
        found = run(root, "--format", "csv", *options, data=data)
        for key in ("i2t_r1", "i2t_r5", "t2i_r1", "t2i_r5", "n_images", "n_texts"):
            assert found[key] == wanted[key]
        assert found["split"] is None
    assert found["examples"]["text_to_image"][0]["query"] == 'a red square,\t"quoted"\nsecond line'


def rows_of(tree: dict[str, Any], root: Path) -> list[tuple[str, bytes, list[str]]]:
    """Key, image and captions of the test split."""
    rows = [row for row in tree["images"] if row["split"] == "test"]
    names = [f"val/{row['filename']}" for row in rows]
    texts = [[sentence["raw"] for sentence in row["sentences"]] for row in rows]
    return [(name.split(".")[0], (root / name).read_bytes(), said) for name, said in zip(names, texts, strict=True)]


def write_shards(root: Path, kind: str, rows: list[tuple[str, bytes, list[str]]]) -> list[str]:
    """Two shards of one kind; the options that read them."""
    for number, part in enumerate((rows[:2], rows[2:])):
        match kind:
            case "json":
                members = [
                    member
                    for key, content, texts in part
                    for member in ((f"{key}.png", content), (f"{key}.json", json.dumps({"said": texts}).encode()))
                ]
                write_tar(root / f"s{number}.tar", members)
            case "txt":
                lines = [(f"{key}.txt", ("\n".join(texts) + "\n").encode()) for key, _, texts in part]
                images = [(f"{key}.pic", content) for key, content, _ in part]
                write_tar(root / f"s{number}.tar", [each for pair in zip(lines, images, strict=True) for each in pair])
            case "parquet":
                images = [{"bytes": content, "path": None} for _, content, _ in part]
                columns = {"photo": images, "said": [texts for _, _, texts in part], "other": [1] * len(part)}
                write_parquet(root / f"s{number}.parquet", columns)
    return {
        "json": ["--data", str(root / "s{0..1}.tar"), "--caption_column", "said"],
        "txt": ["--data", str(root / "s*.tar"), "--image_column", "pic", "--caption_column", "txt"],
        "parquet": ["--data", str(root / "*.parquet"), "--image_column", "photo", "--caption_column", "said"],
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
    wanted = run(root)
    options = write_shards(root, kind, rows_of(tree, root))
    capsys.readouterr()
    found = run_shards(root, options)
    for key in ("i2t_r1", "i2t_r5", "t2i_r1", "t2i_r5", "n_images", "n_texts", "n_skipped", "data_sha256"):
        assert found[key] == wanted[key]
    assert found["examples"]["image_to_text"][0]["query"].startswith(f"{root}/s0.")
    assert "3/3" in capsys.readouterr().err  # the total is known, and so is the time left


def test_rows_that_are_no_pair_are_left_out_and_counted(
    world: tuple[Path, dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    root, tree = world
    good = rows_of(tree, root)[:2]
    options = write_shards(root, "json", good)
    bad = [
        *[("a.png", good[0][1]), ("a.json", b'{"said": []}')],
        *[("b.png", good[0][1]), ("b.json", b'{"other": "text"}')],
        *[("c.png", good[0][1]), ("c.json", b"{")],
        ("d.json", b'{"said": "no image"}'),
        *[("e.png", good[0][1][:40]), ("e.json", b'{"said": "half an image"}')],
        *[("f.png", good[0][1]), ("f.json", b'{"said": null}')],
    ]
    write_tar(root / "s1.tar", bad)
    found = run_shards(root, [*options, "--max_bad_fraction", "0.8"])
    assert (found["n_images"], found["n_texts"], found["n_skipped"], found["t2i_r1"]) == (2, 4, 6, 1.0)
    assert capsys.readouterr().err.count("skipped: ") == 1
    with pytest.raises(UserError, match=r"6 of 8 images cannot be used \(first: .*s1\.tar: a: no caption\)"):
        run_shards(root, options)


def cut(root: Path) -> None:
    (root / "s1.tar").write_bytes((root / "s1.tar").read_bytes()[:700])


@pytest.mark.parametrize(
    ("damage", "options", "words"),
    [
        (cut, [], ["s1.tar", "broken shard", "fetch the shard again"]),
        (lambda root: (root / "s1.tar").unlink(), [], ["s1.tar", "no such shard"]),
        (lambda root: None, ["--caption_column", "title"], ["s0.tar: val/red", "no 'title'", "--caption_column"]),
        (lambda root: None, ["--image_column", "pic", "--data", "{root}/none*.tar"], ["none*.tar", "no shard"]),
    ],
)
def test_bad_shards_are_named(
    world: tuple[Path, dict[str, Any]], damage: Any, options: list[str], words: list[str]
) -> None:
    root, tree = world
    given = write_shards(root, "json", rows_of(tree, root))
    damage(root)
    with pytest.raises(UserError) as caught:
        run_shards(root, [*given, *(word.format(root=root) for word in options)])
    assert all(word in str(caught.value) for word in words) and "\n" not in str(caught.value)
    assert not (root / "encoder" / "retrieval.json").exists()


def test_unreadable_images_are_left_out_counted_and_told(
    world: tuple[Path, dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    """With its captions: they would have no image to find."""
    root, tree = world
    (root / "val" / "blue.png").write_bytes(b"no image")
    dump(root / "test.json", tree)
    found = run(root, "--max_bad_fraction", "0.4", "--batch_size", "1")
    assert (found["n_images"], found["n_texts"], found["n_skipped"]) == (2, 4, 1)
    assert (found["i2t_r1"], found["t2i_r1"]) == (1.0, 1.0)  # the blue one was the wrong one
    shown = capsys.readouterr()
    assert "1 unreadable images left out" in shown.out
    assert shown.err.count("skipped: ") == 1 and "blue.png" in shown.err


def test_retrieve_refuses_a_diverged_encoder(tmp_path: Path) -> None:
    """NaN loses no comparison, so it would be reported as a perfect recall."""
    images = torch.full((1, 3), torch.nan)
    found = EmbeddedPairs(
        images=images, texts=torch.ones(1, 3), owner=torch.zeros(1).long(), names=["i"], captions=[""]
    )
    with pytest.raises(UserError, match="NaN"):
        score(tmp_path, found)


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
    ("damage", "words"),
    [
        (lambda root, tree: None, ["test.json", "no such file"]),
        (break_json, ["test.json", "not valid JSON"]),
        (break_split, ["split 'test'", "train", "--split"]),
        (break_caption, ["images[1].sentences[1]", "raw"]),
        (break_missing_image, ["green.png", "images[1]", "--images"]),
        (break_corrupt_image, ["test.json", "1 of 3 images", "green.png", "0.01"]),
        (break_every_image, ["test.json", "3 of 3 images"]),
        (break_encoder, ["encoder", "model.safetensors"]),
    ],
)
def test_retrieve_names_what_is_wrong(world: tuple[Path, dict[str, Any]], damage: Any, words: list[str]) -> None:
    root, tree = world
    damage(root, tree)
    with pytest.raises(UserError) as caught:
        run(root)
    assert all(word in str(caught.value) for word in words) and "\n" not in str(caught.value)
    assert not (root / "encoder" / "retrieval.json").exists()


@pytest.mark.parametrize(
    ("text", "options", "words"),
    [
        (None, [], ["data.csv", "no such file"]),
        ("", [], ["data.csv", "no column 'image'", "the file is empty"]),
        ("image,caption\n", [], ["data.csv", "no rows"]),
        ("file,caption\nval/red.png,red\n", [], ["no column 'image'", "'file', 'caption'", "--image_column"]),
        ("image,text\nval/red.png,red\n", [], ["no column 'caption'", "--caption_column"]),
        ("image\tcaption\nval/red.png\tred\n", [], ["no column 'image'", "--separator"]),
        ("image,caption\nval/red.png,red, round\n", [], ["line 2", "other fields", "quote"]),
        ("image,caption\nval/red.png\n", [], ["line 2", "other fields"]),
        ("image,caption\nval/red.png,red\nval/green.png, \n", [], ["line 3", "'caption' is empty"]),
        ("image,caption\nval/red.png,red\nval/grey.png,grey\n", [], ["grey.png", "line 3", "--images"]),
        ('image,caption\nval/red.png,"red\n', [], ["data.csv", "after line 1", "not CSV"]),
        (b"image,caption\nval/red.png,\xff\n", [], ["data.csv", "not UTF-8"]),
        ("image,caption\nval/red.png,red\n", ["--separator", ";;"], ["--separator ';;'", "one character"]),
        ("image,caption\nval/red.png,red\n", ["--max_bad_fraction", "1"], ["--max_bad_fraction 1", "share"]),
    ],
)
def test_a_bad_csv_is_named(
    world: tuple[Path, dict[str, Any]], text: str | bytes | None, options: list[str], words: list[str]
) -> None:
    root, _ = world
    if text is not None:
        (root / "data.csv").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UserError) as caught:
        run(root, "--format", "csv", *options, data="data.csv")
    assert all(word in str(caught.value) for word in words) and "\n" not in str(caught.value)


def test_with_a_saved_encoder_on_the_sample_world(encoder_dir: Path, sample_world: Path, tmp_path: Path) -> None:
    output = tmp_path / "scores.json"
    data = sample_world / "retrieval" / "test.json"
    retrieve.main([str(encoder_dir), "--data", str(data), "--output", str(output), "--device", "cpu"])
    found = json.loads(output.read_text())
    assert (found["n_images"], found["n_texts"]) == (20, 100)
    assert found["sha256"] == hashlib.sha256((encoder_dir / "model.safetensors").read_bytes()).hexdigest()
    assert found["t2i_r1"] <= found["t2i_r5"] <= found["t2i_r10"] < 1


def test_an_encoder_with_other_shapes_is_refused_in_one_line(
    encoder_dir: Path, sample_world: Path, tmp_path: Path
) -> None:
    """Such as one of an older version, whose temperature had no shape."""
    folder = tmp_path / "old"
    shutil.copytree(encoder_dir, folder)
    state = load_file(folder / "model.safetensors")
    save_file(state | {"logit_scale": state["logit_scale"].squeeze()}, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=r"1 mismatched key .*logit_scale") as caught:
        retrieve.main([str(folder), "--data", str(sample_world / "retrieval" / "test.json")])
    assert str(folder) in str(caught.value) and "\n" not in str(caught.value)


def test_a_remote_shard(world: tuple[Path, dict[str, Any]], capsys: pytest.CaptureFixture[str]) -> None:
    """Behind a URL the rows are not counted first, which would fetch them twice."""
    root, tree = world
    write_shards(root, "json", rows_of(tree, root))
    for number in range(2):
        with fsspec.open(f"memory://held_out/s{number}.tar", "wb") as stream:
            stream.write((root / f"s{number}.tar").read_bytes())
    found = run_shards(root, ["--data", "memory://held_out/s{0..1}.tar", "--caption_column", "said"])
    assert (found["n_images"], found["n_texts"], found["data"]) == (3, 6, "memory://held_out/s{0..1}.tar")
    assert found["i2t_r1"] == pytest.approx(2 / 3) and "3/3" not in capsys.readouterr().err
