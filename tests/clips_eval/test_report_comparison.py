"""`clips-mllm report`: comparisons, controls, schema, model card, and the page in a browser."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest

from clips_eval import report
from tests.helpers.errors import raises_user_error
from tests.helpers.run_folders import write_run
from vision_tower.common.errors import run_command

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A good run and a worse one, with the reports of both."""
    folder = tmp_path_factory.mktemp("runs")
    good, poor = write_run(folder / "good", 0.85), write_run(folder / "poor", 0.7)
    report.main([*words_of(good, poor)])
    report.main([str(poor)])
    return good, poor


def words_of(good: Path, poor: Path) -> list[str]:
    return [str(good), "--against", str(poor), "--baselines", f"[{poor / 'finetune' / 'lmms.json'}]"]


def outputs(root: Path) -> tuple[dict[str, Any], str, str]:
    tree = json.loads((root / "report.json").read_text())
    return tree, (root / "report.md").read_text(), (root / "report.html").read_text()


def test_against_marks_better_and_worse(runs: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    good, poor = runs
    tree, markdown, page = outputs(good)
    rows = {row["metric"]: row for row in tree["against"]["metrics"]}
    assert set(rows) == {"accuracy", "open_accuracy"}  # yes/no answers are not in the samples: nothing is made up
    found = rows["accuracy"]["difference"]
    assert rows["accuracy"]["verdict"] == "better" and 0.1 < found["low"] < found["value"] < found["high"] < 0.2
    assert (found["n"], found["clusters"]) == (400, 100)
    assert (
        "▲ better" in markdown and "▲ better" in page and "clips_easy_vqa" not in markdown.split("## Against")[1][:900]
    )
    words = [str(poor), "--against", str(good)]
    assert run_command(report.main, [*words, "--fail_if_worse", "true"]) == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("error: ") and "worse in clips_easy_vqa accuracy" in error
    assert "▼ worse" in (poor / "report.md").read_text(), "the report is written before the command fails"
    assert run_command(report.main, [*words_of(good, poor), "--fail_if_worse", "true"]) == 0
    report.main([str(poor)])


def test_fail_if_worse_counts_missing_metrics(
    runs: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A failed benchmark, or one with other documents, is not "not worse"."""
    good, _ = runs
    run = write_run(tmp_path / "run", 0.85)
    other = tmp_path / "other"
    shutil.copytree(good, other)
    file, samples = (other / "finetune" / name for name in ("lmms.json", "lmms_samples.jsonl"))
    tree = json.loads(file.read_text())
    tree["tasks"] |= {"mme": {"points": 1500.0, "n": 10}, "gqa": {"exact_match": 0.5, "n": 10}}
    file.write_text(json.dumps(tree))
    words = [str(run), "--against", str(other), "--fail_if_worse"]
    mine = run / "finetune" / "lmms.json"
    mine.write_text(json.dumps(json.loads(mine.read_text()) | {"failed": {"mme": "CUDA out of memory"}}))
    assert run_command(report.main, words) == 2
    printed = capsys.readouterr()
    assert (
        "not comparable in mme (it failed in this run (CUDA out of memory)), gqa (not measured in this run)"
        in printed.err
    )
    assert "not compared   gqa: not measured in this run" in printed.out
    rows = [json.loads(line) | {"task": "gqa"} for line in samples.read_text().splitlines()[:4]]
    samples.write_text(samples.read_text() + "".join(json.dumps(row) + "\n" for row in rows))
    ours = json.loads(mine.read_text())
    ours["tasks"]["gqa"] = {"exact_match": 0.5, "n": 10}
    mine.write_text(json.dumps(ours))
    assert run_command(report.main, words) == 2
    assert "gqa (the runs answered different documents" in capsys.readouterr().err
    assert "Not compared: gqa: the runs answered different documents" in (run / "report.md").read_text()


def test_identical_runs_do_not_differ(runs: tuple[Path, Path], tmp_path: Path) -> None:
    good, _ = runs
    report.main([str(write_run(tmp_path / "twin", 0.85)), "--against", str(good)])
    tree, _, _ = outputs(tmp_path / "twin")
    assert {row["verdict"] for row in tree["against"]["metrics"]} == {"no difference"}
    with raises_user_error(file=runs[0]):
        report.main([str(write_run(tmp_path / "other", 0.85, n=396)), "--against", str(good)])
    with raises_user_error(key="--fail_if_worse"):
        report.main([str(good), "--fail_if_worse", "true"])


def test_report_json_obeys_its_schema(runs: tuple[Path, Path]) -> None:
    import jsonschema

    schema = json.loads((files("clips_eval.reporting") / "data" / "report.schema.json").read_text(encoding="utf-8"))
    jsonschema.Draft202012Validator.check_schema(schema)
    for run in runs:
        tree, _, _ = outputs(run)
        jsonschema.validate(tree, schema)
    tree["mllm"]["easy_vqa"]["accuracy"] = 85.0
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(tree, schema)


def test_controls_wordings_baselines_and_provenance_are_shown(runs: tuple[Path, Path]) -> None:
    tree, markdown, page = outputs(runs[0])
    assert set(tree["controls"]) == {"shuffled", "blank", "no_image"} and set(tree["wordings"]) == {"1", "2"}
    assert tree["provenance"]["finetune"]["seed"] == 7 and tree["skipped"] == {"mmvet": "needs a judge"}
    accuracy = tree["mllm"]["easy_vqa"]["accuracy"]
    head = next(line for line in markdown.splitlines() if line.startswith("| Benchmark"))
    row = next(line for line in markdown.splitlines() if line.startswith("| easy-VQA |"))
    cells = dict(zip(head.split(" | "), row.split(" | "), strict=True))
    for title, less in (("Shuffled", 0.2), ("Blank", 0.25), ("No image", 0.3)):
        assert float(cells[title]) == pytest.approx(100 * (accuracy - less), abs=4)
    least, most = cells["Wordings"].split("–")
    assert float(most) == round(100 * accuracy, 1) and float(least) == pytest.approx(float(most) - 4, abs=2)
    assert cells["m"].startswith(f"{100 * (accuracy - 0.15):.0f}"[:1]) and "(" in cells["m"]
    low, high = tree["intervals"]["easy_vqa"]["accuracy"]
    assert cells["95 %"] == f"{100 * low:.1f}–{100 * high:.1f}"
    measured = next(line for line in markdown.splitlines() if line.startswith("| benchmarks |"))
    assert "| 11 |" in measured and "| 1 h 06 min |" in measured
    for text in (markdown, page):
        assert "abababababababab" in text and "needs a judge" in text and "bootstrap over images" in text
    assert "Inverse effect" in page


STOCK = {
    "mme": {"mme_perception_score": 1400.0, "mme_cognition_score": 300.0, "n": 2374},
    "chartqa": {"relaxed_overall": 0.143, "relaxed_human_split": 0.2, "n": 2500},
    "nocaps_val": {"nocaps_CIDEr": 1.025, "nocaps_METEOR": 0.27, "n": 4500},
    "gqa": {"exact_match": 0.6, "n": 12578},
}


def test_paper_benchmarks_get_the_papers_column(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Tasks of several metrics too: each of the paper's columns has one row, with ours and theirs in it."""
    from huggingface_hub import ModelCard

    run = write_run(tmp_path / "run", 0.8, n=8)
    file = run / "finetune" / "lmms.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"tasks": STOCK, "intervals": {}}))
    report.main([str(run)])
    _, markdown, page = outputs(run)
    head = next(line for line in markdown.splitlines() if line.startswith("| Benchmark"))
    rows = {line.split(" | ")[0].strip("| "): line.split(" | ") for line in markdown.splitlines() if line[:2] == "| "}
    theirs = next(place for place, name in enumerate(head.split(" | ")) if "CLIPS" in name)
    expected = {
        "mme: mme_perception_score": ("1,400.0", "1,416.6"),
        "mme: mme_cognition_score": ("300.0", "326.4"),
        "chartqa: relaxed_overall": ("14.3", "14.2"),
        "nocaps_val: nocaps_CIDEr": ("102.5", "102.5"),
        "gqa: exact_match": ("60.0", "60.3"),
    }
    for name, (ours, paper) in expected.items():
        assert rows[name][1] == ours and rows[name][theirs].strip("| ") == paper, name
    assert not [name for name in rows if name.startswith(("ChartQA", "MME", "NoCaps", "GQA", "easy-VQA"))]
    assert "Benchmarks of the MLLM: chartqa 14.3 %; nocaps_val 27.0 %; gqa 60.0 %" in page
    printed = capsys.readouterr().out
    assert "mme_perception_score 1,400.0" in printed and "%  mme" not in printed
    values = {result.metric_name: result.metric_value for result in ModelCard(markdown).data.eval_results}
    assert values["nocaps_CIDEr"] == 102.5 and values["mme_perception_score"] == 1400.0


def test_baselines_with_one_name_and_encoder_baselines(runs: tuple[Path, Path], tmp_path: Path) -> None:
    _, poor = runs
    run = write_run(tmp_path / "run", 0.8)
    few = write_run(tmp_path / "few", 0.8, n=80) / "finetune" / "lmms.json"
    other = poor / "finetune" / "lmms.json"
    recalls = {f"{way}_r{k}": 0.4 for way in ("i2t", "t2i") for k in (1, 5, 10)}
    encoder = tmp_path / "theirs" / "retrieval.json"
    encoder.parent.mkdir()
    encoder.write_text(json.dumps(recalls | {"format": 1, "n_images": 5000, "encoder": "clip-b16", "data": "coco"}))
    report.main([str(run), *(f"--baselines={file}" for file in (other, few, encoder))])
    tree, markdown, _ = outputs(run)
    assert set(tree["baselines"]["mllm"]) == {f"m ({other})", f"m ({few})"}, "none is lost"
    assert tree["baselines"]["encoder"]["clip-b16"]["i2t_r5"] == 0.4
    head = next(line for line in markdown.splitlines() if line.startswith("| Benchmark")).split(" | ")
    row = next(line for line in markdown.splitlines() if line.startswith("| easy-VQA |")).split(" | ")
    cells = dict(zip(head, row, strict=True))
    assert cells[f"m ({few})"].endswith("n = 80") and "n =" not in cells[f"m ({other})"] and cells["Images"] == "100"
    assert "| clip-b16, 5,000 images | 40.0 |" in markdown and "| 95 % | 38.7–41.4 |" in markdown
    with raises_user_error():
        report.main([str(run), "--baselines", str(tmp_path / "none.json")])


def test_report_md_is_a_model_card(runs: tuple[Path, Path]) -> None:
    from huggingface_hub import ModelCard

    tree, markdown, _ = outputs(runs[0])
    card = ModelCard(markdown)
    assert card.data.pipeline_tag == "image-text-to-text" and card.data.library_name == "transformers"
    found = {result.metric_name: result for result in card.data.eval_results}
    assert found["easy-VQA"].metric_value == round(100 * tree["mllm"]["easy_vqa"]["accuracy"], 2)
    assert found["easy-VQA"].task_type == "visual-question-answering"


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ({"format": 9}, "format"),
        ({"wording": 1}, "wording"),
        ({"intervals": {"a": {"b": {"least": 0}}}}, "intervals"),
    ],
)
def test_results_of_another_version_are_refused(tmp_path: Path, change: dict[str, Any], key: str) -> None:
    run = write_run(tmp_path / "run", 0.8, n=8)
    file = run / "finetune" / "lmms.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with raises_user_error(file=file, key=key):
        report.main([str(run)])
    assert not list(run.glob("report.*"))


def test_duplicate_documents_are_refused(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", 0.8, n=8)
    samples = run / "finetune" / "lmms_samples.jsonl"
    samples.write_text(samples.read_text() + samples.read_text().splitlines()[3] + "\n")
    with raises_user_error(file=samples) as caught:
        report.main([str(run)])
    assert "line 9" in caught.value.problem and "document 3" in caught.value.problem


# --- in a browser -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    if CHROMIUM is None:
        pytest.skip("no Chromium on this machine: install it to have the page opened")
    with playwright.sync_playwright() as driver:
        flags = ["--no-sandbox", "--headless=new", "--disable-gpu", "--disable-background-networking", "--no-first-run"]
        chromium = driver.chromium.launch(executable_path=CHROMIUM, args=flags)
        yield chromium
        chromium.close()


@pytest.mark.parametrize(("width", "height"), [(390, 844), (1280, 900)], ids=["phone", "desktop"])
def test_page_opens_from_disk_and_fits_the_screen(
    runs: tuple[Path, Path], browser: Any, width: int, height: int
) -> None:
    page = browser.new_page(viewport={"width": width, "height": height})
    requests: list[str] = []
    errors: list[str] = []
    page.on("request", lambda request: requests.append(request.url))
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
    page.goto((runs[0] / "report.html").as_uri())
    assert [url for url in requests if not url.startswith(("file:", "data:"))] == [] and errors == []
    assert page.evaluate("document.documentElement.scrollWidth") <= width, "the page itself must not scroll sideways"
    broken = "[...document.images].filter(image => !image.complete || image.naturalWidth === 0).length"
    assert page.evaluate("document.images.length") >= 6 and page.evaluate(broken) == 0
    titles = page.locator("h2").all_inner_texts()
    assert titles[:2] == ["Encoder: retrieval", "Multimodal LLM: benchmarks"] and "Provenance" in titles
    small = "e => parseFloat(getComputedStyle(e).fontSize) < 11"
    tiny = f"[...document.querySelectorAll('p, td, li, th')].filter({small}).length"
    assert page.evaluate(tiny) == 0, "text that nobody can read on a phone"
    page.close()
