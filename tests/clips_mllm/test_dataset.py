"""LLaVA JSON to batches: rows, errors, corrupt images, the blank image of text-only batches, grouping by length."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from transformers import AutoProcessor

from clips_mllm.data import dataset as data
from clips_mllm.data.collator import InstructionCollator
from clips_mllm.data.dataset import InstructionDataset
from clips_mllm.data.json_rows import read_rows
from clips_mllm.data.llava_json import BadRow, Example, to_example
from clips_mllm.data.recipe import InstructionRecipe, InstructionSource
from clips_mllm.data.row_source import require_file
from clips_mllm.data.row_store import RowStore
from clips_mllm.data.sampler import LengthGroupedSampler
from clips_mllm.model.checkpoint import Mllm, load_mllm
from clips_mllm.model.processors import image_tokens, set_aspect_ratio
from clips_mllm.prompts.conversation import IGNORED
from clips_mllm.training.trainer import supervised_loss
from tests.helpers.conversations import make_image, open_rows, row
from tests.helpers.errors import raises_user_error
from vision_tower.common.errors import UserError
from vision_tower.common.files import read_object

IMAGE_PART = {"type": "image"}


def text(value: str) -> dict[str, str]:
    return {"type": "text", "text": value}


# --- rows -------------------------------------------------------------------------------------------------------------


def test_single_image_moves_to_the_front() -> None:
    for question in ("<image>\nWhat?", "What?\n<image>", "What?\n<image>\n"):
        example = to_example(row(question, "A cat.", image="a.png"))
        assert example.messages[0]["content"] == [IMAGE_PART, text("What?")]
    example = to_example(row("In <image> here, what?", "A cat.", image="a.png"))
    assert example.messages[0]["content"] == [IMAGE_PART, text("In\nhere, what?")]


def test_several_images_keep_their_positions() -> None:
    example = to_example(row("First <image> then <image>: same?", "No.", image=["a.png", "b.png"]))
    content = example.messages[0]["content"]
    assert content == [text("First "), IMAGE_PART, text(" then "), IMAGE_PART, text(": same?")]
    opened = to_example(row("<image>\n<image>\nSame?", "No.", image=["a.png", "b.png"]))
    assert opened.messages[0]["content"] == [IMAGE_PART, IMAGE_PART, text("Same?")]
    assert opened.images == ["a.png", "b.png"]


def test_images_in_several_turns() -> None:
    example = to_example(row("<image>\nWhat?", "Cat.", "And <image>?", "Dog.", image=["a.png", "b.png"]))
    assert example.messages[2]["content"] == [IMAGE_PART, text("And\n?")]


def test_opening_answer_is_dropped() -> None:
    example = to_example(row("Hello!", "2 plus 2?", "Four.", first="gpt"))
    assert example == Example(
        [{"role": "user", "content": [text("2 plus 2?")]}, {"role": "assistant", "content": [text("Four.")]}], []
    )


def test_opening_answer_after_a_system_message_is_dropped() -> None:
    plain = row("2 plus 2?", "Four.")["conversations"]
    system, greeting = {"from": "system", "value": "Be brief."}, {"from": "gpt", "value": "Hello!"}
    example = to_example({"conversations": [system, greeting, greeting, *plain]})
    assert example.messages == to_example({"conversations": [system, *plain]}).messages
    assert example.repairs == ("opening answer dropped",)
    with pytest.raises(BadRow, match="no answer"):
        to_example({"conversations": [system, greeting]})


def test_conversations_as_json_strings() -> None:
    """As in many tables on the hub."""
    plain = row("2 plus 2?", "Four.")
    assert to_example(plain | {"conversations": json.dumps(plain["conversations"])}) == to_example(plain)
    spoken = [{"role": "user", "content": "2 plus 2?"}, {"role": "assistant", "content": "Four."}]
    for name in ("conversations", "messages"):
        assert to_example({name: json.dumps(spoken)}) == to_example(plain)
    asked = [{"role": "user", "content": [{"type": "image", "image": "a.png"}, {"type": "text", "text": "What?"}]}]
    example = to_example({"messages": json.dumps([*asked, spoken[1]])})
    assert example.images == ["a.png"] and example.messages[0]["content"] == [IMAGE_PART, text("What?")]


def test_outer_blanks_of_an_answer_are_stripped() -> None:
    """They could merge with the prompt's last token, so that training and inference prompts would differ."""
    assert to_example(row("2 plus 2?", "\n Four. \n")).messages[1]["content"] == [text("Four.")]


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (row("What?", "Cat.", image="a.png"), "0 <image> for 1 images"),
        (row("<image>\nWhat?", "Cat."), "1 <image> for 0 images"),
        (row("<image>\nWhat?", "Cat.", image=["a.png", "b.png"]), "1 <image> for 2 images"),
        (row("<image>\n<image>\nWhat?", "Cat.", image="a.png"), "2 <image> for 1 images"),
        (row("<image>\nWhat?", "See <image>.", image="a.png"), "<image> outside a question"),
        (row("<image>\nWhat?", "Cat.", image=[None]), "neither a path nor a list"),
        (row("<image>\nWhat?", "Cat.", image=7), "neither a path nor a list"),
        (row("<image>\nWhat?", " \n", image="a.png"), "empty answer"),
        (row("What?", "Cat.", "And?", ""), "empty answer"),
        (row("What?"), "no answer"),
        (row("Hello!", first="gpt"), "no answer"),
        ({"id": 1}, "no 'conversations'"),
        ({"id": 1, "conversations": []}, "no 'conversations'"),
        ({"id": 1, "conversations": "null"}, "no 'conversations'"),
        ({"id": 1, "conversations": "What? Cat."}, "'conversations' is a string but not JSON"),
        ({"id": 1, "conversations": "[" * 100_000}, "'conversations' is a string but not JSON"),
        ("a string", "no 'conversations'"),
        ({"conversations": [{"from": "robot", "value": "x"}]}, "without 'from'"),
        ({"conversations": [{"from": "human", "value": None}]}, "without 'from'"),
        ({"conversations": ["x"]}, "without 'from'"),
        ({"texts": ["x"]}, "without 'from'"),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": 7}]}]}, "without 'from'"),
        ({"messages": [{"role": "user", "content": ["What?"]}]}, "without 'from'"),
        ({"messages": [{"role": "user", "content": [{"type": "video"}]}]}, "a message part of type 'video'"),
    ],
)
def test_bad_rows_and_their_causes(bad: Any, message: str) -> None:
    with pytest.raises(BadRow, match=message.replace("(", r"\(")):
        to_example(bad)


@pytest.mark.parametrize(
    ("name", "content", "key"),
    [
        ("a.json", "", None),
        ("a.json", " \n", None),
        ("a.jsonl", "\n", None),
        ("a.json", '[\n{"id": 1},\n{"id": 2\n]', "line 4"),
        ("a.json", "[]", None),
        ("a.json", '{"id": 1}', None),
        ("a.json", '{"id": 1}\n{"id": 2}', None),
        ("a.jsonl", '[{"id": 1}]', "line 1"),
        ("a.jsonl", '{"id": 1}\n\n{"id": \n', "line 3"),
        ("a.json", "[" * 100_000, "line 1"),
        ("a.jsonl", '{"id": 1}\n' + "[" * 100_000, "line 2"),
    ],
)
def test_malformed_files_name_the_line(name: str, content: str, key: str | None, tmp_path: Path) -> None:
    (tmp_path / name).write_text(content)
    with raises_user_error(file=tmp_path / name, key=key):
        list(read_rows(tmp_path / name))


def test_json_lines_in_a_json_file_name_the_other_suffix(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('{"id": 1}\n{"id": 2}')
    with raises_user_error(file=tmp_path / "a.json") as caught:
        list(read_rows(tmp_path / "a.json"))
    assert ".jsonl" in (caught.value.remedy or "")


def test_deeply_nested_json_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text("[" * 100_000)
    with raises_user_error(file=tmp_path / "a.json"):
        read_object(tmp_path / "a.json")


def test_binary_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_bytes(b"\x89PNG\xff\xfe")
    with raises_user_error(file=tmp_path / "a.json"):
        list(read_rows(tmp_path / "a.json"))


@pytest.mark.parametrize("name", ["rows [v2].json", "rows [v2].parquet"])
def test_brackets_in_a_file_name_are_not_a_glob(name: str, tmp_path: Path) -> None:
    rows = [row("What?", "A cat.")]
    if name.endswith(".json"):
        (tmp_path / name).write_text(json.dumps(rows))
    else:
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / name)
    source = InstructionSource(file=str(tmp_path / name))
    require_file(source)
    assert len(RowStore(source)) == 1


def test_json_and_jsonl_are_the_same_rows(tmp_path: Path) -> None:
    rows = [{"id": 1}, {"id": 2}]
    (tmp_path / "a.json").write_text(json.dumps(rows))
    (tmp_path / "a.jsonl").write_text("\n\n".join(map(json.dumps, rows)) + "\n")
    assert list(read_rows(tmp_path / "a.json")) == list(read_rows(tmp_path / "a.jsonl")) == rows


# --- the data set -----------------------------------------------------------------------------------------------------


def test_unusable_rows_are_dropped_counted_and_limited(
    tmp_path: Path, mllm: Mllm, caplog: pytest.LogCaptureFixture
) -> None:
    make_image(tmp_path / "a.png")
    good = row("<image>\nWhat?", "Cat.", image="a.png")
    rows = [*[good] * 17, row("<image>\nWhat?", "Cat.", image="gone.png"), row("Why?", ""), row("Why?", " ")]
    opened = open_rows(tmp_path, rows, mllm, max_bad_fraction=0.15)
    assert len(opened) == 17
    assert dict(opened.dropped) == {"missing image": 1, "empty answer": 2}
    assert len(caplog.records) == 3, "one line per cause, and a summary"
    assert str(tmp_path / "gone.png") in caplog.text
    with raises_user_error(file=tmp_path / "rows.json"):
        open_rows(tmp_path, rows, mllm, max_bad_fraction=0.14)


def test_source_without_usable_rows_is_refused(tmp_path: Path, mllm: Mllm) -> None:
    with raises_user_error(file=tmp_path / "rows.json"):
        open_rows(tmp_path, [row("Why?", "")], mllm, max_bad_fraction=1.0)


@pytest.mark.parametrize("kind", ["text", "cut", "empty"])
def test_corrupt_image_is_replaced_and_counted(
    kind: str, tmp_path: Path, mllm: Mllm, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    make_image(tmp_path / "a.png")
    whole = (tmp_path / "a.png").read_bytes()
    (tmp_path / "bad.png").write_bytes({"text": b"<html>404</html>", "cut": whole[:45], "empty": b""}[kind])
    rows = [row("<image>\nBad?", "Yes.", image="bad.png"), row("<image>\nWhat?", "Cat.", image="a.png")]
    opened = open_rows(tmp_path, rows, mllm, max_bad_fraction=0.5)
    assert opened[0]["ids"] == opened[1]["ids"]
    assert (opened.corrupt.value, opened.seen.value) == (1, 3)
    assert str(tmp_path / "bad.png") in caplog.text
    monkeypatch.setattr(data, "MIN_SAMPLES", 4)
    opened[0]  # 2 of 4 is not above the limit
    strict = open_rows(tmp_path, rows, mllm, max_bad_fraction=0.4)
    strict[0], strict[1]
    with raises_user_error(file=tmp_path / "rows.json"):
        strict[0]


def test_data_set_with_only_corrupt_images_is_refused(tmp_path: Path, mllm: Mllm) -> None:
    (tmp_path / "bad.png").write_bytes(b"no image")
    opened = open_rows(tmp_path, [row("<image>\nBad?", "Yes.", image="bad.png")] * 3, mllm)
    with raises_user_error(file=tmp_path / "rows.json"):
        opened[0]


def test_corrupt_images_are_logged_at_powers_of_two(
    tmp_path: Path, mllm: Mllm, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "bad.png").write_bytes(b"no image")
    opened = open_rows(tmp_path, [row("<image>\nBad?", "Yes.", image="bad.png")] * 20, mllm, max_bad_fraction=1.0)
    with raises_user_error(file=tmp_path / "rows.json"):
        opened[0]
    counts = [int(re.findall(r"\d+", record.getMessage())[-1]) for record in caplog.records]
    assert counts == [1, 2, 4, 8, 16]


def test_samples_beyond_max_length_are_replaced_and_counted(tmp_path: Path, mllm: Mllm) -> None:
    make_image(tmp_path / "a.png")
    rows = [row("<image>\nWhat?", "Cat.", image="a.png"), row("2?", "2")]
    opened = open_rows(tmp_path, rows, mllm, max_length=18)
    assert opened[0]["ids"] == opened[1]["ids"]
    assert opened.corrupt.value == 1


# --- batches ----------------------------------------------------------------------------------------------------------


def test_collator_pads_on_the_right(tmp_path: Path, mllm: Mllm) -> None:
    make_image(tmp_path / "a.png")
    make_image(tmp_path / "b.png", "blue")
    rows = [
        row("<image>\n<image>\nWhich is it, the first or the second of them?", "Second.", image=["a.png", "b.png"]),
        row("2 plus 2?", "Four."),
        row("<image>\nWhat?", "Cat.", image="b.png"),
    ]
    opened = open_rows(tmp_path, rows, mllm)
    samples = [opened[at] for at in range(3)]
    batch = InstructionCollator(mllm.processor)(samples)
    longest = max(len(sample["ids"]) for sample in samples)
    assert {name: tuple(value.shape) for name, value in batch.items()} == {
        "input_ids": (3, longest),
        "attention_mask": (3, longest),
        "labels": (3, longest),
        "pixel_values": (3, 3, 96, 96),
    }
    for at, sample in enumerate(samples):
        size = len(sample["ids"])
        assert batch["input_ids"][at, :size].tolist() == sample["ids"]
        assert batch["labels"][at, :size].tolist() == sample["labels"]
        assert batch["attention_mask"][at].tolist() == [1] * size + [0] * (longest - size)
        assert set(batch["labels"][at, size:].tolist()) <= {IGNORED}
        assert set(batch["input_ids"][at, size:].tolist()) <= {mllm.tokenizer.pad_token_id}
    assert torch.equal(batch["pixel_values"][1], batch["pixel_values"][2]), "b.png, in reading order"
    assert not torch.equal(batch["pixel_values"][0], batch["pixel_values"][1])


def test_blank_image_does_not_change_a_text_only_batch(tmp_path: Path, mllm: Mllm) -> None:
    """Loss and gradients with the blank image equal those of the language model alone, and the tower runs."""
    rows = [row("2 plus 2?", "Four."), row("What is 3 plus 4, please?", "Seven.", "And 1 plus 1?", "Two.")]
    opened = open_rows(tmp_path, rows, mllm)
    samples = [opened[at] for at in range(2)]
    batch = InstructionCollator(mllm.processor)(samples)
    blank = batch["input_ids"] == mllm.processor.image_token_id
    assert blank.sum() == image_tokens(mllm.processor)
    assert not batch["attention_mask"][blank].any()

    model = mllm.model.requires_grad_(True)
    model.zero_grad()
    summed, count = supervised_loss(model, model, batch)
    summed.backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    longest = max(len(sample["ids"]) for sample in samples)
    ids, labels, mask = (batch[name][:, :longest].clone() for name in ("input_ids", "labels", "attention_mask"))
    ids[ids == mllm.processor.image_token_id] = mllm.tokenizer.pad_token_id
    model.zero_grad()
    hidden = model.model.language_model(input_ids=ids, attention_mask=mask).last_hidden_state
    logits = model.lm_head(hidden)[:, :-1].flatten(0, 1)
    alone = torch.nn.functional.cross_entropy(logits, labels[:, 1:].flatten(), ignore_index=IGNORED, reduction="sum")
    alone.backward()
    wanted = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()

    assert count == (labels != IGNORED).sum()
    torch.testing.assert_close(summed, alone)
    for name, gradient in found.items():
        expected = wanted.get(name, torch.zeros_like(gradient))
        torch.testing.assert_close(gradient, expected, msg=lambda text, name=name: f"{name}: {text}")
    assert any("multi_modal_projector" in name for name in found), "the projector took part"
    assert all(gradient.abs().max() == 0 for name, gradient in found.items() if "projector" in name or "tower" in name)
    assert set(wanted) <= set(found)


def naively_padded(image: Image.Image, mean: list[float]) -> Image.Image:
    side = max(image.size)
    square = Image.new("RGB", (side, side), tuple(int(255 * value) for value in mean))
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return square


@pytest.mark.parametrize("size", [(60, 20), (21, 64), (96, 96)])
def test_padded_images_in_training_and_in_the_checkpoint(size: tuple[int, int], mllm_dir: Path, tmp_path: Path) -> None:
    """Pixels equal those of a naively padded image, in training and in the loaded checkpoint."""
    processor = load_mllm(mllm_dir, device="cpu").processor
    own = processor.image_processor
    make_image(tmp_path / "a.png", "red", size)
    shown = Image.open(tmp_path / "a.png").convert("RGB")
    wanted = own(images=[naively_padded(shown, own.image_mean)], return_tensors="pt")["pixel_values"]
    squashed = own(images=[shown], return_tensors="pt")["pixel_values"]

    set_aspect_ratio(processor, "pad")
    assert image_tokens(processor) == 9
    (tmp_path / "rows.json").write_text(json.dumps([row("<image>\nWhat?", "Cat.", image="a.png")]))
    recipe = InstructionRecipe(
        file=str(tmp_path / "rows.json"), images=str(tmp_path), template="chatml", image_aspect_ratio="pad"
    )
    batch = InstructionCollator(processor)([InstructionDataset(recipe, processor)[0]])
    torch.testing.assert_close(batch["pixel_values"], wanted)
    processor.save_pretrained(tmp_path / "saved")
    loaded = AutoProcessor.from_pretrained(tmp_path / "saved")
    used = loaded(text="<image>", images=[shown], return_tensors="pt")
    torch.testing.assert_close(used["pixel_values"], wanted)
    assert used["input_ids"].tolist() == [[loaded.image_token_id] * 9]
    set_aspect_ratio(loaded, "squash")
    torch.testing.assert_close(loaded.image_processor(images=[shown], return_tensors="pt")["pixel_values"], squashed)


# --- grouping ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("images", "texts", "batch"), [(203, 51, 8), (16, 16, 8), (5, 2, 8), (0, 20, 4), (400, 3, 2)])
def test_grouped_order(images: int, texts: int, batch: int) -> None:
    random = torch.Generator().manual_seed(0)
    lengths = torch.randint(1, 300, (images + texts,), generator=random)
    lengths[torch.randperm(len(lengths), generator=random)[:texts]] *= -1
    sampler = LengthGroupedSampler(lengths.tolist(), batch, seed=3)
    order = list(sampler)
    assert sorted(order) == list(range(images + texts)), "every sample once"
    assert order == list(LengthGroupedSampler(lengths.tolist(), batch, seed=3)), "same seed, same order"
    batches = lengths[order][: len(order) // batch * batch].view(-1, batch)
    mixed = ((batches > 0).any(1) & (batches < 0).any(1)).sum()
    assert mixed <= 1, "only what is left of both kinds may share a batch"
    sampler.set_epoch(1)
    assert len(order) < 10 or list(sampler) != order
    if len(order) > 200:
        spread = (batches.abs().max(1).values - batches.abs().min(1).values).float().mean()
        assert spread < 100, "random batches of 8 out of 1..300 spread over about 230"
        first = batches.abs().float().mean(1)[:5]
        assert first.max() - first.min() > 20, "batches themselves come in random order"


def test_text_first_order() -> None:
    lengths = [5, -3, 7, -9, 2, 4, -6, -8, 1, 3, 6, 9]
    plain = [order[at : at + 2] for order in [list(LengthGroupedSampler(lengths, 2, seed=1))] for at in range(0, 12, 2)]
    order = list(LengthGroupedSampler(lengths, 2, seed=1, text_first=True))
    text = [batch for batch in plain if lengths[batch[0]] < 0]
    assert len(text) == 2 and plain[:2] != text, "the test would show nothing"
    assert order == [at for batch in [*text, *(batch for batch in plain if batch not in text)] for at in batch]
    with pytest.raises(UserError, match="set it too"):
        InstructionRecipe(file="x.json", template="chatml", text_first=True).check()


def naive_order(lengths: list[int], batch: int, seed: int) -> list[int]:
    """Reference implementation with lists: resumed runs must see the same samples."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(lengths), generator=generator).tolist()
    batches: list[list[int]] = []
    rest: list[int] = []
    for with_image in (True, False):
        members = [index for index in order if (lengths[index] > 0) == with_image]
        for start in range(0, len(members), 50 * batch):
            chunk = sorted(members[start : start + 50 * batch], key=lambda index: -abs(lengths[index]))
            cut = len(chunk) - len(chunk) % batch
            batches += [chunk[at : at + batch] for at in range(0, cut, batch)]
            rest += chunk[cut:]
    batches += [rest[at : at + batch] for at in range(0, len(rest) - batch + 1, batch)]
    tail = rest[len(rest) - len(rest) % batch :]
    shuffled = [batches[position] for position in torch.randperm(len(batches), generator=generator).tolist()]
    return [index for members in shuffled for index in members] + tail


@pytest.mark.parametrize(("images", "texts", "batch"), [(203, 51, 8), (5, 2, 8), (0, 20, 4), (900, 3, 2), (1, 0, 1)])
def test_grouped_order_equals_the_reference(images: int, texts: int, batch: int) -> None:
    random = torch.Generator().manual_seed(1)
    lengths = torch.randint(1, 30, (images + texts,), generator=random)  # many of the same length
    lengths[torch.randperm(len(lengths), generator=random)[:texts]] *= -1
    sampler = LengthGroupedSampler(lengths.numpy().astype("int32"), batch, seed=5)
    sampler.set_epoch(2)
    found = list(sampler)
    assert found == naive_order(lengths.tolist(), batch, seed=7)
    assert {type(index) for index in found} <= {int}


def test_lengths_are_negative_for_text_only_samples(tmp_path: Path, mllm: Mllm) -> None:
    make_image(tmp_path / "a.png")
    rows = [row("<image>\nWhat?", "Cat.", image="a.png"), row("2 plus 2?", "Four.")]
    first, second = open_rows(tmp_path, rows, mllm).lengths()
    assert first > 0 > second


def test_counters_are_shared_with_loader_workers(tmp_path: Path, mllm: Mllm) -> None:
    make_image(tmp_path / "a.png")
    (tmp_path / "bad.png").write_bytes(b"no image")
    rows = [row("<image>\nBad?", "Yes.", image="bad.png"), row("<image>\nWhat?", "Cat.", image="a.png")]
    opened = open_rows(tmp_path, rows, mllm)
    loader = torch.utils.data.DataLoader(
        opened, batch_size=2, num_workers=1, collate_fn=InstructionCollator(mllm.processor)
    )
    assert next(iter(loader))["pixel_values"].shape == (2, 3, 96, 96)
    assert (opened.corrupt.value, opened.seen.value) == (1, 3)


def test_held_out_rows_are_not_trained_on() -> None:
    """With a source of weight 2, which has every row twice."""
    from types import SimpleNamespace

    from clips_mllm.data.dataset import train_eval_split

    rows = np.array([*range(50), *range(50), 60, 61])

    class Whole:
        examples = SimpleNamespace(indices=rows)

        def __len__(self) -> int:
            return len(rows)

    whole: Any = Whole()
    trained, held = train_eval_split(whole, 0.1, seed=0)
    assert len(held) == 5 and len(set(rows[held.indices])) == 5
    assert not set(rows[held.indices]) & set(rows[trained.indices])
    assert set(rows[held.indices]) | set(rows[trained.indices]) == set(rows)
