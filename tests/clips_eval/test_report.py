"""`clips-mllm report` on synthetic run folders."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from clips_eval import report
from clips_eval.stats.uncertainty import wilson
from vision_tower.common.errors import UserError, run_command

COLORS = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255)}
RECALLS = {"i2t_r1": 0.311, "i2t_r5": 0.672, "i2t_r10": 0.793, "t2i_r1": 0.254, "t2i_r5": 0.615, "t2i_r10": 0.746}
FORMAT_1 = RECALLS | {"format": 1}
SCORES = {
    "clips_easy_vqa": {"accuracy": 0.871, "open_accuracy": 0.762, "yes_no_accuracy": 0.903, "n": 1000},
    "clips_pope_random": {"accuracy": 0.843, "f1": 0.834, "precision": 0.8, "n": 500},
    "clips_pope_popular": {"accuracy": 0.795, "f1": 0.786, "n": 500},
    "clips_pope_adversarial": {"accuracy": 0.747, "f1": 0.738, "n": 500},
    "clips_mmbench": {"accuracy": 0.589, "n": 200},
    "gqa": {"exact_match": 0.417, "n": 300},
    "mme": {"mme_perception_score": 1234.5, "n": 50},
}


def dump(path: Path, tree: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(tree))


def lines(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def make_image(path: Path, color: str = "red") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (24, 24), COLORS[color]).save(path)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A complete run, as the commands leave it."""
    root = tmp_path / "quickstart"
    make_image(root / "finetune" / "lmms_images" / "a.png")
    example = {
        "query": "a <red> scene",
        "images": ["../finetune/lmms_images/a.png", "gone.png"],
        "correct": [True, False],
    }
    examples = {"text_to_image": [example], "image_to_text": []}
    scores = RECALLS | {"format": 1, "n_images": 1000, "n_texts": 5000}
    dump(root / "encoder" / "retrieval.json", scores | {"examples": examples})
    common = {"format": 2, "model": "m", "command": "c", "versions": {}}
    dump(
        root / "finetune" / "lmms.json",
        common | {"control": "none", "tasks": SCORES, "samples_file": "lmms_samples.jsonl"},
    )
    control = {"clips_easy_vqa": {"accuracy": 0.652, "open_accuracy": 0.2, "yes_no_accuracy": 0.7, "n": 1000}}
    dump(
        root / "finetune" / "lmms_shuffled.json",
        common | {"control": "shuffled", "tasks": control, "samples_file": "lmms_shuffled_samples.jsonl"},
    )
    sample = {"task": "clips_easy_vqa", "doc_id": 0, "prompt": "what shape?\nAnswer the question using a single word."}
    answers = [
        ("circle", "circle", True, "lmms_images/a.png"),
        ("blob", "square", False, None),
        ("yes", "yes", True, None),
    ]
    lines(
        root / "finetune" / "lmms_samples.jsonl",
        [sample | dict(zip(("answer", "target", "correct", "image"), row, strict=True)) for row in answers],
    )
    for stage in ("encoder", "align", "finetune"):
        lines(
            root / stage / "metrics.jsonl", [{"step": step, "loss": 4 / step, "grad_norm": 1.0} for step in (1, 2, 4)]
        )
    for name, seconds in (("10-late", 5.0), ("2-pretrain", 620.5)):
        step = {"name": name, "command": f"clips-mllm {name}", "seconds": seconds, "peak_memory_bytes": 2**31}
        dump(root / "steps" / f"{name}.json", step)
    dump(root / "chat.json", [{"image": "finetune/lmms_images/a.png", "question": "What is it?", "answer": "A dog."}])
    return root


def outputs(root: Path) -> tuple[dict[str, Any], str, str]:
    report.main([str(root)])
    tree = json.loads((root / "report.json").read_text())
    return tree, (root / "report.md").read_text(), (root / "report.html").read_text()


def test_report_json_has_the_documented_keys(run: Path) -> None:
    tree, _, _ = outputs(run)
    assert tree["encoder"]["retrieval"] == RECALLS | {"n_images": 1000}
    assert tree["mllm"]["easy_vqa"] == SCORES["clips_easy_vqa"] | {"shuffled_accuracy": 0.652}
    assert tree["mllm"]["pope_random"] == {"accuracy": 0.843, "f1": 0.834, "n": 500}
    assert tree["mllm"]["mmbench"] == {"accuracy": 0.589, "n": 200}
    assert tree["mllm"]["gqa"] == SCORES["gqa"]
    assert tree["seconds"] == {"2-pretrain": 620.5, "10-late": 5.0}
    assert tree["commands"] == {"2-pretrain": "clips-mllm 2-pretrain", "10-late": "clips-mllm 10-late"}
    assert [step["name"] for step in tree["steps"]] == ["2-pretrain", "10-late"]
    promised = {"schema_version", "encoder", "mllm", "steps", "seconds", "commands"}
    assert set(tree) == promised | {
        "intervals",
        "controls",
        "wordings",
        "skipped",
        "baselines",
        "against",
        "provenance",
    }


def test_markdown_and_html_show_the_same_numbers(run: Path) -> None:
    _, markdown, page = outputs(run)
    low, high = wilson(0.871, 1000)
    shown = [
        "31.1",
        "74.6",
        "87.1",
        "76.2",
        "65.2",
        "84.3",
        "83.4",
        "58.9",
        "41.7",
        "1,234.5",
        f"{100 * low:.1f}–{100 * high:.1f}",
    ]
    for text in (markdown, page):
        assert all(number in text for number in shown)
        assert "clips-mllm 2-pretrain" in text and "10 min 20 s" in text and "A dog." in text
        assert "not comparable" in text


def test_paper_numbers_are_marked(run: Path) -> None:
    """Every row and column with a number of the paper has a text label."""
    _, markdown, page = outputs(run)
    rows = [line for line in markdown.splitlines() if "CLIPS L/16, COCO" in line or "CLIPS H, COCO" in line]
    assert len(rows) == 2 and all("(paper)" in row for row in rows)
    assert "| 73.6 |" in rows[0] and "| 76.4 |" in rows[1]
    header = next(line for line in markdown.splitlines() if line.startswith("| Benchmark"))
    assert "OpenAI CLIP L/14 (paper)" in header and "CLIPS L/14 (paper)" in header
    gqa = next(line for line in markdown.splitlines() if line.startswith("| gqa"))
    assert "41.7" in gqa and gqa.rstrip(" |").endswith("57.5 | 60.3")
    for row in re.findall(r'<tr class="paper">.*?</tr>', page):
        assert '<span class="tag">paper</span>' in row
    assert re.search(r'<th scope="col" class=paper>CLIPS L/14<span class="tag">paper</span>', page)


def test_page_is_self_contained(run: Path) -> None:
    _, _, page = outputs(run)
    assert "<script" not in page and not re.search(r"https?://", page)
    assert "@import" not in page and "url(" not in page
    sources = re.findall(r'(?:src|srcset|href)="([^"]*)"', page)
    assert sources and all(source.startswith("data:image/") for source in sources)
    assert "prefers-color-scheme: dark" in page and "width=device-width" in page
    assert page.count("data:image/svg+xml") == 2 * 5  # two bar charts and three curves, light and dark
    assert "a &lt;red&gt; scene" in page and "image not kept" in page


ZEROSHOT = {
    "format": 1,
    **{"top1": 0.437, "top5": 0.719, "mean_per_class": 0.428, "n_images": 600, "n_classes": 20, "n_texts": 160},
    "intervals": {"top1": {"low": 0.4, "high": 0.5}},
}


def test_zero_shot_is_shown_if_measured(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tree, markdown, page = outputs(run)
    assert tree["encoder"]["zeroshot"] is None and "zero-shot classification" not in markdown + page
    dump(run / "encoder" / "zeroshot.json", ZEROSHOT | {"data": "data/objects"})
    capsys.readouterr()
    tree, markdown, page = outputs(run)
    assert tree["encoder"]["zeroshot"] == {
        key: ZEROSHOT[key] for key in ("top1", "top5", "mean_per_class", "n_images", "n_classes")
    }
    assert "| This run | 43.7 | 71.9 | 42.8 |" in markdown and "| Chance | 5.0 | 25.0 | 5.0 |" in markdown
    assert "| 95 % | 40.0–50.0 | – | – |" in markdown
    for text in (markdown, page):
        assert "600 images, 20 classes, 160 prompts (data/objects)" in text
    assert "top1 43.7%  top5 71.9%  mean_per_class 42.8%" in capsys.readouterr().out


def test_zero_shot_below_five_classes_has_no_top_5(run: Path) -> None:
    dump(run / "encoder" / "zeroshot.json", ZEROSHOT | {"top5": None, "n_classes": 4})
    tree, markdown, _ = outputs(run)
    assert tree["encoder"]["zeroshot"]["top5"] is None
    assert "| – | 42.8 |" in markdown and "| Chance | 25.0 | – | 25.0 |" in markdown


def test_report_is_deterministic(run: Path) -> None:
    assert outputs(run) == outputs(run)


def test_missing_parts_are_listed(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for part in ("encoder/retrieval.json", "finetune/lmms_shuffled.json", "align/metrics.jsonl"):
        (run / part).unlink()
    scores = {name: SCORES[name] for name in ("clips_easy_vqa", "clips_mmbench")}
    dump(run / "finetune" / "lmms.json", {"format": 2, "control": "none", "tasks": scores})
    tree, markdown, page = outputs(run)
    assert tree["encoder"]["retrieval"] is None and tree["mllm"]["pope_random"] is None
    assert tree["mllm"]["easy_vqa"]["shuffled_accuracy"] is None
    for text in (markdown, page):
        assert "Not measured" in text and "clips-mllm retrieve" in text and "--control shuffled" in text
        assert "clips_pope_random" in text and "Training curve of align" in text
    assert "| This run | not measured |" in markdown and "| POPE, random | not measured |" in markdown
    assert capsys.readouterr().out.count("not measured: ") == 7


@pytest.mark.parametrize(
    ("part", "content", "words"),
    [
        ("encoder/retrieval.json", "{", ["retrieval.json", "line 1", "not valid JSON"]),
        ("encoder/retrieval.json", json.dumps(FORMAT_1 | {"n_images": 9, "i2t_r1": 31.1}), ["i2t_r1", "fraction"]),
        ("encoder/retrieval.json", json.dumps(FORMAT_1 | {"n_images": 0}), ["n_images", "at least 1"]),
        ("encoder/zeroshot.json", json.dumps(ZEROSHOT | {"top1": 43.7}), ["zeroshot.json", "top1", "fraction"]),
        (
            "finetune/lmms.json",
            json.dumps({"format": 2, "tasks": {"clips_mmbench": {"n": 3}}}),
            ["clips_mmbench.accuracy"],
        ),
        ("finetune/lmms.json", json.dumps({"format": 2, "control": "shuffled", "tasks": {}}), ["lmms.json", "control"]),
        ("finetune/lmms_samples.jsonl", '{"task": "a", "correct": "yes"}', ["samples.jsonl", "line 1", "correct"]),
        ("align/metrics.jsonl", '{"step": 1, "loss": 2.0}\n{"step"', ["metrics.jsonl", "line 2"]),
        ("steps/2-pretrain.json", '{"name": "x", "command": "y"}', ["2-pretrain.json", "seconds"]),
        ("chat.json", "{}", ["chat.json", "list"]),
    ],
)
def test_malformed_files_are_named(run: Path, part: str, content: str, words: list[str]) -> None:
    (run / part).write_text(content)
    with pytest.raises(UserError) as caught:
        report.main([str(run)])
    assert all(word in str(caught.value) for word in words) and "\n" not in str(caught.value)
    assert not list(run.glob("report.*"))


def test_folders_without_a_run_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(report.main, [str(tmp_path)]) == 2
    assert run_command(report.main, [str(tmp_path / "nowhere")]) == 2
    assert capsys.readouterr().err.count("error: ") == 2


def test_wilson() -> None:
    """Textbook values: 8 of 10, and none of 20, where the plain interval would be empty."""
    assert wilson(0.8, 10) == pytest.approx((0.4902, 0.9433), abs=1e-4)
    assert wilson(0.0, 20) == pytest.approx((0.0, 0.1611), abs=1e-4)
