"""The doctor on every edge case of real sets, clean copies, pretraining shards, preview, the check before step 1."""

from __future__ import annotations

import io
import json
import re
import tarfile
from pathlib import Path
from typing import Any

import datasets
import pytest
from PIL import Image
from transformers import AutoProcessor

from clips_mllm import doctor, preview
from clips_mllm.checks.display import show_batch
from clips_mllm.checks.sample_check import check_sample
from clips_mllm.data.dataset import InstructionCollator, InstructionDataset
from clips_mllm.data.recipe import InstructionRecipe, InstructionSource
from clips_mllm.data.row_store import RowStore
from clips_mllm.model.checkpoint import Mllm
from clips_mllm.prompts.render import load_template
from tests.helpers.conversations import open_rows, turns
from vision_tower.common.errors import UserError


def encoded(kind: str, color: str = "red") -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (40, 30), color).save(out, kind)
    return out.getvalue()


SEEN = "<image>\nWhat?"
# name: (row, what becomes of it: "kept", "mended: ..." or "dropped: ...")
CASES: dict[str, tuple[dict[str, Any], str]] = {
    "text only": ({"conversations": turns("2 plus 2?", "Four.")}, "kept"),
    "begins with gpt": ({"conversations": turns("Hi!", "2?", "2.", first="gpt")}, "mended: opening answer dropped"),
    "same id as another": ({"id": "text only", "conversations": turns("3?", "3.")}, "kept"),
    "empty answer": ({"conversations": turns("Why?", " \n")}, "dropped: empty answer"),
    "one empty of two": ({"conversations": turns("Why?", "So.", "Why?", "")}, "dropped: empty answer"),
    "no answer": ({"conversations": turns("Why?")}, "dropped: no answer"),
    "missing": ({"image": "gone.png", "conversations": turns(SEEN, "Cat.")}, "dropped: missing image"),
    "renamed": ({"image": "a.jpg", "conversations": turns(SEEN, "A.")}, "mended: image under another ending"),
    "gif": ({"image": "g.gif", "conversations": turns(SEEN, "G.")}, "mended: GIF, of which the first frame is taken"),
    "gif named jpg": ({"image": "h.jpg", "conversations": turns(SEEN, "H.")}, "mended: GIF, of which the first frame"),
    "html": ({"image": "html.png", "conversations": turns(SEEN, "X.")}, "dropped: corrupt image"),
    "cut jpeg": ({"image": "cut.jpg", "conversations": turns(SEEN, "X.")}, "dropped: corrupt image"),
    "empty file": ({"image": "empty.png", "conversations": turns(SEEN, "X.")}, "dropped: corrupt image"),
    "far too long": ({"conversations": turns("Go on.", "on " * 400, "And?", "No.")}, "kept"),
    "long question": ({"conversations": turns("on " * 400, "No.")}, "dropped: nothing to learn"),
    "late image": (
        {"image": "a.png", "conversations": turns("Go on.", "on " * 400, SEEN, "No.")},
        "dropped: nothing to learn",
    ),
    "image in the middle": (
        {"image": "a.png", "conversations": turns("In <image>, what?", "A.")},
        "mended: placeholder moved to the front",
    ),
    "image at the end": (
        {"image": "a.png", "conversations": turns("What?\n<image>", "A.")},
        "mended: placeholder moved to the front",
    ),
    "image in a later turn": ({"image": "a.png", "conversations": turns("Hi", "Hi.", SEEN, "A.")}, "kept"),
    "image in an answer": (
        {"image": "a.png", "conversations": turns(SEEN, "<image>")},
        "dropped: <image> outside a question",
    ),
    "image key alone": (
        {"image": "a.png", "conversations": turns("What?", "A.")},
        "dropped: 0 <image> for 1 images",
    ),
    "two placeholders, one file": (
        {"image": "a.png", "conversations": turns("<image><image> Same?", "No.")},
        "dropped: 2 <image> for 1 images",
    ),
    "two images": ({"image": ["a.png", "b.png"], "conversations": turns("<image><image> Same?", "No.")}, "kept"),
    "null image": ({"image": None, "conversations": turns("2?", "2.")}, "kept"),
    "unknown speaker": (
        {"conversations": [{"from": "robot", "value": "x"}]},
        "dropped: a turn without 'from' (human, gpt, system) and 'value', or 'role' and 'content'",
    ),
    "nothing": ({}, "dropped: no 'conversations'"),
}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All edge cases in one file, with their images."""
    folder = tmp_path_factory.mktemp("cases")
    for name in ("a", "b"):
        (folder / f"{name}.png").write_bytes(encoded("PNG"))
    (folder / "g.gif").write_bytes(encoded("GIF"))
    (folder / "h.jpg").write_bytes(encoded("GIF"))
    (folder / "html.png").write_bytes(b"<html>404</html>")
    (folder / "cut.jpg").write_bytes(encoded("JPEG")[:-200])
    (folder / "empty.png").write_bytes(b"")
    rows = [{"id": name} | row for name, (row, _) in CASES.items()]
    (folder / "rows.json").write_text(json.dumps(rows))
    return folder


def examine(file: Path, folder: Path, *words: str, code: int = 0) -> dict[str, Any]:
    doctor.main([str(file), "--output", str(folder / "doctor.json"), *words])
    return json.loads((folder / "doctor.json").read_text())


@pytest.fixture(scope="module")
def found(world: Path, mllm_dir: Path) -> dict[str, Any]:
    words = ["--model", str(mllm_dir), "--max_length", "120", "--fix", str(world / "clean.json")]
    return examine(world / "rows.json", world, *words)


@pytest.mark.parametrize("name", list(CASES))
def test_every_edge_case_is_kept_mended_or_dropped_and_told(name: str, found: dict[str, Any], world: Path) -> None:
    kind, _, cause = CASES[name][1].partition(": ")
    number = list(CASES).index(name)
    dropped = {example["row"]: why for why, about in found["dropped"].items() for example in about["examples"]}
    if kind == "dropped":
        assert dropped[number] == cause
    else:
        assert number not in dropped
        assert not cause or any(mended.startswith(cause) for mended in found["mended"])


def test_the_counts(found: dict[str, Any], mllm_dir: Path, world: Path) -> None:
    dropped = sum(told.startswith("dropped") for _, told in CASES.values())
    assert found["rows"] == len(CASES)
    assert found["usable"] == len(CASES) - dropped
    assert sum(about["rows"] for about in found["dropped"].values()) == dropped
    assert found["repeated_ids"] == 1
    assert found["over_long"] == 1
    assert found["mended"]["GIF, of which the first frame is taken"] == 2
    assert found["mended"]["placeholder moved to the front"] == 2
    assert found["tokens"]["max"] > 400
    assert found["learnt"]["max"] < 120
    corrupt = {example["id"]: example["detail"] for example in found["dropped"]["corrupt image"]["examples"]}
    assert set(corrupt) == {"html", "cut jpeg", "empty file"}
    assert all(str(world) in detail for detail in corrupt.values())
    # What the doctor says of tokens is what training does.
    recipe = InstructionRecipe(file=str(world / "rows.json"), template="chatml", max_length=120, max_bad_fraction=1.0)
    opened = InstructionDataset(recipe, AutoProcessor.from_pretrained(mllm_dir))
    _, rendered = opened.load(0)
    assert rendered.whole <= found["tokens"]["max"]
    assert opened.dropped == {
        cause: about["rows"]
        for cause, about in found["dropped"].items()
        if cause not in ("corrupt image", "nothing to learn")
    }


def test_the_clean_copy_has_nothing_to_drop(found: dict[str, Any], world: Path, mllm_dir: Path) -> None:
    rows = json.loads((world / "clean.json").read_text())
    kept = [name for name, (_, told) in CASES.items() if not told.startswith("dropped")]
    assert len(rows) == len(kept)
    words = ["--images", str(world), "--model", str(mllm_dir), "--max_length", "120"]
    again = examine(world / "clean.json", world, *words)
    assert again["usable"] == again["rows"] == len(kept)
    by_id = {row["id"]: row for row in rows}
    assert by_id["renamed"]["image"] == "a.png"
    assert by_id["begins with gpt"]["conversations"] == turns("2?", "2.")
    assert "opening answer dropped" not in again["mended"]
    assert by_id["two images"] == {"id": "two images"} | CASES["two images"][0], "a good row stays as it was"
    assert again["tokens"]["total"] == found["tokens"]["total"]


def test_processes_find_the_same(world: Path, found: dict[str, Any], tmp_path: Path) -> None:
    """Two chunks over two processes, JSONL, without a tokenizer."""
    rows = [{"id": name} | row for name, (row, _) in CASES.items()] * 12
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    words = ["--images", str(world), "--fix", str(tmp_path / "clean.jsonl"), "--workers", "2"]
    told = examine(tmp_path / "rows.jsonl", tmp_path, *words)
    assert told["rows"] == 12 * len(CASES)
    wanted = {cause: 12 * about["rows"] for cause, about in found["dropped"].items() if cause != "nothing to learn"}
    assert {cause: about["rows"] for cause, about in told["dropped"].items()} == wanted
    assert all(len(about["examples"]) <= 20 for about in told["dropped"].values())
    assert "tokens" not in told
    assert len((tmp_path / "clean.jsonl").read_text().splitlines()) == told["usable"]


def test_messages_are_mended_in_the_copy(tmp_path: Path) -> None:
    """Under either name, as JSON text too; a renamed image where the row has it, or a part of a message."""
    (tmp_path / "a.png").write_bytes(encoded("PNG"))
    asked = {"role": "user", "content": [{"type": "text", "text": "What?"}]}
    answer = {"role": "assistant", "content": [{"type": "text", "text": "Red."}]}
    system = {"role": "system", "content": "Be brief."}

    def seen(name: str) -> dict[str, Any]:
        return {"role": "user", "content": [{"type": "image", "image": name}, {"type": "text", "text": "What?"}]}

    rows = [
        {"messages": [answer, asked, answer]},
        {"conversations": [system, answer, asked, answer]},
        {"messages": [seen("a.jpg"), answer]},
        {"messages": [seen("b.jpg"), answer]},
        {"conversations": [answer, asked, answer], "messages": [answer, {"role": "tool"}, seen("b.jpg")]},
        {"messages": json.dumps([answer, asked, answer])},
        {"messages": json.dumps([seen("a.jpg"), answer])},
        {"messages": json.dumps([asked, answer])},
    ]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    told = examine(tmp_path / "rows.json", tmp_path, "--fix", str(tmp_path / "clean.json"))
    assert {cause: about["rows"] for cause, about in told["dropped"].items()} == {"missing image": 1}
    assert json.loads((tmp_path / "clean.json").read_text()) == [
        {"messages": [asked, answer]},
        {"conversations": [system, asked, answer]},
        {"messages": [seen("a.png"), answer]},
        {"conversations": [asked, answer], "messages": [answer, {"role": "tool"}, seen("b.jpg")]},  # not read
        {"messages": [asked, answer]},
        {"messages": [seen("a.png"), answer]},
        {"messages": json.dumps([asked, answer])},
    ]


def test_parquet_with_images_inside(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    images = [encoded("PNG"), b"no image", encoded("JPEG")]
    table = datasets.Dataset.from_list(
        [
            {"id": str(at), "image": {"bytes": content, "path": None}, "conversations": turns(SEEN, f"{at}.")}
            for at, content in enumerate(images)
        ]
    )
    table.to_parquet(str(tmp_path / "rows.parquet"))
    told = examine(tmp_path / "rows.parquet", tmp_path, "--fix", str(tmp_path / "clean.parquet"))
    assert {cause: about["rows"] for cause, about in told["dropped"].items()} == {"corrupt image": 1}
    said = capsys.readouterr().out
    assert re.search(r"^rows +3$", said, re.M)
    assert re.search(r"^  dropped: corrupt image +1  row 1 image 0", said, re.M)
    store = RowStore(InstructionSource(file=str(tmp_path / "clean.parquet")))
    assert [store.image(at, 0) for at in range(2)] == [images[0], images[2]]


def write_tar(file: Path, members: dict[str, bytes]) -> None:
    with tarfile.open(file, "w") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


def test_pretraining_shards(tmp_path: Path) -> None:
    text = json.dumps({"web_caption": "a cat", "synthetic_caption": "A cat sits."}).encode()
    good = {"a.jpg": encoded("JPEG"), "a.json": text}
    write_tar(tmp_path / "0.tar", good | {"b.jpg": b"x", "b.json": text, "c.jpg": encoded("PNG"), "c.json": b"{"})
    empty = json.dumps({"web_caption": "", "synthetic_caption": ""}).encode()
    write_tar(tmp_path / "1.tar", {"d.json": text, "e.png": encoded("PNG"), "e.json": empty} | good)
    (tmp_path / "2.tar").write_bytes((tmp_path / "0.tar").read_bytes()[:700])
    told = examine(tmp_path / "{0..2}.tar", tmp_path, "--fix", str(tmp_path / "clean"), "--workers", "1")
    assert {cause: about["rows"] for cause, about in told["dropped"].items()} == {
        "corrupt image": 1,
        "malformed json": 1,
        "no image": 1,
        "no caption": 1,
        "broken shard": 1,
    }
    assert told["dropped"]["corrupt image"]["examples"][0]["shard"] == str(tmp_path / "0.tar")
    again = examine(tmp_path / "clean" / "*.tar", tmp_path, "--workers", "1")
    assert again["rows"] == again["usable"] == 2


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["gone.json"], "gone.json: no such file"),
        (["rows.json", "--fix", "rows.json"], "that is the file itself"),
        (["rows.json", "--fix", "clean.parquet"], r"write \.json or \.jsonl"),
        (["rows.json", "--template", "chatml"], "give --model too"),
        (["rows.json", "--workers", "-1"], "--workers -1"),
        (["gone.tar"], "no such shard"),
    ],
)
def test_what_the_doctor_refuses(
    words: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("rows.json").write_text(json.dumps([CASES["text only"][0]]))
    with pytest.raises(UserError, match=message):
        doctor.main(words)
    assert not Path("doctor.json").exists()


# --- preview ----------------------------------------------------------------------------------------------------------


def test_preview_marks_what_is_learnt(
    world: Path, mllm_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [str(world / "rows.json"), "--model", str(mllm_dir), "--count", "4"]
    preview.main(words)
    said = capsys.readouterr().out
    assert said.count("--- row ") == 4
    assert "<|im_start|>user\n2 plus 2?<|im_end|>\n<|im_start|>assistant\n⟦Four.<|im_end|>⟧\n" in said
    preview.main([*words[:-1], "40", "--output", str(tmp_path / "p.html")])
    page = (tmp_path / "p.html").read_text()
    assert "<mark>Four.&lt;|im_end|&gt;</mark>" in page
    assert page.count("<img ") == page.count("src='data:image/jpeg;base64,") >= 8
    assert not re.search(r"(?:src|href)='(?!data:)|https?://", page), "no other file is needed"
    assert "not an image" in page
    assert "&lt;image x9&gt;" in page


def test_preview_of_a_bare_llm(world: Path, sample_world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The LLM's own template and LLaVA-1.5's number of positions, where no checkpoint says otherwise."""
    preview.main([str(world / "rows.json"), "--model", str(sample_world / "llm"), "--count", "40"])
    assert "<image x576>" in capsys.readouterr().out


# --- before step 1 ----------------------------------------------------------------------------------------------------


def test_a_sample_is_checked(world: Path, mllm: Mllm, tmp_path: Path) -> None:
    good, bad = CASES["image in a later turn"][0], CASES["html"][0]
    dataset = open_rows(
        tmp_path, [*[good] * 30, bad, CASES["far too long"][0]], mllm, images=str(world), max_length=100
    )
    check = check_sample(dataset, 64)
    assert (check.seen, check.causes, check.cut) == (32, {"unreadable image": 1}, 1)
    assert "row 30: corrupt image" in check.first
    assert "32 samples looked at" in check.line() and "1 unusable (1 x unreadable image)" in check.line()
    assert (dataset.seen.value, dataset.corrupt.value) == (0, 0), "the run's own counts are untouched"
    few = check_sample(dataset, 4)
    assert few.seen == 4 and not few.causes
    with pytest.raises(UserError, match=r"3 of 5 samples looked at cannot be used .*row 2: corrupt.*data doctor"):
        check_sample(open_rows(tmp_path, [good, good, bad, bad, bad], mllm, images=str(world)))


@pytest.mark.parametrize("packing", ["none", "rows"])
def test_a_batch_is_shown(packing: Any, world: Path, mllm: Mllm, tmp_path: Path) -> None:
    dataset = open_rows(tmp_path, [CASES["image in a later turn"][0], CASES["text only"][0]], mllm, images=str(world))
    batch = InstructionCollator(mllm.processor, packing)([dataset[0], dataset[1]])
    shown = show_batch(batch, mllm.processor, color=False)
    assert "⟦A.<|im_end|>⟧" in shown and "⟦Four.<|im_end|>⟧" in shown
    assert "<image x9>" in shown and "<|endoftext|>" not in shown if packing == "none" else True
    assert "\x1b[32mFour.<|im_end|>\x1b[0m" in show_batch(batch, mllm.processor)
    assert load_template("chatml") == dataset.template


HALF = {"conversations": [{"from": "human", "value": "a \ud83d"}, {"from": "gpt", "value": "b"}]}
LONG = {
    "image": "A" * 300,
    "conversations": [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": "b"}],
}


NAMELESS = LONG | {"image": "."}


@pytest.mark.parametrize(
    ("row", "cause"),
    [(HALF, "half a character"), (LONG, "too long for a path"), (NAMELESS, "missing image")],
)
def test_rows_that_no_file_system_or_tokenizer_takes(row: dict[str, Any], cause: str, tmp_path: Path) -> None:
    """Both are what JSON can hold; in training as for the doctor they are rows to drop, and not the end."""
    from clips_mllm.checks.rows import check_chunk
    from clips_mllm.data.row_checks import check_rows

    good = {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}
    checked = check_rows((tmp_path, 0, [row, good]))
    assert checked.number == [1] and len(checked.dropped) == 1 and cause in next(iter(checked.dropped))
    found = check_chunk((tmp_path, 0, [row, good]))
    assert cause in str(found[0].cause) and not found[1].cause


def test_half_a_character_in_an_id(tmp_path: Path) -> None:
    """Of a good row and of a bad one: neither report nor copy can hold it."""
    talk = [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]
    rows = [{"id": "x\ud83d", "conversations": talk}, {"id": "y\ud83d", "conversations": []}]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    out, copy = tmp_path / "doctor.json", tmp_path / "copy.json"
    doctor.main([str(tmp_path / "rows.json"), "--output", str(out), "--fix", str(copy)])
    assert "y?" in out.read_text(encoding="utf-8")
    assert json.loads(copy.read_text(encoding="utf-8")) == [rows[0] | {"id": "x?"}]


def test_copies_of_the_same_name_are_refused() -> None:
    from clips_mllm.checks.fix import refuse_same_names

    refuse_same_names(["/a/00000.tar", "/a/00001.tar"])
    with pytest.raises(UserError, match=r"/a/00000.tar and /b/00000.tar have the same name"):
        refuse_same_names(["/a/00000.tar", "/b/00000.tar"])
