"""Samples of shards: each once per epoch over all readers, captions, counts of bad samples, mixtures, resume."""

from __future__ import annotations

import collections
import dataclasses
import itertools
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from torch.utils.data import DataLoader

from tests.helpers.errors import raises_user_error
from tests.helpers.shard_files import counted, numbered, pair, png, write_parquet, write_tar
from vision_tower.common.errors import UserError
from vision_tower.common.recipe import parse_recipe
from vision_tower.data.pairs import CaptionSample, PairStream, read_captions, read_texts
from vision_tower.data.readers import ReaderPosition
from vision_tower.data.recipe import Augmentation, PairsRecipe, SourceRecipe
from vision_tower.data.shards import Row
from vision_tower.pretraining.recipe import PretrainRecipe
from vision_tower.text.captions import split_sentences
from vision_tower.text.objectives import CaptionRecipe, LossWeights, ObjectiveName, choose_objective
from vision_tower.text.text_streams import CaptionSampler
from vision_tower.text.tokenizer import ClipsTokenizer

PLAIN = Augmentation(smallest_crop=1.0, jitter=0.0, gray_probability=0.0)


def draw_letters(web: str, full: str, rng: random.Random) -> dict[str, list[int]]:
    """Replace an objective's texts by one sentence, letter by letter."""
    return {"sub": [ord(letter) for letter in rng.choice(split_sentences(full) or [full])]}


def sub_caption(sample: CaptionSample) -> str:
    return "".join(map(chr, sample.texts["sub"]))


def stream(pattern: str, *, rank: int = 0, world: int = 1, seed: int = 0, **values: Any) -> PairStream:
    values = {"shuffle_buffer": 8, "augmentation": PLAIN} | values
    return PairStream(PairsRecipe(shards=pattern, **values), 8, seed, rank, world, draw_letters)


def take(source: PairStream, count: int) -> list[CaptionSample]:
    return list(itertools.islice(source, count))


@pytest.mark.parametrize("buffer", [0, 1, 8, 1000])
def test_every_sample_once_per_epoch(tmp_path: Path, buffer: int) -> None:
    source = stream(numbered(tmp_path, 3, 10), shuffle_buffer=buffer)
    seen = [sample.web for sample in take(source, 60)]
    for epoch in (seen[:30], seen[30:]):
        assert sorted(epoch, key=int) == [str(n) for n in range(30)]
    assert (seen[:30] != seen[30:]) or buffer == 0  # another order every time
    assert [sample.web for sample in take(source, 60)] == seen  # and the same one from the start
    if buffer > 1:
        assert seen[:10] != sorted(seen[:10], key=int)


def test_order_depends_on_seed_and_epoch(tmp_path: Path) -> None:
    pattern = numbered(tmp_path, 4, 5)
    orders = [[sample.web for sample in take(stream(pattern, seed=seed), 20)] for seed in (0, 1)]
    assert orders[0] != orders[1]


@pytest.mark.parametrize(("shards", "each"), [(1, 40), (1, 3), (3, 7), (5, 4), (8, 3), (13, 2)])
def test_ranks_and_loader_processes_share_an_epoch_without_overlap(tmp_path: Path, shards: int, each: int) -> None:
    """Each sample once in each of two epochs; also with few shards, or fewer rows than readers."""
    pattern = numbered(tmp_path, shards, each)
    passes: dict[int, list[int]] = collections.defaultdict(list)
    for rank in (0, 1):
        loader = DataLoader(stream(pattern, rank=rank, world=2), batch_size=1, num_workers=2, collate_fn=list)
        begun: dict[int, int] = {}  # the pass that each reader of the rank is in
        for (sample,) in loader:
            epoch = sample.cursor.places[0].epoch
            passes[epoch].append(int(sample.web))
            begun[sample.cursor.reader] = epoch
            if len(begun) == 2 and min(begun.values()) >= 2:
                break
        assert set(begun) == {2 * rank, 2 * rank + 1}
    for epoch in (0, 1):
        assert sorted(passes[epoch]) == list(range(shards * each))


def test_readers_get_equal_parts(tmp_path: Path) -> None:
    """Also of split shards; for large shards within a few rows."""
    from vision_tower.data.readers import cut

    for shards, parts in ((7, 3), (2, 5), (1, 16), (12, 4)):
        pieces = [piece for part in range(parts) for piece in cut([str(n) for n in range(shards)], part, parts)]
        rows = collections.Counter((piece.shard, row) for piece in pieces for row in range(1000) if piece.has(row))
        assert len(rows) == shards * 1000 and set(rows.values()) == {1}
        for part in range(parts):
            own = sum(
                piece.has(row) for piece in cut([str(n) for n in range(shards)], part, parts) for row in range(1000)
            )
            assert abs(own - shards * 1000 / parts) < 8
    whole = cut([str(n) for n in range(12)], 1, 4)
    assert [piece.shard for piece in whole] == ["3", "4", "5"]  # nothing is split where it need not be


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("consumed", [1, 7, 13, 26, 41, 60, 83])
def test_resume_gives_the_same_samples(tmp_path: Path, workers: int, consumed: int) -> None:
    """From the JSON positions of the consumed batches, pixels included, also across epochs."""
    pattern = numbered(tmp_path, 5, 5)
    write_tar(tmp_path / "5.tar", [*pair("bad", image=b"x"), *pair("good", web="999")])

    def loader(cursors: dict[int, ReaderPosition], turn: int) -> Any:
        source = stream(pattern, max_bad_fraction=0.5, augmentation=Augmentation())
        source.resume_from(cursors, turn)
        return iter(DataLoader(source, batch_size=2, num_workers=workers, collate_fn=list))

    def contents(batches: list[list[CaptionSample]]) -> list[Any]:
        return [
            (sample.key, sample.web, sub_caption(sample), sample.pixels.tolist())
            for batch in batches
            for sample in batch
        ]

    batches = list(itertools.islice(loader({}, 0), consumed + 30))
    cursors = {batch[-1].cursor.reader: batch[-1].cursor for batch in batches[:consumed]}
    saved = json.loads(json.dumps([dataclasses.asdict(cursor) for cursor in cursors.values()]))
    restored = {value["reader"]: ReaderPosition.from_json(value) for value in saved}
    assert restored == cursors
    rest = list(itertools.islice(loader(restored, consumed % max(workers, 1)), 30))
    assert contents(rest) == contents(batches[consumed:])
    assert [batch[-1].cursor for batch in rest] == [batch[-1].cursor for batch in batches[consumed:]]  # counts as well


def test_resume_decodes_nothing_twice_and_keeps_one_block(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from vision_tower.data import pairs as data
    from vision_tower.data import readers

    read, decoded = 0, 0
    read_shard, decode_image = readers.read_shard, data.decode_image

    def counting_read(*args: Any) -> Iterator[Row]:
        nonlocal read
        for row in read_shard(*args):
            read += 1
            yield row

    def counting_decode(*args: Any) -> Any:
        nonlocal decoded
        decoded += 1
        return decode_image(*args)

    monkeypatch.setattr(readers, "read_shard", counting_read)
    monkeypatch.setattr(data, "decode_image", counting_decode)
    pattern = numbered(tmp_path, 4, 50)
    given = iter(stream(pattern, shuffle_buffer=16))
    for number in range(1, 121):
        sample = next(given)
        assert read - number <= 16
    read = decoded = 0
    source = stream(pattern, shuffle_buffer=16)
    source.resume_from({0: sample.cursor}, 0)
    take(source, 10)
    assert decoded == 10 and read <= 16 + 16 + 10  # the current block is read again, then the next ones


def test_random_choices_depend_on_seed_epoch_and_key(tmp_path: Path) -> None:
    """Not on earlier samples: with another order the crop and the sentence are the same."""
    sentences = " ".join(f"Sentence {n}." for n in range(40))
    image = png(size=32)
    row = pair("x", full=sentences, image=image)
    write_tar(tmp_path / "a.tar", row)
    (tmp_path / "more").mkdir()
    write_tar(tmp_path / "more" / "a.tar", [*(member for n in range(9) for member in pair(str(n))), *row])
    drawn = []
    for pattern in (tmp_path / "a.tar", tmp_path / "more" / "a.tar"):
        samples = take(stream(str(pattern), augmentation=Augmentation(smallest_crop=0.1)), 30)
        drawn.append(
            [(sub_caption(sample), sample.pixels.tolist()) for sample in samples if sample.key.endswith(" x")][:3]
        )
    assert drawn[0] == drawn[1]
    assert len({sub for sub, _ in drawn[0]}) > 1  # each pass draws again


def test_caption_fields(tmp_path: Path) -> None:
    rows = [
        *pair("a", web="w", full="One. Two."),
        *pair("b", web="only web", full=""),
        *pair("c", web=None, full="Only full."),
        *pair("d", web=["x", "y"], full=None),
    ]
    write_tar(tmp_path / "a.tar", rows)
    samples = take(stream(str(tmp_path / "a.tar"), shuffle_buffer=0), 80)
    texts = {(sample.web, sub_caption(sample), sample.full) for sample in samples}
    assert texts == {
        ("w", "One.", "One. Two."),
        ("w", "Two.", "One. Two."),
        ("only web", "only web", "only web"),  # the web caption replaces it
        ("", "Only full.", "Only full."),
        ("x", "x", "x"),
        ("y", "y", "y"),
    }


def test_unreadable_samples_are_skipped_and_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    good = [member for n in range(14) for member in pair(f"{n:02d}", web=str(n))]
    bad = [
        *pair("x1", image=b"no image"),
        *pair("x2", image=png(size=64)[:60]),
        ("x3.png", png()),
        ("x4.png", png()),
        ("x4.json", b"{"),
        ("x5.png", png()),
        ("x5.json", b"[1]"),
        ("x6.json", b"{}"),
        ("x7.json", json.dumps({"web_caption": "", "synthetic_caption": " "}).encode()),
        ("x7.png", png()),
        ("x8.json", json.dumps({"web_caption": "w", "synthetic_caption": "f"}).encode()),
        ("x9.json", json.dumps({"web_caption": "w", "synthetic_caption": 9}).encode()),
        ("x9.png", png()),
    ]
    write_tar(tmp_path / "a.tar", good + bad)
    source = stream(str(tmp_path / "a.tar"), max_bad_fraction=0.5, shuffle_buffer=0)
    samples = take(source, 15)  # the 15th is past the bad ones
    assert sorted(int(sample.web) for sample in samples[:14]) == list(range(14))
    causes = {"corrupt image": 2, "malformed json": 2, "no 'web_caption'": 2, "no caption": 1}
    causes |= {"no image": 1, "'synthetic_caption' is not text": 1}
    assert samples[-1].cursor.places[0].bad == causes
    lines = caplog.messages
    assert len(lines) == 6 and all(str(tmp_path / "a.tar") in line for line in lines)  # one per cause
    assert len(read_texts(source.recipe, 100)) == 2 * 18  # training a vocabulary skips them too


@pytest.mark.parametrize("objective", ["clips", "clip-web", "clip-synthetic", "clipa-mix"])
def test_pair_without_a_needed_caption_is_skipped(tmp_path: Path, objective: ObjectiveName) -> None:
    """Empty texts would be false negatives of each other. The web caption replaces a missing synthetic one."""
    web = [pair(f"{n}", web=None if n % 2 else f"web {n}") for n in range(10)]
    write_tar(tmp_path / "a.tar", [member for row in web for member in row])
    tokenizer = ClipsTokenizer.train(["a web caption 0 1 2 3 4 5 6 7 8 9", "One. Two."], 60)
    draw = CaptionSampler(tokenizer, choose_objective(objective, LossWeights()), CaptionRecipe(), 20)
    recipe = PairsRecipe(shards=str(tmp_path / "a.tar"), max_bad_fraction=0.9, shuffle_buffer=0, augmentation=PLAIN)
    samples = take(PairStream(recipe, 8, 0, 0, 1, draw), 6)  # in clips and clip-web the last one is of the second pass
    wanted = {"no web caption": 5} if objective in ("clips", "clip-web") else {}
    assert samples[-1].cursor.places[0].bad == wanted
    assert all(pieces for sample in samples for pieces in sample.texts.values())


def test_vocabulary_from_missing_columns_reads_no_more_rows_than_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    def counting(row: Row, *rest: Any) -> tuple[str, str]:
        asked.append(row.key)
        return read_captions(row, *rest)

    monkeypatch.setattr("vision_tower.data.pairs.read_captions", counting)
    assert read_texts(PairsRecipe(shards=numbered(tmp_path, 4, 50), web_caption="caption"), 20) == []
    assert len(asked) == 20


def test_too_many_unreadable_samples_stop_the_run(tmp_path: Path) -> None:
    rows = [member for n in range(20) for member in pair(f"{n:02d}", image=b"bad" if n < 2 else None)]
    write_tar(tmp_path / "a.tar", rows)
    assert len(take(stream(str(tmp_path / "a.tar"), max_bad_fraction=0.1), 100)) == 100
    with raises_user_error(file=tmp_path / "a.tar"):
        take(stream(str(tmp_path / "a.tar"), max_bad_fraction=0.09), 100)
    write_tar(tmp_path / "b.tar", pair("a", image=b"bad"))
    with raises_user_error(file=tmp_path / "b.tar"):
        take(stream(str(tmp_path / "b.tar"), max_bad_fraction=1.0), 1)


def damaged(file: Path, how: str) -> None:
    """Write a tar of ten pairs, 0 to 9, with some unreadable members."""
    content = bytearray(counted(0, 10))
    if how == "cut in a member":
        content = content[: 9 * 512 + 100]
    else:
        content[8 * 512 : 9 * 512] = b"x" * 512
    file.write_bytes(content)


@pytest.mark.parametrize("how", ["cut in a member", "damaged header"])
def test_damaged_shard_yields_its_readable_rows(tmp_path: Path, how: str, caplog: pytest.LogCaptureFixture) -> None:
    damaged(tmp_path / "0.tar", how)
    (tmp_path / "1.tar").write_bytes(counted(10, 20))
    endless = iter(stream(str(tmp_path / "*.tar")))
    samples = list(itertools.islice(endless, 24))
    kept = {"0", "1"} if how == "cut in a member" else {"0"}  # without a next header nobody knows that 1 is whole
    assert {sample.web for sample in samples} == kept | {str(n) for n in range(10, 20)}
    assert samples[-1].cursor.places[0].broken == {str(tmp_path / "0.tar"): "broken shard"}
    (line,) = caplog.messages
    assert str(tmp_path / "0.tar") in line and "broken shard" in line
    (tmp_path / "0.tar").write_bytes(counted(0, 10))  # repaired during the run
    samples = list(itertools.islice(endless, 60))
    assert {sample.web for sample in samples} == {str(n) for n in range(20)}
    assert samples[-1].cursor.places[0].broken == {}
    damaged(tmp_path / "0.tar", how)
    damaged(tmp_path / "2.tar", how)  # one may be bad luck; two of three are more than data.max_bad_fraction
    with pytest.raises(
        UserError, match=r"cannot read 2 of 3 shards \({'broken shard': 2}\), more than data\.max_bad_fraction"
    ):
        take(stream(str(tmp_path / "*.tar")), 48)
    assert len(read_texts(PairsRecipe(shards=str(tmp_path / "*.tar")), 100)) == 2 * (10 + 2 * len(kept))


def test_shards_without_any_sample(tmp_path: Path) -> None:
    write_tar(tmp_path / "empty.tar", [])
    (tmp_path / "zero.tar").write_bytes(b"")
    (tmp_path / "text.tar").write_text("hello " * 500)
    (tmp_path / "folder.tar").mkdir()
    for name, cause in (("empty", "broken"), ("zero", "broken"), ("text", "broken"), ("folder", "unreadable")):
        file = str(tmp_path / f"{name}.tar")
        with pytest.raises(UserError, match=rf"cannot read 1 of 1 shards \({{'{cause} shard': 1}}\)") as caught:
            take(stream(file), 1)
        assert str(caught.value).startswith(file) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("values", "key"),
    [
        ({}, "data.shards"),
        ({"shards": "a.tar", "mixture": (SourceRecipe(shards="b.tar"),)}, "data.shards"),
        ({"mixture": (SourceRecipe(shards="b.tar", weight=0),)}, "data.mixture[0].weight"),
        ({"mixture": (SourceRecipe(shards="b.tar", weight=float("nan")),)}, "data.mixture[0].weight"),
        ({"shards": "a.tar", "max_bad_fraction": 2}, "data.max_bad_fraction"),
        ({"shards": "a.tar", "shuffle_buffer": -1}, "data.shuffle_buffer"),
    ],
)
def test_inconsistent_recipes_are_refused(values: dict[str, Any], key: str) -> None:
    with raises_user_error(key=key):
        PairsRecipe(**values).check()


def test_mixture_draws_by_weight_and_each_source_once_per_epoch(tmp_path: Path) -> None:
    """Each source has its own column names: JSON keys and a text file in tars, columns and lists in Parquet."""
    members = [[(f"{n}.jpg", png()), (f"{n}.txt", f"tar {n}".encode())] for n in range(30)]
    recaption = json.dumps({"recap": "Long."}).encode()
    members = [[*row, (f"{n}.json", recaption)] for n, row in enumerate(members)]
    write_tar(tmp_path / "a.tar", [member for row in members for member in row])
    columns: dict[str, list[Any]] = {
        "jpg_0": [{"bytes": png(), "path": None}, {"bytes": png(), "path": "x.png"}] * 5,
        "captions": [[f"first {n}", f"second {n}"] for n in range(10)],
        "synthetic_caption": ["Full."] * 10,
    }
    write_parquet(tmp_path / "b.parquet", columns)
    mixture = (
        SourceRecipe(shards=str(tmp_path / "a.tar"), weight=3, web_caption="txt", synthetic_caption="recap"),
        SourceRecipe(shards=str(tmp_path / "b.parquet"), weight=1, image="jpg_0", web_caption="captions"),
    )
    recipe = PairsRecipe(mixture=mixture, shuffle_buffer=7, augmentation=PLAIN)
    samples = take(PairStream(recipe, 8, 0, 0, 1, draw_letters), 400)
    tars = [sample.web for sample in samples if "a.tar" in sample.key]
    rows = [sample.web for sample in samples if "b.parquet" in sample.key]
    assert 260 < len(tars) < 340
    assert sorted(tars[:30]) == sorted(tars[30:60]) == sorted(f"tar {n}" for n in range(30))
    assert sorted(int(web.split()[1]) for web in rows[:10]) == list(range(10))
    assert {web.split()[0] for web in rows} == {"first", "second"}  # several captions: one is drawn
    assert {sample.full for sample in samples} == {"Long.", "Full."}
    source = PairStream(recipe, 8, 0, 0, 1, draw_letters)
    source.resume_from({0: samples[199].cursor}, 0)
    assert [sample.key for sample in take(source, 100)] == [sample.key for sample in samples[200:300]]
    assert {"tar 0", "Long.", "Full."} < set(read_texts(recipe, 20))


def test_mixture_in_yaml(tmp_path: Path) -> None:
    quickstart = Path(__file__).parents[2] / "configs" / "vision" / "quickstart.yaml"
    file = tmp_path / "mixture.yaml"
    file.write_text(
        "data: {shards: null, mixture: [{shards: 'a{0..1}.tar', weight: 3, web_caption: txt}, {shards: b.tar}]}"
    )
    words = ["--config", str(quickstart), "--config", str(file)]
    sources = parse_recipe(PretrainRecipe, words, command="pretrain").data.sources
    assert sources == (SourceRecipe(shards="a{0..1}.tar", weight=3, web_caption="txt"), SourceRecipe(shards="b.tar"))
    file.write_text("data: {mixture: [{shards: a.tar, wieght: 3}]}")
    with raises_user_error(file=file, key="data.mixture[0].wieght"):
        parse_recipe(PretrainRecipe, words, command="pretrain")
