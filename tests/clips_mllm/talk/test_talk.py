"""The engine under terminal, browser and endpoint: what is read again, what is left out, who gets which answer."""

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
from clips_mllm.talk.answer import Answer
from clips_mllm.talk.conversation import Conversation, fit, question, statement
from clips_mllm.talk.engine import Closed, Engine, QueueFull, TooLong
from clips_mllm.talk.prompt import InputImage
from clips_mllm.talk.sampling import Sampling, TextStream
from vision_tower.common.errors import UserError

GREEDY = Sampling(max_new_tokens=12)


@pytest.fixture(scope="module")
def engine(talker: Path) -> Iterator[Engine]:
    with Engine(load_mllm(talker, device="cpu"), max_batch_size=4) as running:
        yield running


@pytest.fixture(scope="module")
def images() -> list[InputImage]:
    return [InputImage(Image.new("RGB", (40 + 8 * i, 40), color)) for i, color in enumerate(("green", "red", "blue"))]


class Reads:
    """Counts the positions that the language model reads, and the images that the tower sees."""

    def __init__(self, engine: Engine) -> None:
        self.positions: list[int] = []
        self.images: list[int] = []
        model = engine.mllm.model.model
        self.hooks = [
            model.language_model.register_forward_pre_hook(self._language, with_kwargs=True),
            model.vision_tower.register_forward_pre_hook(self._tower, with_kwargs=True),
        ]

    def _language(self, _: Any, __: Any, given: dict[str, Any]) -> None:
        self.positions.append(given["inputs_embeds"].shape[1])

    def _tower(self, _: Any, given: Any, __: Any) -> None:
        self.images.append(given[0].shape[0])

    def take(self) -> tuple[int, int]:
        """Positions and images since the last call."""
        found = sum(self.positions), sum(self.images)
        self.positions.clear()
        self.images.clear()
        return found


@pytest.fixture
def reads(engine: Engine) -> Iterator[Reads]:
    counter = Reads(engine)
    yield counter
    for hook in counter.hooks:
        hook.remove()


def fresh(engine: Engine, messages: list[Any], images: list[InputImage], tokens: int = 12, **options: Any) -> str:
    """`generate` on the whole conversation, from scratch, by the stock processor."""
    mllm = engine.mllm
    text = mllm.processor.apply_chat_template(messages, add_generation_prompt=True)
    decoded = [image.image for image in images]
    inputs = mllm.processor(text=text, images=decoded or None, return_tensors="pt")
    with torch.inference_mode():
        out = mllm.model.generate(**inputs, max_new_tokens=tokens, do_sample=False, **options)
    return str(mllm.tokenizer.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))


def test_a_later_turn_reads_only_what_is_new(engine: Engine, reads: Reads, images: list[InputImage]) -> None:
    """The issue's count: nothing of the first prompt, of its image or of its answer is read again."""
    conversation = Conversation(engine)
    conversation.waiting = [images[0]]
    asked = engine.prompt([question("What is this?", 1)], images[:1])
    first = "".join(conversation.ask("What is this?", GREEDY))
    positions, shown = reads.take()
    assert shown == 1 and positions <= len(asked.ids) + GREEDY.max_new_tokens - 1
    before = len(conversation.messages)
    second = "".join(conversation.ask("And its colour?", GREEDY))
    positions, shown = reads.take()
    whole = engine.prompt([*conversation.messages[:before], question("And its colour?", 0)], images[:1])
    template = len(whole.ids) - len(asked.ids)
    assert shown == 0, "no image runs through the tower again"
    assert positions <= template + GREEDY.max_new_tokens - 1 < len(whole.ids)
    assert second == fresh(engine, [*conversation.messages[:before], question("And its colour?", 0)], images[:1])
    conversation.undo()
    reads.take()
    assert "".join(conversation.ask("And its colour?", GREEDY)) == second
    positions, shown = reads.take()
    assert shown == 0 and positions <= GREEDY.max_new_tokens, "a retry reads the last position of the prompt alone"
    assert first != second


def test_answers_are_those_of_a_fresh_run(engine: Engine, images: list[InputImage]) -> None:
    """Images at any turn, several in one; undo and another question in between."""
    conversation = Conversation(engine)
    for turn, (text, shown) in enumerate([("One?", []), ("Two?", [0, 1]), ("Three?", []), ("Four?", [2, 0])]):
        conversation.waiting = [images[place] for place in shown]
        if turn == 2:
            list(conversation.ask("A question that is taken back.", GREEDY))
            conversation.undo()
        said = "".join(conversation.ask(text, GREEDY))
        assert said == fresh(engine, conversation.messages[:-1], conversation.images)


def test_the_same_words_with_another_image_are_read_anew(engine: Engine, images: list[InputImage]) -> None:
    answers = []
    for image in images:
        messages = [question("What?", 1)]
        answers.append("".join(Answer(engine, engine.prompt(messages, [image]), GREEDY)))
        assert answers[-1] == fresh(engine, messages, [image])
    assert len(set(answers)) > 1


def test_rows_of_a_batch_get_their_own_answers(engine: Engine, images: list[InputImage]) -> None:
    """Prompts and answers of different lengths, more requests than rows: each as if it were alone."""
    asked = [
        ([question(f"Question {number}: " + "and so on " * (number % 4), number % 3)], images[: number % 3])
        for number in range(9)
    ]
    budgets = [3 + 5 * (number % 4) for number in range(9)]
    alone = [fresh(engine, *request, tokens=budget) for request, budget in zip(asked, budgets, strict=True)]
    answers = [
        Answer(engine, engine.prompt(*request), Sampling(max_new_tokens=budget))
        for request, budget in zip(asked, budgets, strict=True)
    ]
    assert ["".join(answer) for answer in answers] == alone
    assert {answer.done.reason for answer in answers if answer.done} <= {"stop", "length"}


def test_what_fails_in_one_answer_leaves_the_others(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Such as logits that are not numbers, which cannot be drawn from."""
    prompt = engine.prompt([question("One?", 0)], [])
    alone = fresh(engine, [question("One?", 0)], [], tokens=12)
    bad, good = (Answer(engine, prompt, Sampling(max_new_tokens=12)) for _ in range(2))
    choose, calls = bad._request.chooser.choose, iter(range(99))

    def fails(*given: Any) -> int:
        if next(calls) == 3:
            raise RuntimeError("probability tensor contains inf")
        return choose(*given)

    monkeypatch.setattr(bad._request.chooser, "choose", fails)
    assert "".join(good) == alone
    with pytest.raises(RuntimeError, match="probability tensor"):
        list(bad)


def test_after_memory_ran_out_the_next_answer_comes(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was kept for later turns is let go."""
    messages = [question("One?", 0)]
    alone = "".join(Answer(engine, engine.prompt(messages, []), Sampling(max_new_tokens=5)))
    assert engine.prefixes.kept
    read = engine.read

    def full(*given: Any) -> Any:
        monkeypatch.setattr(engine, "read", read)
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(engine, "read", full)
    with pytest.raises(torch.OutOfMemoryError):
        list(Answer(engine, engine.prompt(messages, []), Sampling(max_new_tokens=5)))
    engine.run(lambda: None)  # the worker is done with it
    assert not engine.prefixes.kept and not engine.features.kept
    assert "".join(Answer(engine, engine.prompt(messages, []), Sampling(max_new_tokens=5))) == alone


def test_the_queue_has_an_end_and_cancelled_answers_leave(engine: Engine) -> None:
    prompt = engine.prompt([question("Why?", 0)], [])
    release = threading.Event()
    holder = threading.Thread(target=engine.run, args=(lambda: release.wait(30),))
    holder.start()
    try:
        while engine.load[1]:  # until the worker has taken the job that holds it
            time.sleep(0.01)
        answers = [Answer(engine, prompt, GREEDY) for _ in range(engine.max_batch_size + engine.max_waiting)]
        with pytest.raises(QueueFull):
            Answer(engine, prompt, GREEDY)
        for answer in answers:
            answer.stop()
    finally:
        release.set()
    holder.join()
    assert all("".join(answer) == "" for answer in answers)
    assert {answer.done.reason for answer in answers if answer.done} == {"cancelled"}


def test_at_the_end_of_patience_every_answer_ends(talker: Path) -> None:
    """Also the one whose prompt is being read, and those that wait."""
    with Engine(load_mllm(talker, device="cpu"), max_batch_size=2) as engine:
        reading, go_on = threading.Event(), threading.Event()
        read = engine.read

        def slow(*given: Any) -> torch.Tensor:
            reading.set()
            go_on.wait(30)
            return read(*given)

        engine.read = slow  # type: ignore[method-assign]
        prompt = engine.prompt([question("Why?", 0)], [])
        answers = [Answer(engine, prompt, Sampling(max_new_tokens=100)) for _ in range(4)]
        assert reading.wait(30)
        closing = threading.Thread(target=engine.close)
        closing.start()
        while not engine._ended:
            time.sleep(0.01)
        go_on.set()
        closing.join(30)
        assert ["".join(answer) for answer in answers] == [""] * 4
        assert {answer.done.reason for answer in answers if answer.done} == {"cancelled"}


def test_long_conversations_are_cut_between_turns(talker: Path, images: list[InputImage]) -> None:
    with Engine(load_mllm(talker, device="cpu"), context=150) as engine:
        notices: list[str] = []
        conversation = Conversation(engine, notices.append)
        conversation.system = "Be brief."
        for turn in range(8):
            conversation.waiting = [images[turn % 3]]
            list(conversation.ask(f"Question {turn}?", Sampling(max_new_tokens=8)))
        assert len(conversation.turns) == 16, "what was left out is still there to be saved"
        assert "its first turn is left out" in notices[0] and "its first 2 turns are left out" in notices[1]
        fitted = fit(engine, conversation.messages[:-1], conversation.images, Sampling(max_new_tokens=8))
        assert fitted.messages[0] == statement("system", "Be brief.") and fitted.messages[1]["role"] == "user"
        prompt = engine.prompt(fitted.messages, fitted.images)
        runs = [
            len(list(run)) for image, run in itertools.groupby(prompt.keys, lambda key: isinstance(key, str)) if image
        ]
        assert len(runs) == len(fitted.images) and runs == prompt.lengths, "whole images only"
        assert fitted.images == conversation.images[fitted.dropped :]
        with pytest.raises(TooLong, match="context of 150"):
            list(Conversation(engine).ask("long " * 200, GREEDY))


def test_a_saved_conversation_is_a_training_row(engine: Engine, images: list[InputImage], tmp_path: Path) -> None:
    files = []
    for number, image in enumerate(images):
        files.append(str(tmp_path / f"{number}.png"))
        image.image.save(files[-1])
    conversation = Conversation(engine)
    conversation.system = "Be brief."
    conversation.turns = [question("Which?", 2), statement("assistant", "Both."), question("Why?", 1)]
    conversation.turns += [statement("assistant", "So.\nReally."), question("And?", 0), statement("assistant", "No.")]
    conversation.images = [InputImage(p.image, f) for p, f in zip(images, files, strict=True)]
    row = conversation.to_row("chat")
    example = to_example(row)
    assert example.messages == conversation.messages and example.images == files
    again = Conversation(engine)
    again.load_row(row, tmp_path)
    assert again.messages == conversation.messages
    assert [image.key for image in again.images] == [image.key for image in images]
    with pytest.raises(UserError, match="nothing to save"):
        Conversation(engine).to_row("empty")
    conversation.turns[1] = statement("assistant", "\n")  # stopped before its first word
    kept = to_example(conversation.to_row("chat"))
    assert conversation.unanswered == 1 and kept.images == files[2:]
    assert kept.messages == [*conversation.messages[:1], *conversation.messages[3:]]
    with pytest.raises(UserError, match="LLaVA's format"):
        again.load_row({"conversations": []}, tmp_path)


def test_empty_thoughts_are_not_told() -> None:
    """Qwen3's template opens an answer with them; what only looks like it is told."""

    class Letters:
        def decode(self, ids: list[int], **_: Any) -> str:
            return "".join(map(chr, ids))

    for said, told in (
        ("<think>\n\n</think>\n\nYes.", "Yes."),
        ("<think>\nSo", "<think>\nSo"),
        ("<thin", "<thin"),
        ("Yes <think>\n\n</think>\n\n", "Yes <think>\n\n</think>\n\n"),
    ):
        stream = TextStream(Letters(), ())  # type: ignore[arg-type]
        assert "".join([*(stream.push(ord(letter)) for letter in said), stream.end()]) == told


def test_seeds_and_stop_texts(engine: Engine) -> None:
    prompt = engine.prompt([question("Why?", 0)], [])

    def draw(**values: Any) -> str:
        return "".join(Answer(engine, prompt, Sampling(max_new_tokens=12, **values)))

    assert draw(temperature=2.0, seed=1) == draw(temperature=2.0, seed=1) != draw(temperature=2.0, seed=2)
    whole = draw()
    assert draw(stop=(whole[3:6],)) == whole[: whole.index(whole[3:6])]
    assert draw(repetition_penalty=3.0) == fresh(engine, [question("Why?", 0)], [], repetition_penalty=3.0)
    for wrong in ({"temperature": -1.0}, {"top_p": 0.0}, {"max_new_tokens": 0}, {"repetition_penalty": 0.0}):
        with pytest.raises(UserError, match=next(iter(wrong))):
            Sampling(**wrong)  # type: ignore[arg-type]


def test_pieces_are_whole_characters(engine: Engine) -> None:
    """A character of several tokens comes when its last one does, and pieces join to the whole text."""
    text = "Grüße 🐕 — 犬が走る"
    stream = TextStream(engine.mllm.tokenizer)
    pieces = [stream.push(token) for token in engine.mllm.tokenizer(text, add_special_tokens=False)["input_ids"]]
    assert "".join([*pieces, stream.end()]) == text
    assert not any("\ufffd" in piece for piece in pieces)


def test_a_closed_engine_ends_its_answers(talker: Path) -> None:
    engine = Engine(load_mllm(talker, device="cpu"))
    prompt = engine.prompt([question("Why?", 0)], [])
    answer = Answer(engine, prompt, Sampling(max_new_tokens=100))
    engine.close(patience=60)
    "".join(answer)
    assert answer.done is not None and answer.done.reason in ("stop", "length"), "patience lets it end"
    with pytest.raises(Closed):
        Answer(engine, prompt, GREEDY)
