"""Encoder results in the report: what is shown, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from clips_eval.reporting.read import read_run
from clips_eval.reporting.tables import embedding_table, zeroshot_table
from tests.helpers.errors import raises_user_error
from vision_tower.common.errors import UserError

KS = (1, 5, 10)
RECALLS = [f"{way}_r{k}" for way in ("i2t", "t2i") for k in KS]


def span(low: float | None, high: float | None) -> dict[str, Any]:
    return {"low": low, "high": high, "n": 3, "clusters": 2}


def retrieval() -> dict[str, Any]:
    """Two images with one and two captions."""
    several = {"r1": 0.4, "r5": 0.5, "r10": 0.6, "r_precision": 0.3, "map_at_r": 0.2, "n": 2}
    return {
        "format": 1,
        **dict.fromkeys(RECALLS, 0.5),
        "intervals": {key: span(0.1, 0.9) for key in RECALLS},
        "n_images": 2,
        "n_texts": 3,
        "hits": {key: "01" if key.startswith("i2t") else "010" for key in RECALLS},
        "captions_per_image": [1, 2],
        "median_rank": {"i2t": 1.0, "t2i": 12.0, "intervals": {"i2t": span(None, None), "t2i": span(8.0, 15.0)}},
        "map_at_r": {"i2t": 0.25, "t2i": 0.5, "intervals": {"i2t": span(0.2, 0.3), "t2i": span(0.4, 0.6)}},
        "multi_positive": {
            "i2t": several | {"intervals": {"r1": span(0.35, 0.45)}},
            "t2i": several | {"n": 3, "intervals": {"map_at_r": span(0.1, 0.3)}},
        },
        "geometry": {"modality_gap": 0.5, "alignment": 1.0, "uniformity_images": -1.0, "uniformity_texts": -2.0},
        "by_length": [
            {"words": [2, 4], "n": 3, "t2i_r1": 0.1, "t2i_r5": 0.2, "t2i_r10": 0.3, "intervals": {"t2i_r5": span(0, 1)}}
        ],
        "by_object": [
            {"object": "cat", "n_images": 1, "n_texts": 2, **dict.fromkeys(RECALLS, 0.5), "intervals": {}},
        ],
    }


ZEROSHOT = {
    "format": 1,
    **{"top1": 0.5, "top5": 0.75, "mean_per_class": 0.4, "n_images": 8, "n_classes": 6, "n_texts": 6},
    "intervals": {"top1": span(0.25, 0.75), "top5": span(0.5, 1.0), "mean_per_class": span(None, None)},
}


def write(root: Path, name: str, tree: dict[str, Any]) -> Path:
    (root / "encoder").mkdir(exist_ok=True)
    (root / "encoder" / name).write_text(json.dumps(tree))
    return root


def cells(root: Path) -> list[list[str]]:
    found = read_run(root).retrieval
    assert found is not None
    table = embedding_table(found)
    assert table is not None
    return [row.cells for row in table.rows]


def test_intervals_are_shown_in_brackets(tmp_path: Path) -> None:
    assert cells(write(tmp_path, "retrieval.json", retrieval())) == [
        ["Median rank", "1", "12 (8–15)"],
        ["mAP@R, own captions", "25.0 (20.0–30.0)", "50.0 (40.0–60.0)"],
        ["R@1, any right answer (n = 2 images, 3 captions)", "40.0 (35.0–45.0)", "40.0"],
        ["R@5, any right answer (n = 2 images, 3 captions)", "50.0", "50.0"],
        ["mAP@R, all (n = 2 images, 3 captions)", "20.0", "20.0 (10.0–30.0)"],
        ["R@5, captions of 2 to 4 words (n = 3)", "–", "20.0 (0.0–100.0)"],
        ["R@5, “cat” (n = 1 images, 2 captions)", "50.0", "50.0"],
    ]


@pytest.mark.parametrize("name", ["retrieval.json", "zeroshot.json"])
def test_files_without_format_are_refused(tmp_path: Path, name: str) -> None:
    tree = retrieval() if name == "retrieval.json" else dict(ZEROSHOT)
    del tree["format"]
    with raises_user_error(file=write(tmp_path, name, tree) / "encoder" / name, key="format"):
        read_run(tmp_path)


def test_zero_shot_intervals(tmp_path: Path) -> None:
    found = read_run(write(tmp_path, "zeroshot.json", ZEROSHOT)).zeroshot
    assert found is not None
    assert found.intervals == {"top1": (0.25, 0.75), "top5": (0.5, 1.0), "mean_per_class": None}
    table = zeroshot_table(found)
    assert table.rows[1].cells == ["95 %", "25.0–75.0", "50.0–100.0", "–"] and "bootstrap" in table.notes[0]


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        (["format"], 2, ["format: 2", "clips-mllm retrieve"]),
        (["geometry", "alignment"], None, ["geometry.alignment"]),
        (["geometry"], None, ["'geometry'", "object"]),
        (["geometry"], [1, 2], ["'geometry'", "list"]),
        (["median_rank"], None, ["'median_rank'"]),
        (["median_rank", "t2i"], "1", ["median_rank.t2i", "number"]),
        (["median_rank", "intervals", "t2i"], 3, ["median_rank.intervals.t2i"]),
        (["map_at_r"], 0.5, ["'map_at_r'", "float"]),
        (["map_at_r", "i2t"], 1.5, ["map_at_r.i2t", "fraction"]),
        (["multi_positive"], [], ["'multi_positive'"]),
        (["multi_positive", "i2t"], None, ["multi_positive.i2t"]),
        (["multi_positive", "t2i", "map_at_r"], None, ["multi_positive.t2i.map_at_r"]),
        (["multi_positive", "t2i", "n"], None, ["multi_positive.t2i.n"]),
        (["multi_positive", "t2i", "intervals", "map_at_r", "high"], None, ["multi_positive.t2i.intervals.map_at_r"]),
        (["by_length"], {}, ["'by_length'", "list"]),
        (["by_length", 0, "words"], [2], ["by_length[0].words"]),
        (["by_length", 0, "t2i_r5"], None, ["by_length[0].t2i_r5"]),
        (["by_object"], ["cat"], ["'by_object'", "list"]),
        (["by_object", 0, "object"], None, ["by_object[0].object"]),
        (["by_object", 0, "n_images"], None, ["by_object[0].n_images"]),
        (["by_object", 0, "i2t_r5"], "x", ["by_object[0].i2t_r5"]),
        (["by_object", 0, "intervals"], [], ["by_object[0].intervals"]),
        (["intervals", "i2t_r1"], [0.1, 0.9], ["intervals.i2t_r1"]),
        (["intervals", "i2t_r1"], span(None, None), ["intervals.i2t_r1"]),
        (["hits"], "0101", ["'hits'"]),
        (["hits", "i2t_r1"], "010", ["hits.i2t_r1"]),
        (["hits", "t2i_r5"], "0x0", ["hits.t2i_r5"]),
        (["hits", "t2i_r10"], None, ["hits.t2i_r10"]),
        (["captions_per_image"], None, ["captions_per_image"]),
        (["captions_per_image"], [1, "2"], ["captions_per_image"]),
        (["captions_per_image"], [3], ["captions_per_image"]),
    ],
)
def test_malformed_fields_are_named(tmp_path: Path, path: list[str | int], value: Any, words: list[str]) -> None:
    """Set a field to a malformed value, or remove it if the value is None."""
    tree = retrieval()
    part: Any = tree
    for key in path[:-1]:
        part = part[key]
    part[path[-1]] = value
    if value is None:
        del part[path[-1]]
    write(tmp_path, "retrieval.json", tree)
    with pytest.raises(UserError) as caught:
        read_run(tmp_path)
    text = str(caught.value)
    assert text.startswith(f"{tmp_path}/encoder/retrieval.json: ") and "\n" not in text and "again" in text
    assert all(word in text for word in words)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"format": "1"}, ["format: '1'", "clips-mllm zeroshot"]),
        ({"intervals": []}, ["'intervals'"]),
        ({"intervals": {"top1": {"low": 0.1}}}, ["intervals.top1.high"]),
    ],
)
def test_malformed_zero_shot_fields_are_named(tmp_path: Path, change: dict[str, Any], words: list[str]) -> None:
    write(tmp_path, "zeroshot.json", ZEROSHOT | change)
    with pytest.raises(UserError) as caught:
        read_run(tmp_path)
    assert all(word in str(caught.value) for word in words) and "\n" not in str(caught.value)
