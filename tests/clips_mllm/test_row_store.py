"""Row store: supported formats, the cache and its keys, concurrent ranks, mixtures."""

from __future__ import annotations

import io
import json
import multiprocessing
import os
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
from PIL import Image

from clips_mllm.data import json_rows, row_store
from clips_mllm.data.dataset import Examples
from clips_mllm.data.json_rows import read_rows
from clips_mllm.data.llava_json import Example
from clips_mllm.data.mixture import mix
from clips_mllm.data.parallel import spread
from clips_mllm.data.recipe import InstructionRecipe, InstructionSource
from clips_mllm.data.row_checks import check_rows
from clips_mllm.data.row_store import RowStore
from tests.helpers.errors import raises_user_error


def row(number: int, image: Any = None) -> dict[str, Any]:
    shown = "<image>\n" if image is not None else ""
    talk = [{"from": "human", "value": f"{shown}Question {number}?"}, {"from": "gpt", "value": f"Answer {number}."}]
    return {"id": number, "conversations": talk} | ({} if image is None else {"image": image})


def png(color: str) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (8, 8), color).save(out, "PNG")
    return out.getvalue()


def store(file: Path, rows: list[Any], **values: Any) -> RowStore:
    file.write_text(json.dumps(rows))
    return RowStore(InstructionSource(file=str(file), **values))


def answers(examples: Any) -> list[str]:
    return [example.messages[-1]["content"][0]["text"] for example in examples]


# --- reading ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("block", [1, 7, 64, 1 << 20])
def test_json_read_in_blocks_equals_json(block: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A block can end within a number, an escape, a surrogate, or white space."""
    monkeypatch.setattr(json_rows, "BLOCK", block)
    rows = [row(1), {"a": [1.5, -2e3, None, True], "b": 'é\n"\\ 🦄 ]}'}, 12, "[", [], {}, row(2, "a.png")]
    for text in (json.dumps(rows), json.dumps(rows, indent=2), json.dumps(rows, ensure_ascii=False) + "\n\n"):
        (tmp_path / "a.json").write_text(text, encoding="utf-8")
        assert list(read_rows(tmp_path / "a.json")) == rows


def test_rows_before_an_error_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_rows, "BLOCK", 16)
    (tmp_path / "a.json").write_text('[\n{"a": 1},\n{"a": 2}\n{"a": 3}]')
    rows = read_rows(tmp_path / "a.json")
    assert [next(rows), next(rows)] == [{"a": 1}, {"a": 2}]
    with raises_user_error(file=tmp_path / "a.json", key="line 4"):
        next(rows)


FORMS = {
    "llava": lambda image: {
        "image": image,
        "conversations": [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "Red."}],
    },
    "messages": lambda image: {
        "images": [image],
        "messages": [{"role": "user", "content": "<image>\nWhat?"}, {"role": "assistant", "content": "Red."}],
    },
    "messages by LLaVA's name": lambda image: {
        "images": [image],
        "conversations": [{"role": "user", "content": "<image>\nWhat?"}, {"role": "assistant", "content": "Red."}],
    },
    "parts": lambda image: {
        "images": [image],
        "messages": [
            {"role": "user", "content": [{"type": "image", "text": None}, {"type": "text", "text": "What?"}]},
            {"role": "assistant", "content": [{"type": "text", "text": "Red."}]},
        ],
    },
    "parts with their images": lambda image: {
        "messages": [
            {"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": "What?"}]},
            {"role": "assistant", "content": [{"type": "text", "text": "Red."}]},
        ],
    },
    "parts without types": lambda image: {
        "messages": [
            {"role": "user", "content": [{"image": image}, {"text": "What?"}]},
            {"role": "assistant", "content": [{"text": "Red."}]},
        ],
    },
    "texts": lambda image: {"images": [image], "texts": [{"user": "What?", "assistant": "Red."}]},
}


@pytest.mark.parametrize("form", list(FORMS))
def test_every_format_gives_the_same_conversation(form: str, tmp_path: Path) -> None:
    """As JSON with a path, and as Parquet with the image as a struct in the row."""
    wanted = Example(
        [
            {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}]},
            {"role": "assistant", "content": [{"type": "text", "text": "Red."}]},
        ],
        ["a.png"],
    )
    (tmp_path / "a.png").write_bytes(png("red"))
    found = store(tmp_path / "rows.json", [FORMS[form]("a.png")])
    assert found.example(0) == wanted
    assert found.image(0, "a.png") == png("red")
    by_address = store(tmp_path / "address.json", [FORMS[form](f"file://{tmp_path}/a.png")])
    assert by_address.image(0, by_address.example(0).images[0]) == png("red")
    inside = [FORMS[form]({"bytes": png(color), "path": None}) for color in ("red", "blue")]
    datasets.Dataset.from_list(inside).to_parquet(str(tmp_path / "rows.parquet"))
    table = RowStore(InstructionSource(file=str(tmp_path / "rows.parquet")))
    assert table.example(1) == Example(wanted.messages, [0])
    assert table.image(1, 0) == png("blue")


def test_nested_images_of_a_table_are_neither_decoded_nor_copied(tmp_path: Path) -> None:
    """As `datasets` stores messages with images: an Image feature nested in a column."""
    part = {"type": datasets.Value("string"), "text": datasets.Value("string"), "image": datasets.Image()}
    messages = datasets.List({"role": datasets.Value("string"), "content": datasets.List(part)})
    rows = [FORMS["parts with their images"]({"bytes": png(color), "path": None}) for color in ("red", "blue")]
    for one in rows:
        for message in one["messages"]:
            message["content"] = [{"image": None, "text": None} | part for part in message["content"]]
    made = datasets.Dataset.from_list(rows, features=datasets.Features(messages=messages))
    made.save_to_disk(str(tmp_path / "rows"))
    table = RowStore(InstructionSource(file=str(tmp_path / "rows")))
    assert len(table) == 2 and table.image(1, 0) == png("blue")
    assert {file.name for file in (tmp_path / "rows").iterdir()} == {
        "data-00000-of-00001.arrow",
        "dataset_info.json",
        "state.json",
    }


@pytest.mark.parametrize("kind", ["folder", "saved", "parquet"])
def test_message_contents_of_mixed_types(kind: str, tmp_path: Path) -> None:
    """A system message as a string next to messages with parts: `datasets` stores such a column as JSON."""
    one = FORMS["parts with their images"]("a.png")
    one["messages"].insert(0, {"role": "system", "content": "Be brief."})
    (tmp_path / "a.png").write_bytes(png("red"))
    file = tmp_path / "set"
    file.mkdir()
    (file / "train.jsonl").write_text(json.dumps(one))
    if kind != "folder":
        table = datasets.load_dataset(str(file), split="train")
        file = tmp_path / f"made.{kind}"
        (table.save_to_disk if kind == "saved" else table.to_parquet)(str(file))
    found = RowStore(InstructionSource(file=str(file), images=str(tmp_path)))
    assert found.example(0) == store(tmp_path / "rows.json", [one]).example(0)
    assert found.example(0).images == ["a.png"]


@pytest.mark.parametrize("kind", ["image feature", "list of images", "bytes", "saved", "folder", "glob", "path"])
def test_tables_and_folders(kind: str, tmp_path: Path) -> None:
    """Hub data sets are opened by the same call as folders; images are not decoded."""
    rows = [row(number) for number in range(3)]
    for one in rows:
        one["conversations"][0]["value"] = "<image>" + one["conversations"][0]["value"]
    column: list[Any] = [png("red"), png("green"), png("blue")]
    features = None
    if kind in ("image feature", "saved", "folder", "glob"):
        column, features = [{"bytes": one, "path": None} for one in column], datasets.Image()
    elif kind == "list of images":
        column, features = [[{"bytes": one, "path": None}] for one in column], datasets.List(datasets.Image())
    elif kind == "path":
        column = ["a.png", "b.png", "c.png"]
        for name, content in zip(column, (png("red"), png("green"), png("blue")), strict=True):
            (tmp_path / name).write_bytes(content)
    table = datasets.Dataset.from_list([one | {"image": image} for one, image in zip(rows, column, strict=True)])
    table = table if features is None else table.cast_column("image", features)
    file = tmp_path / "rows.parquet"
    if kind == "saved":
        table.save_to_disk(str(tmp_path / "set"))
        file = tmp_path / "set"
    elif kind == "folder":
        (tmp_path / "set" / "data").mkdir(parents=True)
        table.to_parquet(str(tmp_path / "set" / "data" / "train-00000-of-00001.parquet"))
        file = tmp_path / "set"
    else:
        table.to_parquet(str(file))
        table.select([]).to_parquet(str(tmp_path / "none.parquet"))  # which the glob matches, too
    source = InstructionSource(file=str(tmp_path / "*.parquet" if kind == "glob" else file), images=str(tmp_path))
    found = RowStore(source)
    assert answers(map(found.example, range(3))) == ["Answer 0.", "Answer 1.", "Answer 2."]
    name = found.example(2).images[0]
    assert found.image(2, name) == png("blue")


@pytest.mark.parametrize(
    "name",
    [
        "gone.json",
        "gone.parquet",
        "gone*.parquet",
        "gone",
        "rows.txt",
        "bad.parquet",
        "empty",
        "part*.parquet",
        "none.parquet",
        "saved",
    ],
)
def test_unreadable_and_empty_sources_are_refused(name: str, tmp_path: Path) -> None:
    (tmp_path / "rows.txt").write_text("x")
    (tmp_path / "bad.parquet").write_bytes(b"PAR1")
    (tmp_path / "empty").mkdir()
    none = datasets.Dataset.from_dict({"conversations": []})
    none.to_parquet(str(tmp_path / "none.parquet"))
    none.save_to_disk(str(tmp_path / "saved"))
    for column in ("conversations", "questions"):
        datasets.Dataset.from_dict({column: ["a"]}).to_parquet(str(tmp_path / f"part_{column}.parquet"))
    with raises_user_error(file=tmp_path / name) as error:
        RowStore(InstructionSource(file=str(tmp_path / name)))
    assert "\n" not in str(error.value) and error.value.remedy


# --- the cache --------------------------------------------------------------------------------------------------------


def conversions(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    made: list[str] = []
    original = row_store._write
    monkeypatch.setattr(row_store, "_write", lambda *given: (made.append(str(given[2])), original(*given))[1])
    return made


def test_conversion_runs_once_and_again_if_the_file_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = conversions(monkeypatch)
    (tmp_path / "a.png").write_bytes(png("red"))
    rows = [row(0, "a.png"), row(1, "gone.png")]
    first = store(tmp_path / "rows.json", rows)
    assert (len(first), first.report.dropped) == (1, {"missing image": 1})
    again = RowStore(first.source)
    assert len(made) == 1
    assert again.report == first.report
    (tmp_path / "gone.png").write_bytes(png("blue"))  # a missing image was added, so the cache is stale
    assert len(RowStore(first.source)) == 2
    store(tmp_path / "rows.json", [*rows, row(2)])
    assert len(made) == 3
    assert first.example(0).images == ["a.png"], "an open store keeps the old file"
    RowStore(InstructionSource(file=first.source.file, images=str(tmp_path / "elsewhere")))
    assert len(made) == 4, "another image folder has other missing images"


def test_failed_conversion_leaves_no_files(tmp_path: Path) -> None:
    def folders() -> set[Path]:
        return {path for path in row_store.cache_folder().iterdir() if path.is_dir()}

    before = folders()
    (tmp_path / "rows.json").write_text(json.dumps([row(0)])[:-1])
    for _ in range(2):
        with raises_user_error(file=tmp_path / "rows.json", key="line 1"):
            RowStore(InstructionSource(file=str(tmp_path / "rows.json")))
    assert folders() == before


def _open_in_process(file: str, out: Any) -> None:
    opened = RowStore(InstructionSource(file=file))
    out.put((len(opened), answers([opened.example(len(opened) - 1)])[0], os.getpid()))


def test_concurrent_ranks_share_one_conversion(tmp_path: Path) -> None:
    (tmp_path / "rows.json").write_text(json.dumps([row(number) for number in range(3000)]))
    context = multiprocessing.get_context("fork")
    out = context.Queue()
    ranks = [context.Process(target=_open_in_process, args=(str(tmp_path / "rows.json"), out)) for _ in range(3)]
    for rank in ranks:
        rank.start()
    found = [out.get(timeout=60) for _ in ranks]
    for rank in ranks:
        rank.join()
    assert {one[:2] for one in found} == {(3000, "Answer 2999.")}
    assert len({one[2] for one in found}) == 3


def test_parallel_chunks_keep_their_order(tmp_path: Path) -> None:
    rows = [row(number, *([] if number % 3 else ["gone.png"])) for number in range(60)]
    chunks = [(tmp_path, begin, rows[begin : begin + 7]) for begin in range(0, 60, 7)]
    alone = list(map(check_rows, chunks))
    assert list(spread(check_rows, chunks, workers=2)) == alone
    numbers = [number for checked in alone for number in checked.number]
    assert numbers == [number for number in range(60) if number % 3]
    assert sum(checked.dropped["missing image"] for checked in alone) == 20


# --- mixtures ---------------------------------------------------------------------------------------------------------


def source(weight: float = 1.0, cap: int = 0) -> InstructionSource:
    return InstructionSource(file="x.json", weight=weight, cap=cap)


@pytest.mark.parametrize(
    ("weight", "cap", "counts"),
    [(1.0, 0, {1: 10}), (2.0, 0, {2: 10}), (0.5, 0, {0: 5, 1: 5}), (2.3, 0, {2: 7, 3: 3}), (2.0, 12, {1: 8, 2: 2})],
)
def test_weights_and_caps(weight: float, cap: int, counts: dict[int, int]) -> None:
    """Count how often the ten samples of a source appear in an epoch; another source is complete."""
    places = mix([source(), source(weight, cap)], [4, 10], seed=1)
    if places is None:
        assert weight == 1.0
        return
    assert places[:4].tolist() == [0, 1, 2, 3]
    often = np.bincount(places[4:] - 4, minlength=10)
    assert {n: int((often == n).sum()) for n in set(often.tolist())} == counts
    assert np.array_equal(places, mix([source(), source(weight, cap)], [4, 10], seed=1))  # type: ignore[arg-type]


def test_samples_of_a_fraction_depend_on_the_seed(tmp_path: Path) -> None:
    halves = {tuple(mix([source(0.5)], [100], seed=seed)) for seed in range(3)}  # type: ignore[arg-type]
    assert len(halves) == 3
    assert all(len(set(half)) == 50 and list(half) == sorted(half) for half in halves)


def test_mixture_reads_the_right_rows_and_lengths(tmp_path: Path) -> None:
    for name, count in (("a", 5), ("b", 8)):
        rows = [row(100 * (name == "b") + number) for number in range(count)]
        (tmp_path / f"{name}.json").write_text(json.dumps(rows))
    (tmp_path / "b.json").write_text(
        (tmp_path / "b.json").read_text().replace("Answer 103.", "A much longer answer 103.")
    )
    mixture = (
        InstructionSource(file=str(tmp_path / "a.json"), weight=2),
        InstructionSource(file=str(tmp_path / "b.json"), cap=4),
    )
    examples = Examples(InstructionRecipe(mixture=mixture, template="chatml"))
    texts = answers(examples)
    assert len(texts) == 14
    assert texts[:10] == [f"Answer {number}." for number in range(5)] * 2
    assert len(set(texts[10:])) == 4
    assert examples.lengths().tolist() == [-example.words for example in examples]


@pytest.mark.parametrize(
    ("values", "key"),
    [
        ({}, "data.file"),
        ({"file": "a.json", "mixture": (source(),)}, "data.file"),
        ({"images": "a", "mixture": (source(),)}, "data.images"),
        ({"mixture": (InstructionSource(file="a.json", split="val"),)}, "data.mixture[0].split"),
        ({"mixture": (source(), source(weight=0))}, "data.mixture[1].weight"),
        ({"mixture": (source(weight=float("nan")),)}, "data.mixture[0].weight"),
        ({"mixture": (source(cap=-1),)}, "data.mixture[0].cap"),
        ({"file": "a.json", "max_bad_fraction": 2}, "data.max_bad_fraction"),
        ({"file": "a.json", "max_length": 1}, "data.max_length"),
    ],
)
def test_invalid_recipes_are_refused(values: dict[str, Any], key: str) -> None:
    with raises_user_error(key=key):
        InstructionRecipe(template="chatml", **values).check()


def test_mixture_in_yaml(tmp_path: Path) -> None:
    from clips_mllm.training.recipe import TrainRecipe
    from vision_tower.common.recipe import dump_recipe, parse_recipe

    (tmp_path / "r.yaml").write_text(
        "output_dir: x\nmodel: {checkpoint: y}\ndata:\n  template: chatml\n  mixture:\n"
        "  - {file: a.json, images: i, weight: 0.5}\n  - {file: 'hf://datasets/o/n', split: val, cap: 9}\n"
    )
    recipe = parse_recipe(TrainRecipe, ["--config", str(tmp_path / "r.yaml")], command="train")
    wanted = (
        InstructionSource(file="a.json", images="i", weight=0.5),
        InstructionSource(file="hf://datasets/o/n", split="val", cap=9),
    )
    assert recipe.data.sources == wanted
    (tmp_path / "again.yaml").write_text(dump_recipe(recipe))
    assert parse_recipe(TrainRecipe, ["--config", str(tmp_path / "again.yaml")], command="train") == recipe
    (tmp_path / "r.yaml").write_text(
        "output_dir: x\nmodel: {checkpoint: y}\ndata: {template: chatml, mixture: [{fil: a}]}\n"
    )
    with raises_user_error(file=tmp_path / "r.yaml", key="data.mixture[0].fil"):
        parse_recipe(TrainRecipe, ["--config", str(tmp_path / "r.yaml")], command="train")
