"""lmms-eval integration: batched answers, the shuffled control, metrics, bad data, and the command."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from clips_eval.evaluate import main
from clips_eval.lmms.batches import derangement, generation_options, truncate
from clips_eval.lmms.data import check_data
from clips_eval.lmms.recipe import EvaluateRecipe, TaskSpec, check_specs
from clips_eval.tasks import OWN_TASKS, metrics
from clips_mllm.model.image_features import FeatureCache
from tests.helpers.errors import raises_user_error
from tests.helpers.tiny_llava import (
    ROWS,
    build_tiny_mllm,
    make_image,
    make_requests,
    plain_answer,
    pope_rows,
    write_parquet,
)
from vision_tower.common.errors import run_command
from vision_tower.common.recipe import parse_recipe

CONFIGS = Path(__file__).parents[2] / "configs" / "eval"


@pytest.fixture(scope="module")
def mllm() -> SimpleNamespace:
    return build_tiny_mllm()


DOCUMENTS = [
    ([make_image(1)], "Is there a cat?"),
    ([make_image(2)], "What color?"),
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
    assert len(set(expected)) > len(DOCUMENTS) // 2, "answers must differ between documents"


def test_features_are_computed_once_per_image(mllm: SimpleNamespace) -> None:
    from clips_eval.lmms.model import ClipsMllm

    seen: list[int] = []
    handle = mllm.model.model.vision_tower.register_forward_pre_hook(lambda module, args: seen.append(len(args[0])))
    try:
        model = ClipsMllm(mllm=mllm, batch_size=2)
        model.generate_until(make_requests(DOCUMENTS, model))
    finally:
        handle.remove()
    assert sum(seen) == 5  # five distinct images in nine documents
    from vision_tower.common.hashes import image_hash

    pixels = mllm.processor.image_processor([make_image(4)], return_tensors="pt")["pixel_values"]
    with torch.inference_mode():
        alone = mllm.model.get_image_features(pixel_values=pixels, return_dict=True).pooler_output[0]
    kept = model.features.get(image_hash(make_image(4)))
    assert kept is not None
    torch.testing.assert_close(kept, alone, atol=1e-5, rtol=1e-5)


def test_shared_prefix_is_computed_once(mllm: SimpleNamespace) -> None:
    """Four questions about two images: two prefixes up to the common "A", then only the rest of each question."""
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
    prefix = len("<|user|>") + 4 + len("A")  # tokens are characters here; an image has four
    assert seen[0] == (2, prefix)
    assert seen[1] == (4, len("nything?") + len("<|assistant|>"))


def test_feature_cache_eviction_does_not_change_answers(mllm: SimpleNamespace) -> None:
    from clips_eval.lmms.model import ClipsMllm

    model, small = ClipsMllm(mllm=mllm, batch_size=4), ClipsMllm(mllm=mllm, batch_size=4, cache_gb=0)
    assert small.generate_until(make_requests(DOCUMENTS, small)) == model.generate_until(
        make_requests(DOCUMENTS, model)
    )
    cache = FeatureCache(budget=3 * 16)
    for name in "abcd":
        cache.put(name, torch.zeros(2, 2))
    assert [cache.get(name) is not None for name in "abcd"] == [False, True, True, True] and cache.size == 48


def test_shuffled_control_exchanges_images_only(mllm: SimpleNamespace) -> None:
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
    with raises_user_error(key="control", value="shuffled"):
        model.generate_until(make_requests(DOCUMENTS[:1], model))


@pytest.mark.parametrize("count", [2, 3, 50])
def test_derangement_moves_every_name(count: int) -> None:
    names = [f"name {n}" for n in range(count)]
    moved = derangement(names, seed=7)
    assert sorted(moved) == sorted(moved.values()) == sorted(names)
    assert all(a != b for a, b in moved.items())
    assert moved == derangement(reversed(names), seed=7)
    assert count < 50 or moved != derangement(names, seed=8)


def test_bad_document_is_named(mllm: SimpleNamespace) -> None:
    from clips_eval.lmms.model import ClipsMllm

    model = ClipsMllm(mllm=mllm)
    with raises_user_error(file="task t, document 1"):
        model.generate_until(make_requests([DOCUMENTS[0], ([make_image(1)], "What is <image>?")], model))


def test_bad_model_arguments_are_refused(mllm: SimpleNamespace) -> None:
    from clips_eval.lmms.model import ClipsMllm

    bare = SimpleNamespace(model=mllm.model, processor=SimpleNamespace(chat_template=None), device=mllm.device)
    with raises_user_error(file="folder"):
        ClipsMllm("folder", mllm=bare)
    with raises_user_error(key="batch_size", value="auto"):
        ClipsMllm(mllm=mllm, batch_size="auto")
    with raises_user_error(key="pretrained"):
        ClipsMllm()
    with raises_user_error(key="quantize", value="5bit"):
        ClipsMllm("m", quantize="5bit")
    with raises_user_error(key="control", value="mixed"):
        ClipsMllm(mllm=mllm, control="mixed")


def test_generation_options() -> None:
    greedy = generation_options({"temperature": 0, "top_p": 0, "until": ["\n\n"], "max_new_tokens": 16})
    assert (greedy["do_sample"], greedy["temperature"], greedy["top_p"], greedy["until"]) == (False, None, None, [])
    warm = generation_options({"temperature": 0.7, "do_sample": True, "until": "END"})
    assert (warm["do_sample"], warm["temperature"], warm["until"]) == (True, 0.7, ["END"])
    assert truncate("yes END no STOP", ["STOP", "END"]) == "yes " and truncate("yes", ["END"]) == "yes"


def test_until_truncates_answers(mllm: SimpleNamespace) -> None:
    from clips_eval.lmms.model import ClipsMllm

    model = ClipsMllm(mllm=mllm, batch_size=4)
    requests = make_requests(DOCUMENTS, model)
    answers = model.generate_until(requests)
    stop = answers[0][2]
    for request in requests:
        request.args[2]["until"] = [stop]
    assert model.generate_until(requests) == [text.split(stop)[0] for text in answers]


# --- metrics ----------------------------------------------------------------------------------------------------------


def test_pope_metrics_by_hand() -> None:
    pairs = [("yes", "yes"), ("yes", "no"), ("no", "yes"), ("no", "no"), ("maybe", "yes")]
    rows = [{"prediction": answer, "ground_truth": truth} for answer, truth in pairs]
    assert metrics.pope_precision(rows) == 1 / 2
    assert metrics.pope_recall(rows) == 1 / 3  # "maybe" counts as not found
    assert metrics.pope_f1(rows) == pytest.approx(2 / 5)
    assert metrics.pope_yes_ratio(rows) == 2 / 5
    assert metrics.pope_f1([{"prediction": "no", "ground_truth": "yes"}]) == 0.0


def test_mmbench_prompt_letter_and_circular_accuracy() -> None:
    doc = {"index": 3, "question": "What?", "hint": "nan", "answer": "B", "A": "a cat", "B": "a dog", "C": "nan"}
    doc |= {"D": "nan"}
    post = {"post_prompt": "\nAnswer with the option's letter from the given choices directly."}
    assert metrics.mmbench_doc_to_text(doc, post) == f"What?\nA. a cat\nB. a dog{post['post_prompt']}"
    assert metrics.mmbench_doc_to_text(doc | {"hint": "Look."}).startswith("Look.\nWhat?")
    letters = {"B": "B", " (B) ": "B", "B.": "B", "B. a dog": "B", "A dog": "", "D": "", "b": "", "a dog": "", "": ""}
    assert {answer: metrics.mmbench_letter(answer, "AB") for answer in letters} == letters
    row = metrics.mmbench_process_results(doc, ["B"])["accuracy"]
    assert row["score"] == 1.0
    rotated = [row, {**row, "index": 1_000_003, "score": 0.0}, {**row, "index": 4}]
    assert metrics.mmbench_accuracy(rotated) == 1 / 2


def test_easy_vqa_metrics_by_hand() -> None:
    answers = [("open", "Red.", "red"), ("open", "blue", "red"), ("yes_no", " yes", "yes"), ("yes_no", "no way", "no")]
    rows = [
        metrics.easy_vqa_process_results({"answer": truth, "kind": kind}, [answer])["accuracy"]
        for kind, answer, truth in [*answers, ("open", "red", "red")]
    ]
    assert metrics.easy_vqa_accuracy(rows) == 3 / 5
    assert metrics.easy_vqa_open_accuracy(rows) == 2 / 3
    assert metrics.easy_vqa_yes_no_accuracy(rows) == 1 / 2
    assert metrics.easy_vqa_open_accuracy(rows[2:3]) is None


# --- data and recipes -------------------------------------------------------------------------------------------------


def without(rows: list[dict[str, Any]], column: str) -> list[dict[str, Any]]:
    return [{key: value for key, value in row.items() if key != column} for row in rows]


@pytest.mark.parametrize("task", ROWS)
def test_good_data_passes_and_missing_column_is_named(tmp_path: Path, task: str) -> None:
    good = write_parquet(tmp_path / "good.parquet", ROWS[task]())
    check_data(str(good), task)
    check_data(str(tmp_path / "go*.parquet"), task)
    for column in OWN_TASKS[task]:
        bad = write_parquet(tmp_path / "bad.parquet", without(ROWS[task](), column))
        with raises_user_error(file=bad, key=column):
            check_data(str(bad), task)


def test_bad_data_file_is_named(tmp_path: Path) -> None:
    (tmp_path / "text.parquet").write_text("not parquet")
    write_parquet(tmp_path / "empty.parquet", [], tuple(pope_rows()[0]))
    for name in ("none.parquet", "none*.parquet", "text.parquet", "empty.parquet"):
        with raises_user_error(file=tmp_path / name):
            check_data(str(tmp_path / name), "clips_pope_random")


@pytest.mark.parametrize(
    ("task", "change", "column"),
    [
        ("clips_pope_random", {"answer": "maybe"}, "answer"),
        ("clips_pope_random", {"question": None}, "question"),
        ("clips_pope_random", {"question_id": None}, "question_id"),
        ("clips_pope_random", {"question_id": "0"}, "question_id"),
        ("clips_easy_vqa", {"kind": "shape"}, "kind"),
        ("clips_easy_vqa", {"image": None}, "image"),
        ("clips_mmbench", {"image": {"bytes": None, "path": None}}, "image"),
        ("clips_mmbench", {"answer": "C"}, "answer"),
        ("clips_mmbench", {"B": None}, "A..D"),
    ],
)
def test_bad_row_is_named(tmp_path: Path, task: str, change: dict[str, Any], column: str) -> None:
    good = ROWS[task]()
    data = write_parquet(tmp_path / "bad.parquet", [good[0], good[1] | change])
    with raises_user_error(file=data, key=f"row 1.{column}"):
        check_data(str(data), task)


def test_ids_are_unique_over_all_files(tmp_path: Path) -> None:
    rows = pope_rows()
    for name in ("part0", "part1"):
        write_parquet(tmp_path / f"{name}.parquet", [rows[1], {**rows[2], "question_id": name}])
    with raises_user_error(file=tmp_path / "part1.parquet", key="row 0.question_id", value="'1'") as caught:
        check_data(str(tmp_path / "part*.parquet"), "clips_pope_random")
    assert f"{tmp_path / 'part0.parquet'}: row 0" in caught.value.problem


def test_bad_task_lists_are_refused() -> None:
    for specs, value in (
        ([], None),
        ([TaskSpec(task="gqa"), TaskSpec(task="gqa")], "gqa"),
        ([TaskSpec(task="clips_mmbench")], "clips_mmbench"),
    ):
        with raises_user_error(key="tasks", value=value):
            check_specs(specs)


def test_unknown_task_suggests_the_nearest(tmp_path: Path) -> None:
    from clips_eval.lmms.tasks import index_tasks

    data = str(write_parquet(tmp_path / "p.parquet", pope_rows()))
    with raises_user_error(key="tasks", value="mmbench_en_dev_statik") as caught:
        index_tasks([TaskSpec(task="mmbench_en_dev_statik", data=data)])
    assert "mmbench_en_dev_static" in (caught.value.remedy or "")


def test_stock_task_reads_local_data(tmp_path: Path) -> None:
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


def test_misspelled_key_of_a_task_is_named(tmp_path: Path) -> None:
    recipe = tmp_path / "r.yaml"
    recipe.write_text("tasks:\n  - {task: gqa}\n  - {task: pope, dta: x}\n")
    with raises_user_error(file=recipe, key="tasks[1].dta"):
        parse_recipe(EvaluateRecipe, ["M", "--config", str(recipe)], command="evaluate", positional=("checkpoint",))


# --- the command -------------------------------------------------------------------------------------------------


@pytest.fixture
def run_folder(tmp_path: Path, mllm: SimpleNamespace) -> Path:
    """A checkpoint, a parquet file for each of our tasks, and a recipe."""
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


def test_bad_input_writes_nothing(run_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (run_folder / "data" / "clips_mmbench.parquet").unlink()
    before = sorted((run_folder / "model").iterdir())
    argv = [str(run_folder / "model"), "--config", str(run_folder / "recipe.yaml")]
    assert run_command(main, argv) == 2
    error = capsys.readouterr().err.strip()
    assert str(run_folder / "data" / "clips_mmbench.parquet") in error and "\n" not in error
    assert sorted((run_folder / "model").iterdir()) == before
    assert run_command(main, ["/nowhere", *argv[1:]]) == 2
    assert "checkpoint: " in capsys.readouterr().err
