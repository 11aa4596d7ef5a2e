"""`clips-mllm evaluate`: stock models, controls, wordings, resuming, failures, skipped tasks, use in training."""

from __future__ import annotations

import hashlib
import json
import os
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from clips_eval.evaluate import main
from clips_eval.lmms.answer_cache import AnswerCache
from clips_eval.lmms.recipe import EvaluateRecipe, TaskSpec
from tests.helpers.errors import raises_user_error
from tests.helpers.tiny_llava import ROWS, build_tiny_mllm, make_image, make_requests, pope_rows, write_parquet
from tests.helpers.train_runs import accelerate_launcher, launch
from vision_tower.common.errors import UserError, run_command

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def mllm() -> SimpleNamespace:
    return build_tiny_mllm()


@pytest.fixture(scope="module")
def checkpoint(mllm: SimpleNamespace, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("evaluate") / "model"
    mllm.model.save_pretrained(folder)
    mllm.processor.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def recipe(checkpoint: Path) -> Path:
    """Three tasks; easy-VQA with two questions about each of two images."""
    lines = ["tasks:"]
    for task, rows in ROWS.items():
        data = write_parquet(checkpoint.parent / "data" / f"{task}.parquet", rows())
        lines.append(f"  - {{task: {task}, data: {data}}}")
    file = checkpoint.parent / "recipe.yaml"
    file.write_text("\n".join([*lines, "batch_size: 4", "device: cpu", ""]))
    return file


def read(file: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    result = json.loads(file.read_text())
    rows = [json.loads(line) for line in (file.parent / result["samples_file"]).read_text().splitlines()]
    return result, rows


# --- stock models -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["chat", "simple"])
def test_answers_equal_stock_llava_hf(checkpoint: Path, mllm: SimpleNamespace, mode: str) -> None:
    """30 documents, batch 1 and 16; `benchmarks/evaluate_speed.py` does the same with 500 and a real LLM."""
    from lmms_eval.models.chat.llava_hf import LlavaHf as StockChat
    from lmms_eval.models.simple.llava_hf import LlavaHf as StockSimple

    from clips_eval.lmms.model import ClipsMllm, ClipsMllmSimple

    documents = [([make_image(n % 7)], f"Is there {'a very ' * (n % 4)}small thing {n}?") for n in range(30)]
    stock = (StockChat if mode == "chat" else StockSimple)(str(checkpoint), device="cpu", device_map="cpu")
    answers = stock.generate_until(make_requests(documents, stock, simple=mode == "simple"))
    expected = [answer if isinstance(answer, str) else answer.text for answer in answers]
    assert len(set(expected)) > 10
    kind = ClipsMllm if mode == "chat" else ClipsMllmSimple
    for batch_size in (1, 16):
        ours = kind(mllm=mllm, batch_size=batch_size)
        assert ours.generate_until(make_requests(documents, ours, simple=mode == "simple")) == expected


def test_command_with_stock_model(checkpoint: Path, recipe: Path, tmp_path: Path) -> None:
    words = [str(checkpoint), "--config", str(recipe), "--limit", "3", "--mode", "simple"]
    main([*words, "--output", str(tmp_path / "ours.json")])
    main([*words, "--output", str(tmp_path / "stock.json"), "--model", "llava_hf"])
    ours, theirs = read(tmp_path / "ours.json"), read(tmp_path / "stock.json")
    assert [row["answer"] for row in ours[1]] == [row["answer"] for row in theirs[1]]
    assert ours[0]["tasks"] == theirs[0]["tasks"] and ours[0]["intervals"] == theirs[0]["intervals"]
    assert (theirs[0]["engine"], theirs[0]["mode"]) == ("llava_hf", "simple")


@pytest.mark.slow
def test_two_processes_give_the_same_scores(checkpoint: Path, recipe: Path, tmp_path: Path) -> None:
    options = [str(checkpoint), "--config", str(recipe), "--control", "shuffled"]
    launch(accelerate_launcher(), "clips_eval.evaluate", [*options, "--output", str(tmp_path / "two.json")])
    main([*options, "--output", str(tmp_path / "one.json")])
    two, one = read(tmp_path / "two.json"), read(tmp_path / "one.json")
    assert (two[0]["processes"], one[0]["processes"]) == (2, 1)
    assert two[0]["tasks"] == one[0]["tasks"] and two[0]["intervals"] == one[0]["intervals"]
    assert [row["answer"] for row in two[1]] == [row["answer"] for row in one[1]]


# --- intervals, controls, wordings ------------------------------------------------------------------------------------


def test_every_control_and_its_intervals(checkpoint: Path, recipe: Path, tmp_path: Path) -> None:
    main([str(checkpoint), "--config", str(recipe), "--control", "all", "--output", str(tmp_path / "lmms.json")])
    answers = {}
    for suffix in ("", "_shuffled", "_blank", "_no_image"):
        result, rows = read(tmp_path / f"lmms{suffix}.json")
        assert result["control"] == (suffix.removeprefix("_") or "none") and not result["failed"]
        answers[suffix] = [row["answer"] for row in rows]
        easy = [row for row in rows if row["task"] == "clips_easy_vqa"]
        assert [row["cluster"] for row in easy[:2]] == [row["cluster"] for row in easy[2:]], "by the document's image"
        found = result["intervals"]["clips_easy_vqa"]
        assert (found["accuracy"]["n"], found["open_accuracy"]["n"], found["accuracy"]["clusters"]) == (4, 2, 2)
        for task, scores in result["tasks"].items():
            for metric in set(scores) - {"n"}:
                span = result["intervals"][task][metric]
                if span["n"] == 0:  # a precision without a "yes"
                    assert span["low"] is span["high"] is None, (task, metric)
                else:
                    assert span["low"] <= scores[metric] <= span["high"], (task, metric)
    assert len({tuple(given) for given in answers.values()}) == 4
    assert not list(tmp_path.glob(".lmms*"))


def test_result_has_data_digests_and_lower_is_better(
    checkpoint: Path, recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from clips_eval.lmms.result import table

    main([str(checkpoint), "--config", str(recipe), "--output", str(tmp_path / "lmms.json")])
    result, _ = read(tmp_path / "lmms.json")
    files = {task: checkpoint.parent / "data" / f"{task}.parquet" for task in ROWS}
    assert result["data_sha256"] == {
        task: hashlib.sha256(file.read_bytes()).hexdigest() for task, file in files.items()
    }
    assert result["lower_is_better"] == {"clips_pope_random": ["yes_ratio"]}
    result["intervals"]["clips_pope_random"]["precision"] = {"low": None, "high": None, "n": 0, "clusters": 0}
    (line,) = [line for line in table(result, tmp_path).splitlines() if "precision" in line]
    assert line.split() == ["clips_pope_random", "precision", "–", "–", "0"]


def test_blank_and_no_image_controls(mllm: SimpleNamespace) -> None:
    from PIL import Image

    from clips_eval.lmms.model import ClipsMllm
    from clips_eval.lmms.requests import chat_prompt

    model = ClipsMllm(mllm=mllm)
    (request,) = make_requests([([make_image(1)], "What?")], model)
    document = ([make_image(1)], "What?")
    blank = chat_prompt(request, document, mllm.processor, "blank")
    none = chat_prompt(request, document, mllm.processor, "no_image")
    assert blank.images == [Image.new("RGB", (40, 40), (128, 128, 128))] and blank.text.count("<image>") == 1
    assert none.images == [] and none.text == blank.text.replace("<image>", "")


def test_exif_orientation_of_image_path_is_applied(mllm: SimpleNamespace, tmp_path: Path) -> None:
    from PIL import ExifTags, Image

    from clips_eval.lmms.model import ClipsMllm
    from clips_eval.lmms.requests import chat_prompt

    rotated = Image.new("RGB", (40, 20))
    rotated.getexif()[ExifTags.Base.Orientation] = 6
    rotated.save(tmp_path / "rotated.jpg", exif=rotated.getexif())
    document = ([str(tmp_path / "rotated.jpg")], "What?")
    (request,) = make_requests([document], ClipsMllm(mllm=mllm))
    (image,) = chat_prompt(request, document, mllm.processor, "none").images
    assert image.size == (20, 40)


def test_wordings_change_only_the_last_line(checkpoint: Path, recipe: Path, tmp_path: Path) -> None:
    main([str(checkpoint), "--config", str(recipe), "--wording", "all", "--output", str(tmp_path / "lmms.json")])
    prompts = [
        [row["prompt"] for row in read(tmp_path / f"lmms{end}.json")[1]] for end in ("", "_wording1", "_wording2")
    ]
    for given, first, second in zip(*prompts, strict=True):
        assert len({given, first, second}) == 3
        assert len({text.rpartition("\n")[0] for text in (given, first, second)}) == 1
    assert read(tmp_path / "lmms_wording2.json")[0]["wording"] == 2


# --- resuming, failing, skipping --------------------------------------------------------------------------------------


def test_interrupted_run_resumes_with_first_missing_document(
    checkpoint: Path, recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from clips_eval.lmms.model import ClipsMllm

    words = [str(checkpoint), "--config", str(recipe)]
    full, part = tmp_path / "full.json", tmp_path / "part.json"
    main([*words, "--output", str(full)])
    answer = ClipsMllm._answer
    answered: list[int] = []

    def dies(self: ClipsMllm, batch: Any) -> list[str]:
        if len(answered) == 2:
            raise KeyboardInterrupt
        answered.append(len(batch))
        return answer(self, batch)

    monkeypatch.setattr(ClipsMllm, "_answer", dies)
    assert run_command(main, [*words, "--output", str(part)]) == 130
    assert not part.exists() and len(list(tmp_path.glob(".part_answers.*.jsonl"))) == 1
    answered.clear()
    monkeypatch.setattr(ClipsMllm, "_answer", lambda self, batch: answered.append(len(batch)) or answer(self, batch))  # type: ignore[func-returns-value]
    main([*words, "--output", str(part)])
    result, rows = read(part)
    assert result["reused_answers"] == 6 and sum(answered) == 14 - 6
    assert rows == [row | {"image": row["image"] and row["image"].replace("full", "part")} for row in read(full)[1]]
    assert not list(tmp_path.glob(".part_answers*"))


def test_4bit_answers_are_cached_separately(
    chat_mllm: Path, recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The LLM has 4-bit layers, and its cached answers are not reused for the unquantized one."""
    from clips_eval.lmms.model import ClipsMllm

    words = [str(chat_mllm), "--config", str(recipe), "--output", str(tmp_path / "lmms.json")]
    answer = ClipsMllm._answer
    layers: list[str] = []

    def dies(self: ClipsMllm, batch: Any) -> list[str]:
        layers.append(type(self.mllm.model.model.language_model.layers[0].self_attn.q_proj).__name__)
        if len(layers) == 2:
            raise KeyboardInterrupt
        return answer(self, batch)

    monkeypatch.setattr(ClipsMllm, "_answer", dies)
    assert run_command(main, [*words, "--quantize", "4bit"]) == 130
    assert layers == ["Linear4bit"] * 2 and list(tmp_path.glob(".lmms_answers.*.jsonl"))
    main(words)
    full, rows = read(tmp_path / "lmms.json")
    assert layers[2] == "Linear" and full["reused_answers"] == 0
    main([*words, "--quantize", "4bit"])
    quantized, others = read(tmp_path / "lmms.json")
    assert quantized["recipe"]["quantize"] == "4bit"
    plugin = ClipsMllm(str(chat_mllm), device="cpu", quantize="4bit").mllm
    assert type(plugin.model.model.language_model.layers[0].self_attn.q_proj).__name__ == "Linear4bit"
    assert [row["answer"] for row in others] != [row["answer"] for row in rows]


def test_answer_cache_of_other_source_or_truncated(tmp_path: Path) -> None:
    stem = tmp_path / "answers"
    AnswerCache(stem, {"weights": 1}).add({"a": "1", "b": "2"})
    file = tmp_path / "answers.0.jsonl"
    file.write_text(file.read_text() + '{"key": "c", "ans')  # a truncated line
    again = AnswerCache(stem, {"weights": 1}, rank=1)
    assert [again.get(key) for key in "abc"] == ["1", "2", None] and again.reused == 2
    again.add({"c": "3"})
    AnswerCache(stem, {"weights": 1}).add({"d": "4"})
    assert [AnswerCache(stem, {"weights": 1}).get(key) for key in "abcd"] == ["1", "2", "3", "4"]
    other = AnswerCache(stem, {"weights": 2})
    assert other.get("a") is None
    other.add({"a": "9"})
    assert AnswerCache(stem, {"weights": 1}).get("a") is None and AnswerCache(stem, {"weights": 1}).get("c") == "3"
    file.write_text(file.read_text() + "{}\n")
    with raises_user_error(file=file):
        AnswerCache(stem, {"weights": 2})
    other.delete()
    assert not list(tmp_path.iterdir())


def test_failed_task_is_reported_and_others_are_kept(
    checkpoint: Path, recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from clips_eval.lmms import run as lmms_run

    evaluate = lmms_run.evaluate_task

    def breaks(model: Any, task: Any, *rest: Any) -> Any:
        if task.config.task == "clips_mmbench":
            raise RuntimeError("the scorer\nbroke")
        return evaluate(model, task, *rest)

    monkeypatch.setattr(lmms_run, "evaluate_task", breaks)
    words = [str(checkpoint), "--config", str(recipe), "--output", str(tmp_path / "lmms.json")]
    assert run_command(main, words) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: 1 of 3 ") and "clips_mmbench: RuntimeError: the scorer broke" in error
    result, _ = read(tmp_path / "lmms.json")
    assert set(result["tasks"]) == {"clips_pope_random", "clips_easy_vqa"} and set(result["failed"]) == {
        "clips_mmbench"
    }
    monkeypatch.setattr(lmms_run, "evaluate_task", evaluate)
    main(words)
    result, _ = read(tmp_path / "lmms.json")
    assert result["reused_answers"] == 10 and set(result["tasks"]) == set(ROWS) and not result["failed"]


def test_smaller_run_does_not_replace_a_result(checkpoint: Path, recipe: Path, tmp_path: Path) -> None:
    output = tmp_path / "lmms.json"
    words = [str(checkpoint), "--config", str(recipe), "--output", str(output)]
    pope = f"[{{task: clips_pope_random, data: {checkpoint.parent / 'data' / 'clips_pope_random.parquet'}}}]"
    main([*words, "--limit", "3"])
    before = output.read_bytes()
    for options, key, value in (
        (["--limit", "2"], "limit", 3),
        (["--tasks", pope, "--limit", "3"], "tasks", "clips_easy_vqa, clips_mmbench"),
        (["--control", "all", "--limit", "2"], "limit", 3),
    ):
        with raises_user_error(file=output, key=key, value=value):
            main([*words, *options])
        assert output.read_bytes() == before
    main([*words, "--limit", "3"])
    main(words)
    assert read(output)[0]["tasks"]["clips_pope_random"]["n"] == 6, "an equal or larger run replaces it"
    with raises_user_error(file=output, key="limit", value="all"):
        main([*words, "--limit", "6"])
    failed = read(output)[0] | {"failed": {"clips_easy_vqa": "broke"}, "skipped": {"clips_mmbench": "cannot"}}
    output.write_text(json.dumps(failed))
    main([*words, "--tasks", pope])
    for text in ('{"format": 1}', '{"format": 2}', "[]"):
        output.write_text(text)
        with raises_user_error(file=output):
            main(words)
        assert output.read_text() == text


def test_sigterm_keeps_answers_and_removes_temporary_files(
    checkpoint: Path, recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from clips_eval.lmms.model import ClipsMllm

    answer = ClipsMllm._answer
    answered: list[int] = []

    def stopped(self: ClipsMllm, batch: Any) -> list[str]:
        answered.append(len(batch))
        if len(answered) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return answer(self, batch)

    monkeypatch.setattr(ClipsMllm, "_answer", stopped)
    words = [str(checkpoint), "--config", str(recipe), "--output", str(tmp_path / "lmms.json")]
    assert run_command(main, words) == 0
    assert capsys.readouterr().err.strip().splitlines()[-1].startswith("SIGTERM: evaluate")
    assert [file.name for file in tmp_path.iterdir()] == [".lmms_answers.0.jsonl"]
    main(words)
    assert read(tmp_path / "lmms.json")[0]["reused_answers"] == answered[0]


@pytest.mark.parametrize("mode", ["chat", "simple"])
def test_undecodable_image_is_named(
    checkpoint: Path, tmp_path: Path, mode: str, capsys: pytest.CaptureFixture[str]
) -> None:
    for index in (0, 4):
        rows = pope_rows()
        rows[index]["image"] = {"bytes": b"no image", "path": None}
        data = write_parquet(tmp_path / f"{index}.parquet", rows)
        tasks = f"[{{task: clips_pope_random, data: {data}}}]"
        words = [str(checkpoint), "--tasks", tasks, "--mode", mode, "--output", str(tmp_path / "lmms.json")]
        assert run_command(main, [*words, "--device", "cpu"]) == 2
        errors = capsys.readouterr().err
        assert f"task clips_pope_random, document {index}: " in errors.splitlines()[-1]
        assert "Traceback" not in errors


def test_task_without_known_wordings_is_skipped(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from clips_eval.lmms import run as lmms_run

    monkeypatch.setattr(lmms_run, "reword", lambda task, wording: False)
    tasks = f"[{{task: clips_pope_random, data: {write_parquet(tmp_path / 'pope.parquet', pope_rows())}}}]"
    main([str(checkpoint), "--tasks", tasks, "--wording", "1", "--output", str(tmp_path / "lmms.json")])
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith("skipped: clips_pope_random: ") for line in lines)
    assert not (tmp_path / "lmms.json").exists()


def test_error_of_one_process_ends_the_command(
    checkpoint: Path, recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The other processes wait for its answers; continuing with the next task would leave them waiting forever."""
    from clips_eval.lmms import run as lmms_run

    def breaks(*_: Any) -> Any:
        raise UserError("image 3 cannot be read")

    monkeypatch.setattr(lmms_run, "evaluate_task", breaks)
    monkeypatch.setenv("RANK", "1")
    with raises_user_error() as caught:
        main([str(checkpoint), "--config", str(recipe), "--output", str(tmp_path / "lmms.json")])
    assert caught.value.problem == "image 3 cannot be read"


def test_tasks_with_missing_requirements_are_skipped_with_reason(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from clips_eval.lmms import requirements

    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    monkeypatch.setattr(requirements.shutil, "which", lambda name: None)
    data = write_parquet(tmp_path / "pope.parquet", pope_rows())
    lines = ["tasks: [{task: pope}, {task: mmvet}, {task: nocaps_val}, {task: gqa}]", "device: cpu", ""]
    (tmp_path / "r.yaml").write_text("\n".join(lines))
    words = [str(checkpoint), "--config", str(tmp_path / "r.yaml"), "--output", str(tmp_path / "lmms.json")]
    main([*words, f"--data.pope={data}"])
    result, rows = read(tmp_path / "lmms.json")
    assert len(rows) == 6 and result["tasks"]["pope"]["n"] == 6
    assert "OPENAI_API_KEY" in result["skipped"]["mmvet"] and "java" in result["skipped"]["nocaps_val"]
    assert "--data.gqa" in result["skipped"]["gqa"]
    logged = [record.args[0] for record in caplog.records if record.name == "clips_eval.evaluate" and record.args]  # type: ignore[index, call-overload]
    assert logged == ["mmvet", "nocaps_val", "gqa"]
    with raises_user_error(key="tasks"):
        main(words)


@pytest.mark.parametrize(
    ("options", "key"),
    [
        (["--model", "vllm", "--control", "blank"], "control"),
        (["--model", "llava_hf", "--quantize", "8bit"], "quantize"),
        (["--model", "openai", "--dtype", "float32"], "dtype"),
        (["--model_args", "a=1"], "model_args"),
        (["--model", "vllm"], "model"),
        (["--data.clips_mmbnch=x.parquet"], "data"),
        (["--limit", "0"], "limit"),
        (["--output", "."], "output"),
    ],
)
def test_bad_option_or_one_without_effect_is_refused(
    checkpoint: Path, recipe: Path, options: list[str], key: str
) -> None:
    with raises_user_error(key=key):
        main([str(checkpoint), "--config", str(recipe), *options])


def test_result_file_names() -> None:
    hub = EvaluateRecipe(checkpoint="llava-hf/llava-1.5-7b-hf", tasks=[TaskSpec(task="gqa")], control="all")
    assert str(hub.results) == "runs/baselines/clips_mllm-llava-hf--llava-1.5-7b-hf/lmms.json"
    assert [hub.result_of(variant).name for variant in hub.variants] == [
        "lmms.json",
        "lmms_shuffled.json",
        "lmms_blank.json",
        "lmms_no_image.json",
    ]
    both = EvaluateRecipe(checkpoint="m", tasks=[TaskSpec(task="gqa")], control="blank", wording="1")
    assert [both.result_of(variant).name for variant in both.variants] == ["lmms_blank_wording1.json"]


# --- during training --------------------------------------------------------------------------------------------------


def train_a_little(mllm: SimpleNamespace, scorer: Any) -> tuple[list[float], list[dict[str, float]]]:
    """Six steps with dropout and random batches; losses, and the scores at steps 2 and 4."""
    import copy

    import torch

    torch.manual_seed(0)
    mllm = SimpleNamespace(model=copy.deepcopy(mllm.model), processor=mllm.processor, device=mllm.device)
    model = mllm.model.train()
    for layer in model.model.language_model.layers:
        layer.self_attn.attention_dropout = 0.1
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses, scores = [], []
    for step in range(6):
        ids = torch.randint(1, 200, (2, 12))
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        if scorer is not None and step in (2, 4):
            scores.append(scorer.evaluate(mllm, step))
            assert model.training
    return losses, scores


def test_scores_during_training_equal_the_commands(
    checkpoint: Path, mllm: SimpleNamespace, recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also on a rank of several, which answers all documents."""
    from clips_eval.lmms.in_training import load_scorer

    main([str(checkpoint), "--config", str(recipe), "--limit", "5", "--output", str(tmp_path / "lmms.json")])
    limited = tmp_path / "limited.yaml"
    limited.write_text(recipe.read_text() + "limit: 5\n")
    scorer = load_scorer(str(limited))
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    scores = scorer.evaluate(mllm, step=1)
    tasks = read(tmp_path / "lmms.json")[0]["tasks"]
    expected = {
        f"{task.removeprefix('clips_')}_{metric}": value
        for task, metrics in tasks.items()
        for metric, value in metrics.items()
        if metric != "n"
    }
    assert scores == expected and set(scores) <= set(scorer.names)


def test_evaluation_during_training_does_not_change_losses(mllm: SimpleNamespace, recipe: Path, tmp_path: Path) -> None:
    from clips_eval.lmms.in_training import load_scorer

    without, _ = train_a_little(mllm, None)
    measured, scores = train_a_little(mllm, load_scorer(str(recipe)))
    assert measured == without
    assert len(scores) == 2 and {"pope_random_accuracy", "mmbench_accuracy", "easy_vqa_open_accuracy"} <= set(scores[0])
    assert all(0 <= value <= 1 for value in scores[1].values())


def test_unsupported_options_during_training_are_refused(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    from clips_eval.lmms import requirements
    from clips_eval.lmms.in_training import load_scorer

    monkeypatch.setattr(requirements, "_reachable", lambda dataset: False)
    bad, given = tmp_path / "bad.yaml", recipe.read_text()
    for text, key, value in (
        (f"{given}control: all\n", "control", "all"),
        (f"{given}wording: '1'\n", "wording", "1"),
        (f"{given}mode: simple\n", "mode", "simple"),
        (f"{given}model: llava_hf\n", "model", "llava_hf"),
        (given.replace("tasks:", "tasks:\n  - {task: gqqa}"), "tasks", "gqqa"),
        (given.replace("tasks:", "tasks:\n  - {task: gqa}"), "tasks", None),
    ):
        bad.write_text(text)
        with raises_user_error(file=bad, key=key, value=value):
            load_scorer(str(bad))
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    bad.write_text(given + "seed: 7\nlimit: 2\n")
    assert load_scorer(str(bad)).recipe.seed == 7 and torch.rand(1) == expected
