"""lmms-eval glue: batched answers equal plain ones, the shuffled control, metrics, bad data, and the whole command."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from clips_eval.evaluate import main
from clips_eval.lmms.data import check_data
from clips_eval.lmms.images import derangement
from clips_eval.lmms.recipe import EvaluateRecipe, TaskSpec, check_specs
from clips_eval.tasks import OWN_TASKS, metrics
from clips_mllm.model.image_features import FeatureCache
from tests.helpers.errors import raises_user_error
from tests.helpers.tiny_llava import (
    ROWS,
    build_tiny_mllm,
    easy_vqa_rows,
    make_image,
    make_requests,
    mmbench_rows,
    plain_answer,
    pope_rows,
    write_parquet,
)
from vision_tower.common.errors import UserError, run_command
from vision_tower.common.recipe import parse_recipe

CONFIGS = Path(__file__).parents[2] / "configs" / "eval"


@pytest.fixture(scope="module")
def mllm() -> SimpleNamespace:
    return build_tiny_mllm()


DOCUMENTS = [
    ([make_image(1)], "Is there a cat?"),
    ([make_image(2)], "What colour?"),
    ([], "Without an image, what then?"),
    ([make_image(1)], "Is there a dog?"),
    ([make_image(3), make_image(4)], "Which of the two is larger?"),
    ([make_image(2)], "Is there a rather small elephant?"),
    ([make_image(5)], "?"),
    ([make_image(4), make_image(3)], "Which of the two is larger?"),
    ([make_image(1)], "Is there a cat?"),
]


# --- the model class --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [1, 4, 16])
def test_batched_answers_equal_plain_generate(mllm: SimpleNamespace, batch_size: int) -> None:
    from clips_eval.lmms.model import ClipsMllm

    model = ClipsMllm(mllm=mllm, batch_size=batch_size)
    answers = model.generate_until(make_requests(DOCUMENTS, model))
    expected = [plain_answer(mllm, images, question) for images, question in DOCUMENTS]
    assert answers == expected
    assert len(set(expected)) > len(DOCUMENTS) // 2, "the fixture must tell documents apart"


def test_features_are_computed_once_an_image_and_equal_the_towers(mllm: SimpleNamespace) -> None:
    from clips_eval.lmms.model import ClipsMllm

    seen: list[int] = []
    handle = mllm.model.model.vision_tower.register_forward_pre_hook(lambda module, args: seen.append(len(args[0])))
    try:
        model = ClipsMllm(mllm=mllm, batch_size=2)
        model.generate_until(make_requests(DOCUMENTS, model))
    finally:
        handle.remove()
    assert sum(seen) == 5  # images 1 to 5, though shown nine times
    from vision_tower.common.hashes import image_hash

    pixels = mllm.processor.image_processor([make_image(4)], return_tensors="pt")["pixel_values"]
    with torch.inference_mode():
        alone = mllm.model.get_image_features(pixel_values=pixels, return_dict=True).pooler_output[0]
    kept = model.features.get(image_hash(make_image(4)))
    assert kept is not None
    torch.testing.assert_close(kept, alone, atol=1e-5, rtol=1e-5)


def test_a_shared_beginning_is_read_once(mllm: SimpleNamespace) -> None:
    """Four questions about two images: the model reads two beginnings with an "A", then the rests alone."""
    from clips_eval.lmms.model import ClipsMllm

    documents = [([make_image(n % 2)], question) for n, question in enumerate(("A cat?", "Anything?", "A dog?", "A?"))]
    expected = [plain_answer(mllm, images, question) for images, question in documents]
    seen: list[tuple[int, ...]] = []
    language = mllm.model.model.language_model
    handle = language.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(tuple(kwargs["inputs_embeds"].shape[:2])), with_kwargs=True
    )
    try:
        model = ClipsMllm(mllm=mllm, batch_size=4)
        assert model.generate_until(make_requests(documents, model)) == expected
    finally:
        handle.remove()
    beginning = len("<|user|>") + 4 + len("A")  # tokens are characters here; an image has four
    assert seen[0] == (2, beginning)
    assert seen[1] == (4, len("nything?") + len("<|assistant|>"))


def test_small_cache_gives_the_same_answers(mllm: SimpleNamespace) -> None:
    from clips_eval.lmms.model import ClipsMllm

    model, small = ClipsMllm(mllm=mllm, batch_size=4), ClipsMllm(mllm=mllm, batch_size=4, cache_gb=0)
    assert small.generate_until(make_requests(DOCUMENTS, small)) == model.generate_until(
        make_requests(DOCUMENTS, model)
    )
    cache = FeatureCache(budget=3 * 16)
    for name in "abcd":
        cache.put(name, torch.zeros(2, 2))
    assert [cache.get(name) is not None for name in "abcd"] == [False, True, True, True] and cache.size == 48


def test_shuffled_shows_other_images_and_keeps_the_questions(mllm: SimpleNamespace) -> None:
    from clips_eval.lmms.model import ClipsMllm
    from vision_tower.common.hashes import image_hash

    answers = [
        (model := ClipsMllm(mllm=mllm, batch_size=4, control="shuffled", seed=1)).generate_until(
            make_requests(DOCUMENTS, model)
        )
        for _ in range(2)
    ]
    assert answers[0] == answers[1]
    digests = {image_hash(make_image(n)): n for n in range(1, 6)}
    other = {digests[a]: digests[b] for a, b in derangement(digests, 1).items()}
    shown = [([make_image(other[digests[image_hash(i)]]) for i in images], text) for images, text in DOCUMENTS]
    assert answers[0] == [plain_answer(mllm, images, text) for images, text in shown]
    with pytest.raises(UserError, match="two different images"):
        model.generate_until(make_requests(DOCUMENTS[:1], model))


@pytest.mark.parametrize("count", [2, 3, 50])
def test_derangement_moves_every_name(count: int) -> None:
    names = [f"name {n}" for n in range(count)]
    moved = derangement(names, seed=7)
    assert sorted(moved) == sorted(moved.values()) == sorted(names)
    assert all(a != b for a, b in moved.items())
    assert moved == derangement(reversed(names), seed=7)
    assert count < 50 or moved != derangement(names, seed=8)


def test_a_failing_document_raises_and_is_named(mllm: SimpleNamespace) -> None:
    from clips_eval.lmms.model import ClipsMllm

    model = ClipsMllm(mllm=mllm)
    with pytest.raises(UserError, match="task t, document 1: 2 '<image>' in the prompt but 1 images"):
        model.generate_until(make_requests([DOCUMENTS[0], ([make_image(1)], "What is <image>?")], model))


def test_bad_arguments_of_the_model_are_said(mllm: SimpleNamespace) -> None:
    from clips_eval.lmms.model import ClipsMllm

    bare = SimpleNamespace(model=mllm.model, processor=SimpleNamespace(chat_template=None), device=mllm.device)
    with pytest.raises(UserError, match="no chat template"):
        ClipsMllm(mllm=bare)
    with pytest.raises(UserError, match="batch_size: 'auto'"):
        ClipsMllm(mllm=mllm, batch_size="auto")
    with pytest.raises(UserError, match="no checkpoint"):
        ClipsMllm()
    with pytest.raises(UserError, match="quantize '5bit' is unknown; choose from none, 4bit, 8bit"):
        ClipsMllm("m", quantize="5bit")
    with pytest.raises(UserError, match="control 'mixed' is unknown"):
        ClipsMllm(mllm=mllm, control="mixed")


def test_generation_options() -> None:
    from clips_eval.lmms.batches import cut, generation_options

    greedy = generation_options({"temperature": 0, "top_p": 0, "until": ["\n\n"], "max_new_tokens": 16})
    assert (greedy["do_sample"], greedy["temperature"], greedy["top_p"], greedy["until"]) == (False, None, None, [])
    warm = generation_options({"temperature": 0.7, "do_sample": True, "until": "END"})
    assert (warm["do_sample"], warm["temperature"], warm["until"]) == (True, 0.7, ["END"])
    assert cut("yes END no STOP", ["STOP", "END"]) == "yes " and cut("yes", ["END"]) == "yes"


def test_until_stops_the_answer(mllm: SimpleNamespace) -> None:
    from clips_eval.lmms.model import ClipsMllm

    model = ClipsMllm(mllm=mllm, batch_size=4)
    requests = make_requests(DOCUMENTS, model)
    whole = model.generate_until(requests)
    stop = whole[0][2]
    for request in requests:
        request.args[2]["until"] = [stop]
    assert model.generate_until(requests) == [text.split(stop)[0] for text in whole]


# --- metrics ----------------------------------------------------------------------------------------------------------


def test_pope_metrics_by_hand() -> None:
    pairs = [("yes", "yes"), ("yes", "no"), ("no", "yes"), ("no", "no"), ("maybe", "yes")]
    rows = [{"prediction": said, "ground_truth": truth} for said, truth in pairs]
    assert metrics.pope_precision(rows) == 1 / 2
    assert metrics.pope_recall(rows) == 1 / 3  # "maybe" has not found the object
    assert metrics.pope_f1(rows) == pytest.approx(2 / 5)
    assert metrics.pope_yes_ratio(rows) == 2 / 5
    assert metrics.pope_f1([{"prediction": "no", "ground_truth": "yes"}]) == 0.0


def test_mmbench_prompt_letter_and_circular_accuracy() -> None:
    doc = {"index": 3, "question": "What?", "hint": "nan", "answer": "B", "A": "a cat", "B": "a dog", "C": "nan"}
    doc |= {"D": "nan"}
    post = {"post_prompt": "\nAnswer with the option's letter from the given choices directly."}
    assert metrics.mmbench_doc_to_text(doc, post) == f"What?\nA. a cat\nB. a dog{post['post_prompt']}"
    assert metrics.mmbench_doc_to_text(doc | {"hint": "Look."}).startswith("Look.\nWhat?")
    said = {"B": "B", " (B) ": "B", "B.": "B", "B. a dog": "B", "A dog": "", "D": "", "b": "", "a dog": "", "": ""}
    assert {answer: metrics.mmbench_letter(answer, "AB") for answer in said} == said
    row = metrics.mmbench_process_results(doc, ["B"])["accuracy"]
    assert row["score"] == 1.0
    rotated = [row, {**row, "index": 1_000_003, "score": 0.0}, {**row, "index": 4}]
    assert metrics.mmbench_accuracy(rotated) == 1 / 2


def test_easy_vqa_metrics_by_hand() -> None:
    said = [("open", "Red.", "red"), ("open", "blue", "red"), ("yes_no", " yes", "yes"), ("yes_no", "no way", "no")]
    rows = [
        metrics.easy_vqa_process_results({"answer": truth, "kind": kind}, [answer])["accuracy"]
        for kind, answer, truth in [*said, ("open", "red", "red")]
    ]
    assert metrics.easy_vqa_accuracy(rows) == 3 / 5
    assert metrics.easy_vqa_open_accuracy(rows) == 2 / 3
    assert metrics.easy_vqa_yes_no_accuracy(rows) == 1 / 2
    assert metrics.easy_vqa_open_accuracy(rows[2:3]) is None


# --- data and recipes -------------------------------------------------------------------------------------------------


def without(rows: list[dict[str, Any]], column: str) -> list[dict[str, Any]]:
    return [{key: value for key, value in row.items() if key != column} for row in rows]


@pytest.mark.parametrize("task", ROWS)
def test_good_data_passes_and_a_missing_column_is_named(tmp_path: Path, task: str) -> None:
    good = write_parquet(tmp_path / "good.parquet", ROWS[task]())
    check_data(str(good), task)
    check_data(str(tmp_path / "go*.parquet"), task)
    for column in OWN_TASKS[task]:
        bad = write_parquet(tmp_path / "bad.parquet", without(ROWS[task](), column))
        with pytest.raises(UserError, match=f"bad.parquet: no column '{column}'"):
            check_data(str(bad), task)


def test_bad_data_is_said_in_one_line(tmp_path: Path) -> None:
    rows = pope_rows()
    (tmp_path / "text.parquet").write_text("not parquet")
    cases = {
        str(tmp_path / "none.parquet"): "no such file",
        str(tmp_path / "none*.parquet"): "no such file",
        str(tmp_path / "text.parquet"): "not a readable parquet file",
        str(write_parquet(tmp_path / "empty.parquet", [], tuple(rows[0]))): "has no rows",
        str(
            write_parquet(tmp_path / "answer.parquet", [*rows, {**rows[0], "answer": "maybe"}])
        ): "row 6: answer 'maybe'",
    }
    for data, message in cases.items():
        with pytest.raises(UserError, match=message):
            check_data(data, "clips_pope_random")
    kind = write_parquet(tmp_path / "kind.parquet", [{**easy_vqa_rows()[0], "kind": "shape"}])
    with pytest.raises(UserError, match="row 0: kind 'shape'"):
        check_data(str(kind), "clips_easy_vqa")
    letter = write_parquet(tmp_path / "letter.parquet", [{**mmbench_rows()[0], "answer": "C"}])
    with pytest.raises(UserError, match="row 0: answer 'C' should be one of A, B"):
        check_data(str(letter), "clips_mmbench")
    for task, change, message in (
        ("clips_pope_random", {"question": None}, "row 1: has no question"),
        ("clips_pope_random", {"question_id": None}, "row 1: has no id"),
        ("clips_easy_vqa", {"image": None}, "row 1: has no image"),
        ("clips_mmbench", {"image": {"bytes": None, "path": None}}, "row 1: has no image"),
        ("clips_mmbench", {"B": None}, "row 1: has fewer than two options"),
    ):
        good = ROWS[task]()
        data = write_parquet(tmp_path / "null.parquet", [good[0], good[1] | change])
        with pytest.raises(UserError, match=f"null.parquet: {message}"):
            check_data(str(data), task)
    for name in ("part0", "part1"):
        write_parquet(tmp_path / f"{name}.parquet", [rows[1], {**rows[2], "question_id": name}])
    with pytest.raises(UserError, match=r"part1.parquet: row 0: id 1 is that of \S+part0.parquet: row 0 too"):
        check_data(str(tmp_path / "part*.parquet"), "clips_pope_random")
    for specs, message in (
        ([], "list is empty"),
        ([TaskSpec(task="gqa"), TaskSpec(task="gqa")], "twice"),
        ([TaskSpec(task="clips_mmbench")], "no data of its own"),
    ):
        with pytest.raises(UserError, match=message):
            check_specs(specs)


def test_unknown_task_names_the_nearest(tmp_path: Path) -> None:
    from clips_eval.lmms.tasks import index_tasks

    data = str(write_parquet(tmp_path / "p.parquet", pope_rows()))
    with pytest.raises(UserError, match="unknown task 'mmbench_en_dev_statik'; nearest names: mmbench_en_dev_static"):
        index_tasks([TaskSpec(task="mmbench_en_dev_statik", data=data)])


def test_a_stock_task_reads_local_data(tmp_path: Path) -> None:
    from clips_eval.lmms.tasks import index_tasks, load_task

    data = write_parquet(tmp_path / "pope.parquet", pope_rows())
    spec = TaskSpec(task="pope", data=str(data))
    (task,) = load_task(spec, index_tasks([spec]), tmp_path / "cache").values()
    assert len(task.eval_docs) == 6
    assert task.doc_to_text(task.eval_docs[0]).endswith("?\nAnswer the question using a single word or phrase.")


@pytest.mark.parametrize("recipe", sorted(CONFIGS.glob("*.yaml")), ids=lambda file: file.stem)
def test_shipped_recipes_parse(recipe: Path) -> None:
    parsed = parse_recipe(
        EvaluateRecipe,
        ["MODEL", "--config", str(recipe), "--limit", "3"],
        command="evaluate",
        positional=("checkpoint",),
    )
    assert parsed.checkpoint == "MODEL" and parsed.limit == 3 and parsed.tasks
    assert all((spec.data is not None) == (spec.task in OWN_TASKS) for spec in parsed.tasks)


def test_a_misspelt_key_of_a_task_names_its_place(tmp_path: Path) -> None:
    recipe = tmp_path / "r.yaml"
    recipe.write_text("tasks:\n  - {task: gqa}\n  - {task: pope, dta: x}\n")
    with raises_user_error(file=recipe, key="tasks[1].dta"):
        parse_recipe(EvaluateRecipe, ["M", "--config", str(recipe)], command="evaluate", positional=("checkpoint",))


# --- the whole command ------------------------------------------------------------------------------------------------


@pytest.fixture
def run_folder(tmp_path: Path, mllm: SimpleNamespace) -> Path:
    """A checkpoint, a parquet file for every task of ours, and a recipe."""
    mllm.model.save_pretrained(tmp_path / "model")
    mllm.processor.save_pretrained(tmp_path / "model")
    lines = ["tasks:"]
    for task in OWN_TASKS:
        data = write_parquet(tmp_path / "data" / f"{task}.parquet", ROWS.get(task, pope_rows)())
        lines.append(f"  - {{task: {task}, data: {data}}}")
    (tmp_path / "recipe.yaml").write_text("\n".join([*lines, "batch_size: 4", "device: cpu", ""]))
    return tmp_path


def test_evaluate_end_to_end(run_folder: Path, mllm: SimpleNamespace, capsys: pytest.CaptureFixture[str]) -> None:
    argv = [str(run_folder / "model"), "--config", str(run_folder / "recipe.yaml")]
    assert run_command(main, argv) == 0
    result = json.loads((run_folder / "model" / "lmms.json").read_text())
    assert result["control"] == "none" and result["command"].startswith("clips-mllm evaluate")
    assert {task: scores["n"] for task, scores in result["tasks"].items()} == {
        "clips_pope_random": 6,
        "clips_pope_popular": 6,
        "clips_pope_adversarial": 6,
        "clips_mmbench": 4,
        "clips_easy_vqa": 4,
    }
    assert set(result["tasks"]["clips_pope_random"]) == {"accuracy", "precision", "recall", "f1", "yes_ratio", "n"}
    assert set(result["tasks"]["clips_easy_vqa"]) == {"accuracy", "open_accuracy", "yes_no_accuracy", "n"}
    rows = [json.loads(line) for line in (run_folder / "model" / result["samples_file"]).read_text().splitlines()]
    assert len(rows) == 26
    by_task = {task: [row for row in rows if row["task"] == task] for task in OWN_TASKS}
    pope = by_task["clips_pope_random"]
    assert [row["doc_id"] for row in pope] == list(range(6))
    assert sum(row["correct"] for row in pope) / 6 == result["tasks"]["clips_pope_random"]["accuracy"]
    assert all((run_folder / "model" / row["image"]).is_file() for row in pope)
    assert "clips_mmbench" in capsys.readouterr().out
    assert not list((run_folder / "model").glob(".lmms-*"))


def test_evaluate_shuffled_with_limit(run_folder: Path) -> None:
    argv = [str(run_folder / "model"), "--config", str(run_folder / "recipe.yaml"), "--limit", "3"]
    assert run_command(main, [*argv, "--control", "shuffled"]) == 0
    result = json.loads((run_folder / "model" / "lmms_shuffled.json").read_text())
    assert result["control"] == "shuffled" and all(scores["n"] == 3 for scores in result["tasks"].values())


def test_evaluate_with_bad_input_leaves_nothing(run_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (run_folder / "data" / "clips_mmbench.parquet").unlink()
    before = sorted((run_folder / "model").iterdir())
    argv = [str(run_folder / "model"), "--config", str(run_folder / "recipe.yaml")]
    assert run_command(main, argv) == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("error: ") and "clips_mmbench.parquet: no such file" in error and "\n" not in error
    assert sorted((run_folder / "model").iterdir()) == before
    assert run_command(main, ["/nowhere", *argv[1:]]) == 2
    assert "checkpoint: " in capsys.readouterr().err
