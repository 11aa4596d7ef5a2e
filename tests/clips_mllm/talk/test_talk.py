"""Engine and conversation: reuse of prefixes, batching, truncation to the context, cancellation."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from clips_mllm.data.llava_json import to_example
from clips_mllm.model.checkpoint import load_mllm
from clips_mllm.talk.conversation import Conversation, text_message, truncate, user_message
from clips_mllm.talk.engine import Engine
from clips_mllm.talk.images import InputImage
from clips_mllm.talk.requests import Closed, QueueFull, TooLong
from clips_mllm.talk.sampling import IncrementalDetokenizer, Sampling
from tests.helpers.errors import raises_user_error

GREEDY = Sampling(max_new_tokens=12)


@pytest.fixture(scope="module")
def engine(chat_mllm: Path) -> Iterator[Engine]:
    with Engine(load_mllm(chat_mllm, device="cpu"), max_batch_size=4) as running:
        yield running


@pytest.fixture(scope="module")
def images() -> list[InputImage]:
    return [InputImage(Image.new("RGB", (40 + 8 * i, 40), color)) for i, color in enumerate(("green", "red", "blue"))]


class ForwardCounter:
    """Counts positions read by the language model and images encoded by the tower."""

    def __init__(self, engine: Engine) -> None:
        self.positions: list[int] = []
        self.images: list[int] = []
        model = engine.mllm.model.model
        self.hooks = [
            model.language_model.register_forward_pre_hook(self._count_positions, with_kwargs=True),
            model.vision_tower.register_forward_pre_hook(self._count_images, with_kwargs=True),
        ]

    def _count_positions(self, _: Any, __: Any, kwargs: dict[str, Any]) -> None:
        self.positions.append(kwargs["inputs_embeds"].shape[1])

    def _count_images(self, _: Any, args: Any, __: Any) -> None:
        self.images.append(args[0].shape[0])

    def take(self) -> tuple[int, int]:
        """Return the counts since the last call."""
        counts = sum(self.positions), sum(self.images)
        self.positions.clear()
        self.images.clear()
        return counts


@pytest.fixture
def forwards(engine: Engine) -> Iterator[ForwardCounter]:
    counter = ForwardCounter(engine)
    yield counter
    for hook in counter.hooks:
        hook.remove()


def plain_answer(
    engine: Engine, messages: list[Any], images: list[InputImage], tokens: int = 12, **options: Any
) -> str:
    """Answer with `generate` and the stock processor, without any cache."""
    mllm = engine.mllm
    text = mllm.processor.apply_chat_template(messages, add_generation_prompt=True)
    decoded = [image.image for image in images]
    inputs = mllm.processor(text=text, images=decoded or None, return_tensors="pt")
    with torch.inference_mode():
        out = mllm.model.generate(**inputs, max_new_tokens=tokens, do_sample=False, **options)
    return str(mllm.tokenizer.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))


def test_later_turns_read_only_new_positions(
    engine: Engine, forwards: ForwardCounter, images: list[InputImage]
) -> None:
    """Nothing of the first prompt, its image or its answer is read again."""
    conversation = Conversation(engine)
    conversation.pending_images = [images[0]]
    asked = engine.prompt([user_message("What is this?", 1)], images[:1])
    first = "".join(conversation.ask("What is this?", GREEDY))
    positions, encoded = forwards.take()
    assert encoded == 1 and positions <= len(asked.ids) + GREEDY.max_new_tokens - 1
    before = len(conversation.messages)
    second = "".join(conversation.ask("And its color?", GREEDY))
    positions, encoded = forwards.take()
    full = engine.prompt([*conversation.messages[:before], user_message("And its color?", 0)], images[:1])
    template = len(full.ids) - len(asked.ids)
    assert encoded == 0
    assert positions <= template + GREEDY.max_new_tokens - 1 < len(full.ids)
    assert second == plain_answer(
        engine, [*conversation.messages[:before], user_message("And its color?", 0)], images[:1]
    )
    conversation.undo()
    forwards.take()
    assert "".join(conversation.ask("And its color?", GREEDY)) == second
    positions, encoded = forwards.take()
    assert encoded == 0 and positions <= GREEDY.max_new_tokens, "a retry reads the last position of the prompt only"
    assert first != second


def test_answers_equal_plain_generate(engine: Engine, images: list[InputImage]) -> None:
    """With images in any turn, several in one turn, and an undone question."""
    conversation = Conversation(engine)
    for turn, (text, numbers) in enumerate([("One?", []), ("Two?", [0, 1]), ("Three?", []), ("Four?", [2, 0])]):
        conversation.pending_images = [images[number] for number in numbers]
        if turn == 2:
            list(conversation.ask("An undone question.", GREEDY))
            conversation.undo()
        answer = "".join(conversation.ask(text, GREEDY))
        assert answer == plain_answer(engine, conversation.messages[:-1], conversation.images)


def test_prefix_cache_distinguishes_images(engine: Engine, images: list[InputImage]) -> None:
    answers = []
    for image in images:
        messages = [user_message("What?", 1)]
        answers.append("".join(engine.answer(engine.prompt(messages, [image]), GREEDY)))
        assert answers[-1] == plain_answer(engine, messages, [image])
    assert len(set(answers)) > 1


def test_batched_answers_equal_single_ones(engine: Engine, images: list[InputImage]) -> None:
    """Prompts and answers have different lengths, and there are more requests than rows."""
    asked = [
        ([user_message(f"Question {number}: " + "and so on " * (number % 4), number % 3)], images[: number % 3])
        for number in range(9)
    ]
    budgets = [3 + 5 * (number % 4) for number in range(9)]
    expected = [plain_answer(engine, *request, tokens=budget) for request, budget in zip(asked, budgets, strict=True)]
    answers = [
        engine.answer(engine.prompt(*request), Sampling(max_new_tokens=budget))
        for request, budget in zip(asked, budgets, strict=True)
    ]
    assert ["".join(answer) for answer in answers] == expected
    assert {answer.done.reason for answer in answers if answer.done} <= {"stop", "length"}


def test_sampling_errors_end_one_answer_only(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """For example NaN probabilities."""
    prompt = engine.prompt([user_message("One?", 0)], [])
    expected = plain_answer(engine, [user_message("One?", 0)], [], tokens=12)
    bad, good = (engine.answer(prompt, Sampling(max_new_tokens=12)) for _ in range(2))
    sample, calls = bad.request.sampler.sample, itertools.count()

    def fail_at_fourth(*args: Any) -> int:
        if next(calls) == 3:
            raise RuntimeError("probability tensor contains inf")
        return sample(*args)

    monkeypatch.setattr(bad.request.sampler, "sample", fail_at_fourth)
    assert "".join(good) == expected
    with pytest.raises(RuntimeError):
        list(bad)


def test_out_of_memory_clears_the_prefix_cache(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """The request fails, and the next one is answered."""
    messages = [user_message("One?", 0)]
    expected = "".join(engine.answer(engine.prompt(messages, []), Sampling(max_new_tokens=5)))
    assert engine.prefixes.entries
    read = engine.read

    def out_of_memory(*args: Any) -> Any:
        monkeypatch.setattr(engine, "read", read)
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(engine, "read", out_of_memory)
    with pytest.raises(torch.OutOfMemoryError):
        list(engine.answer(engine.prompt(messages, []), Sampling(max_new_tokens=5)))
    engine.run(lambda: None)  # waits until the worker has handled the error
    assert not engine.prefixes.entries
    assert "".join(engine.answer(engine.prompt(messages, []), Sampling(max_new_tokens=5))) == expected


def test_full_queue_rejects_and_cancelled_requests_end(engine: Engine) -> None:
    prompt = engine.prompt([user_message("Why?", 0)], [])
    release = threading.Event()
    blocker = threading.Thread(target=engine.run, args=(lambda: release.wait(30),))
    blocker.start()
    try:
        while engine.load[1]:  # until the worker runs the blocking job
            time.sleep(0.01)
        answers = [engine.answer(prompt, GREEDY) for _ in range(engine.max_batch_size + engine.max_waiting)]
        with pytest.raises(QueueFull):
            engine.answer(prompt, GREEDY)
        for answer in answers:
            answer.stop()
    finally:
        release.set()
    blocker.join()
    assert all("".join(answer) == "" for answer in answers)
    assert {answer.done.reason for answer in answers if answer.done} == {"cancelled"}


def test_close_ends_running_and_waiting_requests(chat_mllm: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Including the request whose prompt is being read."""
    with Engine(load_mllm(chat_mllm, device="cpu"), max_batch_size=2) as engine:
        reading, release = threading.Event(), threading.Event()
        read = engine.read

        def blocked(*args: Any) -> torch.Tensor:
            reading.set()
            release.wait(30)
            return read(*args)

        monkeypatch.setattr(engine, "read", blocked)
        prompt = engine.prompt([user_message("Why?", 0)], [])
        answers = [engine.answer(prompt, Sampling(max_new_tokens=100)) for _ in range(4)]
        assert reading.wait(30)
        closing = threading.Thread(target=engine.close)
        closing.start()
        while not engine._aborting:
            time.sleep(0.01)
        release.set()
        closing.join(30)
        assert ["".join(answer) for answer in answers] == [""] * 4
        assert {answer.done.reason for answer in answers if answer.done} == {"cancelled"}


def test_long_conversations_are_truncated_between_turns(chat_mllm: Path, images: list[InputImage]) -> None:
    with Engine(load_mllm(chat_mllm, device="cpu"), context=150) as engine:
        notices: list[str] = []
        conversation = Conversation(engine, notices.append)
        conversation.system = "Be brief."
        for turn in range(8):
            conversation.pending_images = [images[turn % 3]]
            list(conversation.ask(f"Question {turn}?", Sampling(max_new_tokens=8)))
        assert len(conversation.turns) == 16, "dropped turns remain in the conversation, to be saved"
        assert len(notices) == conversation.dropped, "one notice whenever more turns are dropped"
        truncated = truncate(engine, conversation.messages[:-1], conversation.images, Sampling(max_new_tokens=8))
        assert truncated.messages[0] == text_message("system", "Be brief.") and truncated.messages[1]["role"] == "user"
        prompt = engine.prompt(truncated.messages, truncated.images)
        runs = [
            len(list(run)) for image, run in itertools.groupby(prompt.keys, lambda key: isinstance(key, str)) if image
        ]
        assert len(runs) == len(truncated.images) and runs == prompt.lengths, "images are not split"
        assert truncated.images == conversation.images[truncated.dropped :]
        with pytest.raises(TooLong):
            list(Conversation(engine).ask("long " * 200, GREEDY))


def test_saved_conversation_is_a_training_row(engine: Engine, images: list[InputImage], tmp_path: Path) -> None:
    files = []
    for number, image in enumerate(images):
        files.append(str(tmp_path / f"{number}.png"))
        image.image.save(files[-1])
    conversation = Conversation(engine)
    conversation.system = "Be brief."
    conversation.turns = [user_message("Which?", 2), text_message("assistant", "Both."), user_message("Why?", 1)]
    conversation.turns += [
        text_message("assistant", "So.\nReally."),
        user_message("And?", 0),
        text_message("assistant", "No."),
    ]
    conversation.images = [InputImage(p.image, f) for p, f in zip(images, files, strict=True)]
    row = conversation.to_row("chat")
    example = to_example(row)
    assert example.messages == conversation.messages and example.images == files
    loaded = Conversation(engine)
    loaded.load_row(row, tmp_path)
    assert loaded.messages == conversation.messages
    assert [image.key for image in loaded.images] == [image.key for image in images]
    with raises_user_error():
        Conversation(engine).to_row("empty")
    conversation.turns[1] = text_message("assistant", "\n")  # stopped before its first token
    kept = to_example(conversation.to_row("chat"))
    assert conversation.unanswered == 1 and kept.images == files[2:]
    assert kept.messages == [*conversation.messages[:1], *conversation.messages[3:]]
    with raises_user_error():
        loaded.load_row({"conversations": []}, tmp_path)


def test_empty_thought_blocks_are_removed() -> None:
    """Qwen3's template starts an answer with one; similar text is kept."""

    class Letters:
        def decode(self, ids: list[int], **_: Any) -> str:
            return "".join(map(chr, ids))

    for text, expected in (
        ("<think>\n\n</think>\n\nYes.", "Yes."),
        ("<think>\nSo", "<think>\nSo"),
        ("<thin", "<thin"),
        ("Yes <think>\n\n</think>\n\n", "Yes <think>\n\n</think>\n\n"),
    ):
        stream = IncrementalDetokenizer(Letters(), ())  # type: ignore[arg-type]
        assert "".join([*(stream.push(ord(letter)) for letter in text), stream.flush()]) == expected


def test_seed_stop_strings_and_invalid_values(engine: Engine) -> None:
    prompt = engine.prompt([user_message("Why?", 0)], [])

    def answer(**values: Any) -> str:
        return "".join(engine.answer(prompt, Sampling(max_new_tokens=12, **values)))

    assert answer(temperature=2.0, seed=1) == answer(temperature=2.0, seed=1) != answer(temperature=2.0, seed=2)
    full = answer()
    assert answer(stop=(full[3:6],)) == full[: full.index(full[3:6])]
    assert answer(repetition_penalty=3.0) == plain_answer(engine, [user_message("Why?", 0)], [], repetition_penalty=3.0)
    for key, value in (("temperature", -1.0), ("top_p", 0.0), ("max_new_tokens", 0), ("repetition_penalty", 0.0)):
        with raises_user_error(key=key, value=value):
            Sampling(**{key: value})


def test_streamed_text_has_complete_characters(engine: Engine) -> None:
    """A character of several tokens is emitted with its last token."""
    text = "Grüße 🐕 — 犬が走る"
    stream = IncrementalDetokenizer(engine.mllm.tokenizer)
    parts = [stream.push(token) for token in engine.mllm.tokenizer(text, add_special_tokens=False)["input_ids"]]
    assert "".join([*parts, stream.flush()]) == text
    assert not any("\ufffd" in part for part in parts)


def test_close_with_timeout_completes_answers(chat_mllm: Path) -> None:
    engine = Engine(load_mllm(chat_mllm, device="cpu"))
    prompt = engine.prompt([user_message("Why?", 0)], [])
    answer = engine.answer(prompt, Sampling(max_new_tokens=100))
    engine.close(timeout=60)
    "".join(answer)
    assert answer.done is not None and answer.done.reason in ("stop", "length")
    with pytest.raises(Closed):
        engine.answer(prompt, GREEDY)
