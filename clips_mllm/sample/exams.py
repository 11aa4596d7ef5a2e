"""Evaluation files of the sample world: retrieval JSON; POPE, MMBench and easy-VQA parquet."""

from __future__ import annotations

import collections
import itertools
import random
from pathlib import Path
from typing import Any

from clips_mllm.sample.instructions import Choice, choice_options, make_choice, presence_question
from clips_mllm.sample.objects import spoken_names
from clips_mllm.sample.scenes import Scene, png_bytes, render_scene
from clips_mllm.sample.shapes import ShapeImage, is_open
from clips_mllm.sample.wording import test_captions

POPE_SETTINGS = ("random", "popular", "adversarial")


def karpathy_json(scenes: list[Scene], seed: int) -> dict[str, Any]:
    """Return Karpathy-style retrieval annotations with five captions per image."""
    images: list[dict[str, Any]] = []
    sentences = itertools.count()
    for number, scene in enumerate(scenes):
        captions = test_captions(scene, random.Random(f"{seed}/captions/{scene.key}"))
        entries = [
            {"raw": raw, "tokens": raw.lower().rstrip(".").split(), "imgid": number, "sentid": next(sentences)}
            for raw in captions
        ]
        images.append(
            {
                "filepath": "images",
                "filename": f"{scene.key}.png",
                "split": "test",
                "imgid": number,
                "sentids": [entry["sentid"] for entry in entries],
                "sentences": entries,
            }
        )
    return {"dataset": "sample", "images": images}


class PopeNegatives:
    """POPE's three ways to choose objects that are not in an image (arXiv 2305.10355, section 4.2).

    random: any absent objects. popular: the most frequent ones. adversarial: those that appear most often together with
    the image's objects. Frequencies are counted over the evaluated scenes, as in POPE.
    """

    def __init__(self, scenes: list[Scene]) -> None:
        self.frequency: collections.Counter[str] = collections.Counter()
        self.together: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
        for scene in scenes:
            shorts = [thing.short for thing in scene.things]
            self.frequency.update(shorts)
            for a, b in itertools.permutations(shorts, 2):
                self.together[a][b] += 1

    def choose(self, scene: Scene, setting: str, count: int, rng: random.Random) -> list[str]:
        """Choose `count` absent objects; ties are broken by name, so that the choice is deterministic."""
        present = {thing.short for thing in scene.things}
        absent = [short for short in spoken_names() if short not in present]
        if setting == "random":
            return rng.sample(absent, count)
        score = self.frequency
        if setting == "adversarial":
            score = sum((self.together[short] for short in present), start=collections.Counter())
        return sorted(absent, key=lambda short: (-score[short], short))[:count]


def pope_rows(scenes: list[Scene], setting: str, seed: int) -> list[dict[str, Any]]:
    """Return rows with as many "no" as "yes" questions for every scene."""
    negatives = PopeNegatives(scenes)
    rows: list[dict[str, Any]] = []
    for scene in scenes:
        rng = random.Random(f"{seed}/pope/{setting}/{scene.key}")
        image = {"bytes": png_bytes(render_scene(scene)), "path": f"{scene.key}.png"}
        positive = [thing.short for thing in scene.things]
        absent = negatives.choose(scene, setting, len(positive), rng)
        asked = [(short, "yes") for short in positive] + [(short, "no") for short in absent]
        for short, answer in asked:
            rows.append(
                {
                    "id": str(len(rows)),
                    "question_id": str(len(rows) + 1),
                    "question": presence_question(spoken_names()[short]),
                    "answer": answer,
                    "image_source": scene.key,
                    "image": image,
                    "category": setting,
                }
            )
    return rows


def mmbench_rows(scenes: list[Scene], seed: int) -> list[dict[str, Any]]:
    """Return one multiple-choice question per scene, with MMBench's columns."""
    rows: list[dict[str, Any]] = []
    for index, scene in enumerate(scenes):
        rng = random.Random(f"{seed}/mmbench/{scene.key}")
        choice: Choice = make_choice(scene, rng)
        options, letter = choice_options(choice, rng)
        rows.append(
            {
                "index": index,
                "question": choice[1],
                "hint": "nan",
                "answer": letter,
                **dict(zip("ABCD", options, strict=True)),
                "category": choice[0],
                "L2-category": "perception",
                "image": {"bytes": png_bytes(render_scene(scene)), "path": f"{scene.key}.png"},
                "source": "sample",
                "split": "dev",
            }
        )
    return rows


def easy_vqa_rows(shapes: list[ShapeImage], count: int, seed: int) -> list[dict[str, Any]]:
    """Draw `count` of easy-VQA's test questions, or all if there are fewer."""
    everything = [(shape, question, answer) for shape in shapes for question, answer in shape.questions]
    chosen = random.Random(f"{seed}/easy-vqa").sample(range(len(everything)), min(count, len(everything)))
    return [
        {
            "question_id": str(number),
            "question": question,
            "answer": answer,
            "kind": "open" if is_open(answer) else "yes_no",
            "image_id": str(shape.image_id),
            "image": {"bytes": shape.file.read_bytes(), "path": shape.file.name},
        }
        for number in sorted(chosen)
        for shape, question, answer in (everything[number],)
    ]


def write_parquet(rows: list[dict[str, Any]], file: Path) -> None:
    """Write a parquet file with a `datasets.Image` feature in the `image` column, as data sets on the hub have it."""
    import pyarrow as pa
    import pyarrow.parquet as pq
    from datasets import Features, Image, Value

    kinds = {str: Value("string"), int: Value("int64")}
    features = Features({name: Image() if name == "image" else kinds[type(value)] for name, value in rows[0].items()})
    pq.write_table(pa.Table.from_pylist(rows, schema=features.arrow_schema), file)
