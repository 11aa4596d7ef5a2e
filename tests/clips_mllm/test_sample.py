"""Sample world: reproducible, in the formats of the real data sets, test material separate from training material."""

from __future__ import annotations

import collections
import hashlib
import io
import itertools
import json
import math
import random
import re
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from clips_mllm.sample import exams, wording
from clips_mllm.sample.build import main
from clips_mllm.sample.instructions import make_choice, presence_question
from clips_mllm.sample.objects import THEMES, glyph, spoken_names
from clips_mllm.sample.scenes import BACKGROUNDS, CELL, GRID, IMAGE, Scene, draw_scene, render_scene
from clips_mllm.sample.shapes import draw_shape, is_open, load_shapes
from tests.helpers.errors import raises_user_error

TINY = {
    "llm": "tiny",
    "pretrain_scenes": 12,
    "pretrain_figures": 3,
    "pretrain_shapes": 3,
    "shard_size": 5,
    "align_scenes": 4,
    "align_shapes": 2,
    "finetune_scenes": 4,
    "finetune_shapes": 2,
    "finetune_pairs": 2,
    "finetune_patch_texts": 2,
    "finetune_patch_text_shapes": 2,
    "finetune_texts": 2,
    "retrieval_scenes": 3,
    "pope_scenes": 2,
    "mmbench_scenes": 2,
    "easy_vqa_questions": 4,
}


def words(folder: Path, **values: Any) -> list[str]:
    return [f"--{name}={value}" for name, value in ({"output_dir": folder} | TINY | values).items()]


def read_parquet(file: Path) -> list[dict[str, Any]]:
    import pyarrow.parquet as pq

    return pq.read_table(file).to_pylist()


def rows_of(world: Path, stage: str) -> list[dict[str, Any]]:
    return json.loads((world / "llava" / f"{stage}.json").read_text())


def images_of(row: dict[str, Any]) -> list[str]:
    given = row.get("image", [])
    return [given] if isinstance(given, str) else given


def shard_rows(world: Path) -> dict[str, dict[str, bytes]]:
    rows: dict[str, dict[str, bytes]] = {}
    for file in sorted((world / "pretrain").glob("*.tar")):
        with tarfile.open(file) as tar:
            for member in tar:
                stream = tar.extractfile(member)
                assert stream is not None
                key, _, ending = member.name.partition(".")
                rows.setdefault(key, {})[ending] = stream.read()
    return rows


def pixels(content: bytes) -> bytes:
    from PIL import Image

    return Image.open(io.BytesIO(content)).convert("RGB").tobytes()


def digests(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def test_two_builds_are_byte_identical(tmp_path: Path) -> None:
    main(words(tmp_path / "a"))
    # Another process has another hash seed.
    command = [sys.executable, "-m", "clips_mllm.sample.build", *words(tmp_path / "b")]
    subprocess.run(command, check=True, capture_output=True, timeout=120)
    first, second = digests(tmp_path / "a"), digests(tmp_path / "b")
    for world in (first, second):
        world.pop("world.json")  # contains output_dir
    assert first == second
    main(words(tmp_path / "c", seed=1))
    other = digests(tmp_path / "c")
    same = {name for name in first if name in other and first[name] == other[name]}
    assert not {name for name in same if name.endswith((".tar", ".parquet")) or name.startswith("llava/stage")}


def test_interrupted_build_leaves_no_partial_world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(exams, "karpathy_json", interrupt)
        with pytest.raises(KeyboardInterrupt):
            main(words(tmp_path / "world"))
    assert not (tmp_path / "world").exists()
    main(words(tmp_path / "world"))  # files of the interrupted build do not matter
    assert sorted(path.name for path in tmp_path.iterdir()) == ["world"]
    with raises_user_error(file=tmp_path / "world"):
        main(words(tmp_path / "world"))


@pytest.mark.parametrize("name", ["pretrain_scenes", "shard_size", "retrieval_scenes", "easy_vqa_questions"])
def test_counts_that_give_an_empty_file_are_refused(tmp_path: Path, name: str) -> None:
    with raises_user_error(key=name, value=0):
        main(words(tmp_path / "world", **{name: 0}))
    assert not list(tmp_path.iterdir())


def test_objects_have_distinct_names_and_glyphs() -> None:
    names = spoken_names()
    assert len(names) >= 120
    assert len(set(names.values())) == len(names)
    assert sum(len(members) for members in THEMES.values()) == len(names), "an object in two themes"
    images = {glyph(short, 24).tobytes() for short in names}
    assert len(images) == len(names)


def test_objects_stay_in_their_cells() -> None:
    for index in range(60):
        scene = draw_scene(0, "cells", index)
        image, cells = render_scene(scene), {(thing.row, thing.column) for thing in scene.things}
        assert image.size == (IMAGE, IMAGE) and len(cells) == len(scene.things) in range(1, 5)
        for row, column in itertools.product(range(GRID), repeat=2):
            box = (column * CELL, row * CELL, (column + 1) * CELL, (row + 1) * CELL)
            colors = image.crop(box).getcolors(CELL * CELL)
            assert colors is not None
            assert (len(colors) > 1) == ((row, column) in cells), (scene.key, row, column)
            if len(colors) == 1:
                assert colors[0][1] == BACKGROUNDS[scene.background]


def test_captions_are_true() -> None:
    for index in range(100):
        scene = draw_scene(0, "true", index)
        here = {wording.name_of(thing) for thing in scene.things}
        others = set(spoken_names().values()) - here
        caption = wording.synthetic_caption(scene, random.Random(index))
        assert all(re.search(rf"\b{re.escape(name)}\b", caption) for name in here)
        plain = caption
        for name in sorted(here, key=len, reverse=True):
            plain = plain.replace(name, "")
        # Words like 'fish' or 'light' can be part of a sentence; names with an article cannot.
        assert not [name for name in others if f" {wording.article(name)} " in plain]
        for first, second in re.findall(r"The ([\w ]+?) is to the left of the ([\w ]+?)\.", caption):
            columns = {wording.name_of(thing): thing.column for thing in scene.things}
            assert columns[first] < columns[second]
        for first, second in re.findall(r"The ([\w ]+?) is above the ([\w ]+?)\.", caption):
            lines = {wording.name_of(thing): thing.row for thing in scene.things}
            assert lines[first] < lines[second]
        backgrounds = set(re.findall(r"(?:background is|on a) (\w+)", caption))
        assert backgrounds == {scene.background}


def skeleton(text: str) -> str:
    """Return a caption without names of objects, colors, sizes, places, numbers and articles."""
    text = text.lower()
    for name in sorted([*spoken_names().values(), *wording.PLACES], key=len, reverse=True):
        text = re.sub(rf"\b{re.escape(name)}\b", "@", text)
    for word in (*BACKGROUNDS, "small", "large", "an", "a", "one", "two", "three", "four"):
        text = re.sub(rf"\b{word}\b", "@", text)
    return re.sub(r"@(?:[\s,]|\band\b|@)*", "@ ", text).strip()


def test_test_captions_share_no_template_with_training_text(sample_world: Path) -> None:
    trained: set[str] = set()
    for row in shard_rows(sample_world).values():
        captions = json.loads(row["json"])
        for sentence in [captions["web_caption"], *captions["synthetic_caption"].split(". ")]:
            trained.add(skeleton(sentence.rstrip(".")))
    for stage in ("stage1", "stage2"):
        for row in rows_of(sample_world, stage):
            trained |= {skeleton(turn["value"].removeprefix("<image>\n").rstrip(".")) for turn in row["conversations"]}
    for index in range(200):  # every training template with every number of objects
        scene, rng = draw_scene(9, "skeletons", index), random.Random(index)
        for sentence in wording.synthetic_caption(scene, rng).split(". "):
            trained.add(skeleton(sentence.rstrip(".")))
    retrieval = json.loads((sample_world / "retrieval" / "test.json").read_text())
    tested = {skeleton(text["raw"].rstrip(".")) for image in retrieval["images"] for text in image["sentences"]}
    assert len(tested) >= 5 and not tested & trained
    assert not set(wording.TEST_CAPTIONS) & {*wording.SUMMARIES, *wording.OBJECTS, *wording.WEB, *wording.CHATTER}


def test_test_images_are_not_training_images(sample_world: Path) -> None:
    trained = {key: pixels(row["png"]) for key, row in shard_rows(sample_world).items()}
    for file in (sample_world / "llava" / "images").iterdir():
        trained[file.stem] = pixels(file.read_bytes())
    tested = {file.stem: pixels(file.read_bytes()) for file in (sample_world / "retrieval" / "images").iterdir()}
    for name in ("pope_random", "mmbench", "easy_vqa"):
        for row in read_parquet(sample_world / "eval" / f"{name}.parquet"):
            tested[f"{name} {row['image']['path']}"] = pixels(row["image"]["bytes"])
    assert not set(trained) & set(tested)
    assert not set(trained.values()) & set(tested.values())
    assert {key.partition("-")[0] for key in trained} == {"pretrain", "figure", "align", "finetune", "pairs", "easy"}


def test_splits_have_different_scenes() -> None:
    scenes = [draw_scene(0, split, 5) for split in ("pretrain", "align", "finetune", "pairs", "test", "test-pope")]
    contents = {(scene.background, scene.things) for scene in scenes}
    assert len(contents) == len(scenes)
    assert draw_scene(0, "test", 5) == draw_scene(0, "test", 5) != draw_scene(1, "test", 5)


def test_retrieval_json_has_karpathys_format(sample_world: Path) -> None:
    data = json.loads((sample_world / "retrieval" / "test.json").read_text())
    ids = [number for image in data["images"] for number in image["sentids"]]
    assert ids == list(range(5 * len(data["images"]))) and len(data["images"]) == 20
    for number, image in enumerate(data["images"]):
        assert image["imgid"] == number and image["split"] == "test"
        assert (sample_world / "retrieval" / image["filepath"] / image["filename"]).is_file()
        assert len({sentence["raw"] for sentence in image["sentences"]}) == 5
        assert [sentence["sentid"] for sentence in image["sentences"]] == image["sentids"]


def naive_negatives(scene: Scene, scenes: list[Scene], setting: str) -> list[str]:
    """POPE (arXiv 2305.10355, section 4.2), counted naively."""
    present = [thing.short for thing in scene.things]
    scores = []
    for short in spoken_names():
        if short in present:
            continue
        frequency = together = 0
        for other in scenes:
            things = [thing.short for thing in other.things]
            if short in things:
                frequency += 1
                together += sum(1 for mine in present if mine in things)
        scores.append((-(frequency if setting == "popular" else together), short))
    return [short for _, short in sorted(scores)[: len(present)]]


def test_pope_negatives_equal_a_naive_implementation() -> None:
    scenes = [draw_scene(0, "pope-rules", index, min_things=2) for index in range(40)]
    names = spoken_names()
    by_setting = {setting: exams.pope_rows(scenes, setting, 0) for setting in exams.POPE_SETTINGS}
    for setting, rows in by_setting.items():
        for scene in scenes:
            asked = [row for row in rows if row["image_source"] == scene.key]
            present = [names[thing.short] for thing in scene.things]
            questions_yes = [row["question"] for row in asked if row["answer"] == "yes"]
            questions_no = [row["question"] for row in asked if row["answer"] == "no"]
            assert questions_yes == [f"Is there {wording.article(name)} in the image?" for name in present]
            assert len(questions_no) == len(set(questions_no)) == len(questions_yes)
            assert not set(questions_no) & set(questions_yes)
            if setting != "random":
                expected = [names[short] for short in naive_negatives(scene, scenes, setting)]
                assert questions_no == [presence_question(name) for name in expected]
    assert len({tuple(row["question"] for row in rows) for rows in by_setting.values()}) == 3


def test_evaluation_files_have_the_columns_of_the_benchmarks(sample_world: Path) -> None:
    from datasets import Image, load_dataset

    columns = {
        "pope_random": ["id", "question_id", "question", "answer", "image_source", "image", "category"],
        "mmbench": [
            *("index", "question", "hint", "answer", "A", "B", "C", "D", "category", "L2-category"),
            *("image", "source", "split"),
        ],
        "easy_vqa": ["question_id", "question", "answer", "kind", "image_id", "image"],
    }
    for name, expected in columns.items():
        file = str(sample_world / "eval" / f"{name}.parquet")
        table = load_dataset("parquet", data_files=file, split="train", cache_dir=str(sample_world / ".cache"))
        assert table.column_names == expected and isinstance(table.features["image"], Image)
        assert table[0]["image"].size in ((IMAGE, IMAGE), (64, 64))


def test_multiple_choice_has_one_right_answer_without_bias() -> None:
    """Only the right answer is in the scene; every answer is right for some scenes and wrong for others."""
    right: dict[str, set[str]] = collections.defaultdict(set)
    wrong: dict[str, set[str]] = collections.defaultdict(set)
    letters: collections.Counter[str] = collections.Counter()
    for index in range(600):
        scene, rng = draw_scene(0, "choice", index), random.Random(index)
        category, question, answer, others = make_choice(scene, rng)
        assert len({answer, *others}) == 4
        right[category].add(answer)
        wrong[category] |= set(others)
        match category:
            case "object":
                here = {wording.name_of(thing) for thing in scene.things}
                assert answer in here and not here & set(others)
            case "place":
                (thing,) = [thing for thing in scene.things if f" the {wording.name_of(thing)}?" in question]
                assert answer == wording.place_of(thing)
            case "background":
                assert answer == scene.background
        letters[exams.choice_options((category, question, answer, others), rng)[1]] += 1
    assert right["place"] == wrong["place"] == set(wording.PLACES)
    assert right["background"] == wrong["background"] == set(BACKGROUNDS)
    assert all(100 < letters[letter] < 200 for letter in "ABCD")


def test_easy_vqa_questions_are_from_its_test_split(sample_world: Path) -> None:
    train, test = load_shapes("train"), load_shapes("test")
    assert (len(train), len(test)) == (4000, 1000)
    assert sum(len(shape.questions) for shape in test) == 9673
    by_id = {str(shape.image_id): shape for shape in test}
    trained = {shape.file.read_bytes() for shape in train}
    for row in read_parquet(sample_world / "eval" / "easy_vqa.parquet"):
        shape = by_id[row["image_id"]]
        assert (row["question"], row["answer"]) in shape.questions
        assert row["image"]["bytes"] == shape.file.read_bytes() and row["image"]["bytes"] not in trained
        assert row["kind"] == ("open" if is_open(row["answer"]) else "yes_no")
        assert row["answer"] == row["answer"].lower() and " " not in row["answer"]


def test_generated_figures_have_easy_vqas_colors() -> None:
    """The color in the caption is the color that easy-VQA draws under that name."""
    drawn: dict[str, set[tuple[int, ...]]] = collections.defaultdict(set)
    for shape in load_shapes("train")[:400]:
        if shape.color:
            drawn[shape.color].add(figure_color(shape.file.read_bytes()))
    answers = {shape.shape for shape in load_shapes("train")} - {None}
    seen: set[tuple[str, str]] = set()
    for index in range(150):
        content, color, kind = draw_shape(0, index)
        mine = figure_color(content)
        distance = {name: min(math.dist(mine, other) for other in others) for name, others in drawn.items()}
        assert min(distance, key=distance.__getitem__) == color and kind in answers
        seen.add((color, kind))
    assert {color for color, _ in seen} == set(drawn) and {kind for _, kind in seen} == answers


def figure_color(content: bytes) -> tuple[int, ...]:
    """Return the most frequent color outside the light background."""
    from PIL import Image

    counts = Image.open(io.BytesIO(content)).convert("RGB").getcolors(1 << 20)
    assert counts is not None
    return max((count, color) for count, color in counts if min(color) < 200)[1]


def test_llava_rows_are_valid(sample_world: Path) -> None:
    for stage in ("stage1", "stage2"):
        for row in rows_of(sample_world, stage):
            turns = row["conversations"]
            assert [turn["from"] for turn in turns] == ["human", "gpt"] * (len(turns) // 2)
            assert all(turn["value"].strip() for turn in turns)
            assert turns[0]["value"].count("<image>") == len(images_of(row))
            assert not any("<image>" in turn["value"] for turn in turns[1:])
            for name in images_of(row):
                assert (sample_world / "llava" / "images" / name).is_file()
    counts = collections.Counter(len(images_of(row)) for row in rows_of(sample_world, "stage2"))
    assert counts[0] == 12 and counts[2] >= 1 and counts[1] > 20
    assert any(len(row["conversations"]) > 2 for row in rows_of(sample_world, "stage2"))
    assert {len(images_of(row)) for row in rows_of(sample_world, "stage1")} == {1}


def test_presence_answers_are_balanced(sample_world: Path) -> None:
    answers: collections.Counter[str] = collections.Counter()
    for row in rows_of(sample_world, "stage2"):
        if str(row["id"]).startswith("finetune-"):
            pairs = zip(row["conversations"][::2], row["conversations"][1::2], strict=True)
            answers.update(b["value"] for a, b in pairs if "Is there" in a["value"])
    assert answers["yes"] == answers["no"] > 0
    assert answers["No."] == sum(count for answer, count in answers.items() if answer.startswith("Yes, in the ")) > 0


def test_patch_texts_match_their_scenes(sample_world: Path) -> None:
    """One word for each of 6 x 6 patches: the background's color, and a word of the name in each thing's patches."""
    rows = [row for row in rows_of(sample_world, "stage2") if str(row["id"]).startswith("told-told-")]
    assert len(rows) == 4
    for row in rows:
        scene = draw_scene(0, "told", int(row["id"].rpartition("-")[2]), min_things=2)
        words = np.array(row["conversations"][0]["value"].partition("\n")[0].split()).reshape(6, 6)
        for thing in scene.things:
            cell = words[2 * thing.row : 2 * thing.row + 2, 2 * thing.column : 2 * thing.column + 2]
            assert set(cell.ravel()) & set(wording.name_of(thing).split())
            cell[:] = scene.background
        assert (words == scene.background).all(), "only the background elsewhere"
        assert row["conversations"][0]["value"].partition("\n")[2]


def test_patch_texts_of_shapes_have_color_and_shape(sample_world: Path) -> None:
    known = {shape.image_id: shape for shape in load_shapes("train")}
    rows = [row for row in rows_of(sample_world, "stage2") if str(row["id"]).startswith("told-easy-vqa-")]
    assert len(rows) == 4
    for row in rows:
        shape = known[int(row["id"].rpartition("-")[2])]
        words, _, question = row["conversations"][0]["value"].partition("\n")
        assert len(words.split()) == 36 and question
        assert set(words.split()) == {"white", shape.color, shape.shape}


def test_shards_have_every_kind_and_noisy_web_captions(sample_world: Path) -> None:
    rows = shard_rows(sample_world)
    assert all(set(row) == {"png", "json"} for row in rows.values())
    assert {key.partition("-")[0] for key in rows} == {"pretrain", "figure", "easy"}
    named = 0
    scenes = [key for key in rows if key.startswith("pretrain-")]
    for key in scenes:
        scene = draw_scene(0, "pretrain", int(key.rpartition("-")[2]))
        web = json.loads(rows[key]["json"])["web_caption"]
        named += all(wording.name_of(thing) in web for thing in scene.things)
    recipe = json.loads((sample_world / "world.json").read_text())["recipe"]
    assert len(scenes) == recipe["pretrain_scenes"]
    assert 0.2 < named / len(scenes) < 0.7, "web captions miss objects, but not all of them"


def test_examples_exist(sample_world: Path) -> None:
    examples = json.loads((sample_world / "examples.json").read_text())
    assert len(examples) == 3
    assert all((sample_world / row["image"]).is_file() and row["question"] for row in examples)


def test_tiny_llm_is_a_stock_llama(sample_world: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, info = AutoModelForCausalLM.from_pretrained(sample_world / "llm", output_loading_info=True)
    tokenizer = AutoTokenizer.from_pretrained(sample_world / "llm")
    assert type(model).__name__ == "LlamaForCausalLM" and not info["missing_keys"] and not info["unexpected_keys"]
    text = "Is there a dog in the image?\nyes 🐶"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert len(tokenizer("<|im_end|>")["input_ids"]) == 1
