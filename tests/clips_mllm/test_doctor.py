"""`data doctor` on every edge case of real data, clean copies, shards; `data preview`; the check before step 1."""

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
from clips_mllm.data.collator import InstructionCollator
from clips_mllm.data.dataset import InstructionDataset
from clips_mllm.data.recipe import InstructionRecipe, InstructionSource
from clips_mllm.data.row_store import RowStore
from clips_mllm.model.checkpoint import Mllm
from clips_mllm.prompts.render import load_template
from tests.helpers.conversations import open_rows, turns
from tests.helpers.errors import raises_user_error


def encoded(kind: str, color: str = "red") -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (40, 30), color).save(out, kind)
    return out.getvalue()


QUESTION = "<image>\nWhat?"
# name: (row, expected result: "kept", "fixed: ..." or "dropped: ...")
CASES: dict[str, tuple[dict[str, Any], str]] = {
    "text only": ({"conversations": turns("2 plus 2?", "Four.")}, "kept"),
    "begins with gpt": ({"conversations": turns("Hi!", "2?", "2.", first="gpt")}, "fixed: opening answer dropped"),
    "same id as another": ({"id": "text only", "conversations": turns("3?", "3.")}, "kept"),
    "empty answer": ({"conversations": turns("Why?", " \n")}, "dropped: empty answer"),
    "one empty of two": ({"conversations": turns("Why?", "So.", "Why?", "")}, "dropped: empty answer"),
    "no answer": ({"conversations": turns("Why?")}, "dropped: no answer"),
    "missing": ({"image": "gone.png", "conversations": turns(QUESTION, "Cat.")}, "dropped: missing image"),
    "renamed": ({"image": "a.jpg", "conversations": turns(QUESTION, "A.")}, "fixed: image under another suffix"),
    "gif": ({"image": "g.gif", "conversations": turns(QUESTION, "G.")}, "fixed: GIF, only the first frame is used"),
    "gif named jpg": (
        {"image": "h.jpg", "conversations": turns(QUESTION, "H.")},
        "fixed: GIF, only the first frame",
    ),
    "html": ({"image": "html.png", "conversations": turns(QUESTION, "X.")}, "dropped: corrupt image"),
    "cut jpeg": ({"image": "cut.jpg", "conversations": turns(QUESTION, "X.")}, "dropped: corrupt image"),
    "empty file": ({"image": "empty.png", "conversations": turns(QUESTION, "X.")}, "dropped: corrupt image"),
    "far too long": ({"conversations": turns("Go on.", "on " * 400, "And?", "No.")}, "kept"),
    "long question": ({"conversations": turns("on " * 400, "No.")}, "dropped: no supervised token"),
    "late image": (
        {"image": "a.png", "conversations": turns("Go on.", "on " * 400, QUESTION, "No.")},
        "dropped: no supervised token",
    ),
    "image in the middle": (
        {"image": "a.png", "conversations": turns("In <image>, what?", "A.")},
        "fixed: placeholder moved to the front",
    ),
    "image at the end": (
        {"image": "a.png", "conversations": turns("What?\n<image>", "A.")},
        "fixed: placeholder moved to the front",
    ),
    "image in a later turn": ({"image": "a.png", "conversations": turns("Hi", "Hi.", QUESTION, "A.")}, "kept"),
    "image in an answer": (
        {"image": "a.png", "conversations": turns(QUESTION, "<image>")},
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
    """A folder with all edge cases in one file, and their images."""
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


def run_doctor(file: Path, folder: Path, *words: str) -> dict[str, Any]:
    doctor.main([str(file), "--output", str(folder / "doctor.json"), *words])
    return json.loads((folder / "doctor.json").read_text())


@pytest.fixture(scope="module")
def report(world: Path, mllm_dir: Path) -> dict[str, Any]:
    words = ["--model", str(mllm_dir), "--max_length", "120", "--fix", str(world / "clean.json")]
    return run_doctor(world / "rows.json", world, *words)


@pytest.mark.parametrize("name", list(CASES))
def test_edge_case_is_kept_fixed_or_dropped(name: str, report: dict[str, Any]) -> None:
    kind, _, cause = CASES[name][1].partition(": ")
    number = list(CASES).index(name)
    dropped = {example["row"]: cause for cause, entry in report["dropped"].items() for example in entry["examples"]}
    if kind == "dropped":
        assert dropped[number] == cause
    else:
        assert number not in dropped
        assert not cause or any(fix.startswith(cause) for fix in report["fixed"])


def test_report_counts(report: dict[str, Any], mllm_dir: Path, world: Path) -> None:
    dropped = sum(result.startswith("dropped") for _, result in CASES.values())
    assert report["rows"] == len(CASES)
    assert report["usable"] == len(CASES) - dropped
    assert sum(entry["rows"] for entry in report["dropped"].values()) == dropped
    assert report["repeated_ids"] == 1
    assert report["over_long"] == 1
    assert report["fixed"]["GIF, only the first frame is used"] == 2
    assert report["fixed"]["placeholder moved to the front"] == 2
    assert report["tokens"]["max"] > 400
    assert report["supervised"]["max"] < 120
    corrupt = {example["id"]: example["detail"] for example in report["dropped"]["corrupt image"]["examples"]}
    assert set(corrupt) == {"html", "cut jpeg", "empty file"}
    assert all(str(world) in detail for detail in corrupt.values())
    # Training finds the same lengths and drops the same rows.
    recipe = InstructionRecipe(file=str(world / "rows.json"), template="chatml", max_length=120, max_bad_fraction=1.0)
    opened = InstructionDataset(recipe, AutoProcessor.from_pretrained(mllm_dir))
    _, rendered = opened.load(0)
    assert rendered.full_length <= report["tokens"]["max"]
    assert opened.dropped == {
        cause: entry["rows"]
        for cause, entry in report["dropped"].items()
        if cause not in ("corrupt image", "no supervised token")
    }


def test_clean_copy_has_nothing_to_drop(report: dict[str, Any], world: Path, mllm_dir: Path) -> None:
    rows = json.loads((world / "clean.json").read_text())
    kept = [name for name, (_, result) in CASES.items() if not result.startswith("dropped")]
    assert len(rows) == len(kept)
    words = ["--images", str(world), "--model", str(mllm_dir), "--max_length", "120"]
    again = run_doctor(world / "clean.json", world, *words)
    assert again["usable"] == again["rows"] == len(kept)
    by_id = {row["id"]: row for row in rows}
    assert by_id["renamed"]["image"] == "a.png"
    assert by_id["begins with gpt"]["conversations"] == turns("2?", "2.")
    assert "opening answer dropped" not in again["fixed"]
    assert by_id["two images"] == {"id": "two images"} | CASES["two images"][0], "a good row stays as it was"
    assert again["tokens"]["total"] == report["tokens"]["total"]


def test_worker_processes_give_the_same_report(world: Path, report: dict[str, Any], tmp_path: Path) -> None:
    """Two chunks in two processes, JSONL, without a tokenizer."""
    rows = [{"id": name} | row for name, (row, _) in CASES.items()] * 12
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    words = ["--images", str(world), "--fix", str(tmp_path / "clean.jsonl"), "--workers", "2"]
    result = run_doctor(tmp_path / "rows.jsonl", tmp_path, *words)
    assert result["rows"] == 12 * len(CASES)
    wanted = {cause: 12 * entry["rows"] for cause, entry in report["dropped"].items() if cause != "no supervised token"}
    assert {cause: entry["rows"] for cause, entry in result["dropped"].items()} == wanted
    assert all(len(entry["examples"]) <= 20 for entry in result["dropped"].values())
    assert "tokens" not in result
    assert len((tmp_path / "clean.jsonl").read_text().splitlines()) == result["usable"]


def test_messages_are_fixed_in_the_copy(tmp_path: Path) -> None:
    """Under either key, also as a JSON string; image paths are replaced in the row or in the part of a message."""
    (tmp_path / "a.png").write_bytes(encoded("PNG"))
    asked = {"role": "user", "content": [{"type": "text", "text": "What?"}]}
    answer = {"role": "assistant", "content": [{"type": "text", "text": "Red."}]}
    system = {"role": "system", "content": "Be brief."}

    def question(name: str) -> dict[str, Any]:
        return {"role": "user", "content": [{"type": "image", "image": name}, {"type": "text", "text": "What?"}]}

    rows = [
        {"messages": [answer, asked, answer]},
        {"conversations": [system, answer, asked, answer]},
        {"messages": [question("a.jpg"), answer]},
        {"messages": [question("b.jpg"), answer]},
        {"conversations": [answer, asked, answer], "messages": [answer, {"role": "tool"}, question("b.jpg")]},
        {"messages": json.dumps([answer, asked, answer])},
        {"messages": json.dumps([question("a.jpg"), answer])},
        {"messages": json.dumps([asked, answer])},
    ]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    result = run_doctor(tmp_path / "rows.json", tmp_path, "--fix", str(tmp_path / "clean.json"))
    assert {cause: entry["rows"] for cause, entry in result["dropped"].items()} == {"missing image": 1}
    assert json.loads((tmp_path / "clean.json").read_text()) == [
        {"messages": [asked, answer]},
        {"conversations": [system, asked, answer]},
        {"messages": [question("a.png"), answer]},
        {
            "conversations": [asked, answer],
            "messages": [answer, {"role": "tool"}, question("b.jpg")],
        },
        {"messages": [asked, answer]},
        {"messages": [question("a.png"), answer]},
        {"messages": json.dumps([asked, answer])},
    ]


def test_parquet_with_images_inside(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    images = [encoded("PNG"), b"no image", encoded("JPEG")]
    rows = datasets.Dataset.from_list(
        [
            {"id": str(at), "image": {"bytes": content, "path": None}, "conversations": turns(QUESTION, f"{at}.")}
            for at, content in enumerate(images)
        ]
    )
    rows.to_parquet(str(tmp_path / "rows.parquet"))
    result = run_doctor(tmp_path / "rows.parquet", tmp_path, "--fix", str(tmp_path / "clean.parquet"))
    assert {cause: entry["rows"] for cause, entry in result["dropped"].items()} == {"corrupt image": 1}
    table = capsys.readouterr().out
    assert re.search(r"^rows +3$", table, re.M)
    assert re.search(r"^  dropped: corrupt image +1  row 1 image 0", table, re.M)
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
    result = run_doctor(tmp_path / "{0..2}.tar", tmp_path, "--fix", str(tmp_path / "clean"), "--workers", "1")
    assert {cause: entry["rows"] for cause, entry in result["dropped"].items()} == {
        "corrupt image": 1,
        "malformed json": 1,
        "no image": 1,
        "no caption": 1,
        "broken shard": 1,
    }
    assert result["dropped"]["corrupt image"]["examples"][0]["shard"] == str(tmp_path / "0.tar")
    again = run_doctor(tmp_path / "clean" / "*.tar", tmp_path, "--workers", "1")
    assert again["rows"] == again["usable"] == 2


@pytest.mark.parametrize(
    ("words", "fields"),
    [
        (["gone.json"], {"file": "gone.json"}),
        (["rows.json", "--fix", "rows.json"], {"key": "--fix", "value": Path("rows.json")}),
        (["rows.json", "--fix", "clean.parquet"], {"key": "--fix", "value": Path("clean.parquet")}),
        (["rows.json", "--template", "chatml"], {"key": "--template"}),
        (["rows.json", "--workers", "-1"], {"key": "--workers", "value": -1}),
        (["gone.tar"], {}),
    ],
)
def test_bad_options_are_refused(
    words: list[str], fields: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("rows.json").write_text(json.dumps([CASES["text only"][0]]))
    with raises_user_error(**fields):
        doctor.main(words)
    assert not Path("doctor.json").exists()


# --- preview ----------------------------------------------------------------------------------------------------------


def test_preview_marks_supervised_tokens(
    world: Path, mllm_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [str(world / "rows.json"), "--model", str(mllm_dir), "--count", "4"]
    preview.main(words)
    text = capsys.readouterr().out
    assert text.count("--- row ") == 4
    assert "<|im_start|>user\n2 plus 2?<|im_end|>\n<|im_start|>assistant\n⟦Four.<|im_end|>⟧\n" in text
    preview.main([*words[:-1], "40", "--output", str(tmp_path / "p.html")])
    page = (tmp_path / "p.html").read_text()
    assert "<mark>Four.&lt;|im_end|&gt;</mark>" in page
    assert page.count("<img ") == page.count("src='data:image/jpeg;base64,") >= 8
    assert not re.search(r"(?:src|href)='(?!data:)|https?://", page), "the page is self-contained"
    assert "<p class='bad'>" in page, "unusable samples are shown with their error"
    assert "&lt;image x9&gt;" in page


def test_preview_of_a_bare_llm(world: Path, sample_world: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Uses the LLM's own template and LLaVA-1.5's number of image tokens."""
    preview.main([str(world / "rows.json"), "--model", str(sample_world / "llm"), "--count", "40"])
    assert "<image x576>" in capsys.readouterr().out


# --- before step 1 ----------------------------------------------------------------------------------------------------


def test_sample_check_counts_and_refuses_unusable_samples(world: Path, mllm: Mllm, tmp_path: Path) -> None:
    good, bad = CASES["image in a later turn"][0], CASES["html"][0]
    dataset = open_rows(
        tmp_path, [*[good] * 30, bad, CASES["far too long"][0]], mllm, images=str(world), max_length=100
    )
    check = check_sample(dataset, 64)
    assert (check.checked, check.causes, check.cut) == (32, {"unreadable image": 1}, 1)
    assert "row 30: corrupt image" in check.first
    assert "1 x unreadable image" in check.line()
    assert (dataset.seen.value, dataset.corrupt.value) == (0, 0), "the counts of the run do not change"
    few = check_sample(dataset, 4)
    assert few.checked == 4 and not few.causes
    with raises_user_error(key="data.max_bad_fraction"):
        check_sample(open_rows(tmp_path, [good, good, bad, bad, bad], mllm, images=str(world)))


@pytest.mark.parametrize("packing", ["none", "rows"])
def test_batch_is_shown_with_supervised_tokens_marked(packing: Any, world: Path, mllm: Mllm, tmp_path: Path) -> None:
    dataset = open_rows(tmp_path, [CASES["image in a later turn"][0], CASES["text only"][0]], mllm, images=str(world))
    batch = InstructionCollator(mllm.processor, packing)([dataset[0], dataset[1]])
    text = show_batch(batch, mllm.processor, color=False)
    assert "⟦A.<|im_end|>⟧" in text and "⟦Four.<|im_end|>⟧" in text
    assert "<image x9>" in text
    if packing == "none":
        assert "<|endoftext|>" not in text, "padding is left out"
    assert "\x1b[32mFour.<|im_end|>\x1b[0m" in show_batch(batch, mllm.processor)
    assert load_template("chatml") == dataset.template


LONE_SURROGATE = {"conversations": [{"from": "human", "value": "a \ud83d"}, {"from": "gpt", "value": "b"}]}
LONG_PATH = {
    "image": "A" * 300,
    "conversations": [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": "b"}],
}


NO_NAME = LONG_PATH | {"image": "."}


@pytest.mark.parametrize(
    ("row", "cause"),
    [(LONE_SURROGATE, "lone surrogate"), (LONG_PATH, "too long for a path"), (NO_NAME, "missing image")],
)
def test_rows_with_impossible_text_or_paths_are_dropped(row: dict[str, Any], cause: str, tmp_path: Path) -> None:
    """JSON allows them; training and doctor both drop the row and continue."""
    from clips_mllm.checks.rows import check_chunk
    from clips_mllm.data.row_checks import check_rows

    good = {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}
    checked = check_rows((tmp_path, 0, [row, good]))
    assert checked.number == [1] and len(checked.dropped) == 1 and cause in next(iter(checked.dropped))
    verdicts = check_chunk((tmp_path, 0, [row, good]))
    assert cause in str(verdicts[0].cause) and not verdicts[1].cause


def test_lone_surrogate_in_an_id_is_replaced(tmp_path: Path) -> None:
    """Neither the report nor the copy can be written with it."""
    conversation = [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]
    rows = [{"id": "x\ud83d", "conversations": conversation}, {"id": "y\ud83d", "conversations": []}]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    out, copy = tmp_path / "doctor.json", tmp_path / "copy.json"
    doctor.main([str(tmp_path / "rows.json"), "--output", str(out), "--fix", str(copy)])
    assert "y?" in out.read_text(encoding="utf-8")
    assert json.loads(copy.read_text(encoding="utf-8")) == [rows[0] | {"id": "x?"}]


def test_shards_with_the_same_name_are_refused() -> None:
    from clips_mllm.checks.fix import refuse_same_names

    refuse_same_names(["/a/00000.tar", "/a/00001.tar"])
    with raises_user_error(file="/b/00000.tar", key="--fix"):
        refuse_same_names(["/a/00000.tar", "/b/00000.tar"])
