"""Chat: one question, several turns through a pipe, images, and streaming that equals plain generation."""

from __future__ import annotations

import io
import json
import os
import select
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
import torch
from PIL import Image

from clips_mllm.chat import main
from clips_mllm.model.checkpoint import load_mllm
from clips_mllm.model.quantize import Quantize
from clips_mllm.talk.conversation import Conversation
from clips_mllm.talk.engine import Engine
from clips_mllm.talk.images import read_image
from clips_mllm.talk.recipes import ChatRecipe
from clips_mllm.talk.sampling import Sampling
from clips_mllm.talk.start import check_model
from clips_mllm.talk.terminal import Terminal, dropped_files
from tests.helpers.train_runs import heed_ctrl_c
from vision_tower.common.errors import UserError

TOKENS = 10
GREEDY = Sampling(max_new_tokens=TOKENS)


@pytest.fixture(scope="module")
def engine(talker: Path) -> Iterator[Engine]:
    with Engine(load_mllm(talker, device="cpu")) as running:
        yield running


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("images with blanks")
    files = []
    for color in ("green", "red"):
        files.append(folder / f"{color} one.png")
        Image.new("RGB", (50, 40), color).save(files[-1])
    return files


def plain_answer(folder: Path, messages: list[dict[str, Any]], files: list[Path], quantize: Quantize = "none") -> str:
    """`generate` at once, without streaming, on a fresh model."""
    mllm = load_mllm(folder, device="cpu", quantize=quantize)
    text = mllm.processor.apply_chat_template(messages, add_generation_prompt=True)
    shown = [Image.open(file).convert("RGB") for file in files]
    inputs = mllm.processor(text=text, images=shown or None, return_tensors="pt")
    with torch.inference_mode():
        out = mllm.model.generate(**inputs, max_new_tokens=TOKENS, do_sample=False)
    return str(mllm.tokenizer.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))


def asked(text: str, images: int = 0) -> dict[str, Any]:
    return {"role": "user", "content": [{"type": "image"}] * images + [{"type": "text", "text": text}]}


def answered(text: str) -> dict[str, Any]:
    return {"role": "assistant", "content": [{"type": "text", "text": text}]}


def arguments(folder: Path, *words: str) -> list[str]:
    return [str(folder), "--max_new_tokens", str(TOKENS), "--device", "cpu", *words]


def pipe(monkeypatch: pytest.MonkeyPatch, *lines: str) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{line}\n" for line in lines)))


def test_one_question(talker: Path, images: list[Path], capsys: pytest.CaptureFixture[str]) -> None:
    main(arguments(talker, "--image", str(images[0]), "--question", "What is it?"))
    seen = capsys.readouterr().out
    assert seen == plain_answer(talker, [asked("What is it?", 1)], images[:1]) + "\n"
    main(arguments(talker, *(word for file in images for word in ("--image", str(file))), "--question", "Which?"))
    assert capsys.readouterr().out == plain_answer(talker, [asked("Which?", 2)], images) + "\n"
    main(arguments(talker, "--question", "What is it?"))
    blind = capsys.readouterr().out
    assert blind == plain_answer(talker, [asked("What is it?")], []) + "\n"
    assert blind != seen


def test_the_llm_in_four_bits(talker: Path, images: list[Path], capsys: pytest.CaptureFixture[str]) -> None:
    main(arguments(talker, "--quantize", "4bit", "--image", str(images[0]), "--question", "What is it?"))
    asked_once = ([asked("What is it?", 1)], images[:1])
    rounded = plain_answer(talker, *asked_once, quantize="4bit")
    assert capsys.readouterr().out == rounded + "\n"
    assert rounded != plain_answer(talker, *asked_once), "weights so large tell four bits from the whole"


def test_pieces_join_to_the_whole_answer(engine: Engine, talker: Path, images: list[Path]) -> None:
    conversation = Conversation(engine)
    conversation.waiting.append(read_image(images[1]))
    pieces = list(conversation.ask("Tell me all.", GREEDY))
    assert len(pieces) > 1
    assert "".join(pieces) == plain_answer(talker, [asked("Tell me all.", 1)], images[1:])
    assert conversation.messages == [asked("Tell me all.", 1), answered("".join(pieces))]


def test_a_talk_through_a_pipe(
    talker: Path, images: list[Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What was said and shown before is part of every later prompt, until /reset."""
    pipe(monkeypatch, f"/image {images[0]}", "What?", "", f"/image '{images[1]}'", "And this?", "/reset", "Why?")
    main(arguments(talker))
    first = plain_answer(talker, [asked("What?", 1)], images[:1])
    talk = [asked("What?", 1), answered(first), asked("And this?", 1)]
    second = plain_answer(talker, talk, images)
    third = plain_answer(talker, [asked("Why?")], [])
    assert capsys.readouterr().out == f"{first}\n{second}\n{third}\n"


def test_slips_of_the_finger_do_not_end_the_talk(
    talker: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "bad.png").write_bytes(b"no image")
    gone = tmp_path / "gone.png"
    pipe(monkeypatch, f"/image {gone}", f"/image {tmp_path / 'bad.png'}", "What is <image>?", "Why?", "/quit", "No.")
    with pytest.raises(UserError, match="3 of the lines could not be used"):
        main(arguments(talker))
    said = capsys.readouterr()
    assert said.out == plain_answer(talker, [asked("Why?")], []) + "\n"
    errors = [line for line in said.err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 3
    assert str(gone) in errors[0]
    assert "bad.png: not a readable image" in errors[1]
    assert "<image> in a question" in errors[2]


def test_a_bad_image_is_told_before_the_model_loads(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"gone\.png: no such image"):
        main(["owner/name", "--image", str(tmp_path / "gone.png"), "--question", "What?"])


def test_a_real_pipe(talker: Path, images: list[Path], tmp_path: Path) -> None:
    """`echo question | clips-mllm chat M --image x.png > file`: the file holds the answer, and nothing else."""
    words = [sys.executable, "-m", "clips_mllm.cli", "chat", *arguments(talker, "--image", str(images[0]))]
    with (tmp_path / "answer.txt").open("w") as out:
        subprocess.run(words, input="What is it?\n", stdout=out, text=True, check=True)
    expected = plain_answer(talker, [asked("What is it?", 1)], images[:1])
    assert (tmp_path / "answer.txt").read_text() == expected + "\n"


def test_a_saved_chat_is_training_data(engine: Engine, images: list[Path], tmp_path: Path) -> None:
    """What training asks the doctor about it: each row and image is there, and something is learnt."""
    from clips_mllm.doctor import main as doctor

    terminal = Terminal(engine, GREEDY, system="Be brief.")
    for line in (f"/image '{images[0]}'", "What?", f"/image '{images[1]}'", "And this?"):
        terminal.obey(line)
    terminal.obey(f"/save {tmp_path / 'kept.json'}")
    doctor([str(tmp_path / "kept.json"), "--output", str(tmp_path / "doctor.json")])
    found = json.loads((tmp_path / "doctor.json").read_text())
    assert (found["rows"], found["usable"]) == (1, 1), found


def test_saving_writes_over_nothing_else(engine: Engine, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    terminal = Terminal(engine, GREEDY)
    terminal.obey("What?")
    kept, photo, many = tmp_path / "kept.json", tmp_path / "photo.png", tmp_path / "many.json"
    for _ in range(2):
        terminal.obey(f"/save {kept}")
    photo.write_bytes(b"\x89PNG")
    many.write_text(json.dumps(json.loads(kept.read_text()) * 2))
    for file in (photo, many):
        before = file.read_bytes()
        with pytest.raises(UserError, match="not one saved conversation; take another name"):
            terminal.obey(f"/save {file}")
        assert file.read_bytes() == before
    terminal.obey(f"/load {many}")
    assert "the first of 2 conversations" in capsys.readouterr().err


def test_sampling(talker: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A temperature samples: on this model two draws of ten tokens are never alike."""
    torch.manual_seed(0)
    for _ in range(2):
        main(arguments(talker, "--question", "Why?", "--temperature", "2.0"))
    first, second = capsys.readouterr().out.splitlines()[:2]
    assert first != second


def test_what_the_generating_thread_raises_reaches_the_caller(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    conversation = Conversation(engine)

    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(engine, "read", fail)
        with pytest.raises(RuntimeError, match="out of memory"):
            list(conversation.ask("Why?", GREEDY))
    assert conversation.messages == [], "a turn without an answer is not remembered"
    assert list(conversation.ask("Why?", GREEDY)), "the engine goes on"


def test_a_stage_1_checkpoint_needs_a_image(talker: Path, images: list[Path], tmp_path: Path) -> None:
    """The plain template has no words for a question."""
    from clips_mllm.prompts.render import load_template

    folder = tmp_path / "align"
    shutil.copytree(talker, folder)
    (folder / "chat_template.jinja").write_text(load_template("plain"))
    with pytest.raises(UserError, match="room for images only"):
        main(arguments(folder, "--question", "Why?"))
    main(arguments(folder, "--image", str(images[0]), "--question", "Why?"))


def test_every_command(
    talker: Path,
    images: list[Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Several images with quotes and escapes, dropped files, undo, retry, system, params, save and load."""
    one, two = images
    escaped = str(two).replace(" ", "\\ ")
    lines = [f"/image '{one}' {escaped}", "Which?", "/retry", "/undo", "Why?", f"/save {tmp_path / 'kept.json'}"]
    lines += ["/reset", f"{escaped} file://{quote(str(one))}", "And these?", "/system Be brief.", "Well?"]
    lines += [
        "/params max_new_tokens=3",
        "More?",
        f"/load {tmp_path / 'kept.json'}",
        "/params max_new_tokens=10",
        "So?",
    ]
    pipe(monkeypatch, *lines)
    main(arguments(talker))
    first = plain_answer(talker, [asked("Which?", 2)], images)
    why = plain_answer(talker, [asked("Why?", 2)], images)
    these = plain_answer(talker, [asked("And these?", 2)], [two, one])
    system = {"role": "system", "content": [{"type": "text", "text": "Be brief."}]}
    well = plain_answer(talker, [system, asked("Well?")], [])
    row = json.loads((tmp_path / "kept.json").read_text())[0]
    assert row["image"] == [str(one), str(two)]
    assert row["conversations"][0] == {"from": "human", "value": "<image>\n<image>\nWhy?"}
    so = plain_answer(talker, [asked("Why?", 2), answered(why.strip()), asked("So?")], images)
    said = capsys.readouterr()
    assert said.out.startswith("".join(f"{text}\n" for text in (first, first, why, these, well)))
    assert said.out.endswith(f"\n{so}\n")
    more = said.out.removeprefix("".join(f"{text}\n" for text in (first, first, why, these, well))).removesuffix(
        f"{so}\n"
    )
    assert 0 < len(more) < len(well)
    assert "error:" not in said.err and "taken back: Which?" in said.err


def test_undo_takes_back_waiting_images_first(
    engine: Engine, images: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    terminal = Terminal(engine, GREEDY)
    for line in (f"'{images[0]}'", "What?", "/undo", "/undo"):
        terminal.obey(line)
    assert terminal.conversation.waiting == terminal.conversation.turns == []
    said = capsys.readouterr().err.splitlines()[-2:]
    assert said == ["taken back: What? (1 make_image(s) wait for the next question)", "taken back: 1 make_image(s)"]
    with pytest.raises(UserError, match="nothing was said"):
        terminal.obey("/undo")


@pytest.mark.parametrize("kind", ["encoder_dir", "sample_world"])
def test_what_cannot_talk_is_seen_before_anything_is_loaded(kind: str, request: pytest.FixtureRequest) -> None:
    with pytest.raises(UserError, match="not a LLaVA model, point model to a `train` run"):
        check_model(str(request.getfixturevalue(kind)), ChatRecipe(model=""))


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("/image", "name a file"),
        ("/image 'open", "quote a path"),
        ("/undo", "nothing was said"),
        ("/save x.json", "nothing to save"),
        ("/load gone.json", "no such file"),
        ("/params colour=red", "no 'colour'"),
        ("/params temperature=hot", "takes a number"),
        ("/params top_p=2", "top_p=2.0"),
        ("/dance", "no such command"),
    ],
)
def test_slips_in_commands(engine: Engine, line: str, words: str) -> None:
    with pytest.raises(UserError, match=words):
        Terminal(engine, GREEDY).obey(line)


@pytest.mark.parametrize(
    ("line", "files"),
    [
        ("photo.png", ["photo.png"]),
        ("'photo.png' my\\ photo.png", ["photo.png", "my photo.png"]),
        ("my photo.png", ["my photo.png"]),
        ("./README", ["./README"]),
        ("README", []),
        ("photo.png?", []),
        ("Is there a photo.png", []),
        ("What's photo.png", []),
        ("word " * 2000, []),
        ("", []),
    ],
)
def test_lines_that_are_paths(line: str, files: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A question may be one word, and there may be a file of that name."""
    monkeypatch.chdir(tmp_path)
    for name in ("photo.png", "my photo.png", "README"):
        (tmp_path / name).touch()
    assert dropped_files(line) == files


SLOW = """
import sys, time
from clips_mllm.talk import batch, engine
from clips_mllm import chat
step, start = batch.Batch.step, engine.Engine.__init__
def slow(self, cursors):
    time.sleep(0.05)
    return step(self, cursors)
def endless(self, *words, **options):
    start(self, *words, **options)
    self.ends = set()
batch.Batch.step, engine.Engine.__init__ = slow, endless
chat.main(sys.argv[1:])
"""


def test_ctrl_c_stops_the_answer_and_not_the_program(talker: Path) -> None:
    """A real terminal: an endless answer is interrupted, the next question is answered, /quit ends with 0."""
    import pty

    mine, its = pty.openpty()
    words = [sys.executable, "-c", SLOW, str(talker), "--device", "cpu", "--max_new_tokens", "600"]
    process = subprocess.Popen(words, stdin=its, stdout=its, stderr=its, preexec_fn=lambda: take_terminal(its))
    os.close(its)
    seen = Screen(mine)
    try:
        seen.wait_for("you> ")
        seen.type("Why?\n")
        seen.wait_for("Why?\r\n")
        seen.more_than(20)
        seen.press_until("\x03", "stopped")
        seen.wait_for("you> ")
        seen.press_until("\x03", "/quit ends the program")
        seen.type("/params max_new_tokens=4\n")
        seen.wait_for("max_new_tokens=4")
        seen.wait_for("you> ")
        seen.type("And now?\n")
        seen.wait_for("And now?\r\n")
        seen.wait_for("you> ")
        seen.type("/quit\n")
        assert process.wait(60) == 0
    finally:
        process.kill()
        process.wait()
        os.close(mine)


def take_terminal(terminal: int) -> None:
    """Make it the controlling terminal, so that Ctrl-C becomes a signal.

    By default the kernel sends the signal first, and then throws away what has been written to the screen and not been
    seen: on a busy machine that may be the very answer to the signal.
    """
    import fcntl
    import termios

    heed_ctrl_c()
    os.setsid()
    fcntl.ioctl(terminal, termios.TIOCSCTTY, 0)
    modes = termios.tcgetattr(terminal)
    modes[3] |= termios.NOFLSH
    termios.tcsetattr(terminal, termios.TCSANOW, modes)


class Screen:
    """What a terminal shows."""

    def __init__(self, terminal: int) -> None:
        self.terminal = terminal
        self.text = ""

    def type(self, keys: str) -> None:
        os.write(self.terminal, keys.encode())

    def wait_for(self, words: str) -> None:
        """Read on until they appear; what stood before is forgotten."""
        assert self._read_until(lambda: words in self.text), f"waited in vain for {words!r}: {self.text!r}"
        self.text = self.text.partition(words)[2]

    def press_until(self, key: str, words: str) -> None:
        """As people do where nothing happens: CPython's input() is deaf to a signal between its prompt and its wait."""
        for _ in range(60):
            self.type(key)
            if self._read_until(lambda: words in self.text, seconds=2):
                break
        self.wait_for(words)

    def more_than(self, characters: int) -> None:
        assert self._read_until(lambda: len(self.text) > characters), f"waited in vain: {self.text!r}"

    def _read_until(self, condition: Callable[[], bool], seconds: float = 300) -> bool:
        """Whether it came true in time."""
        deadline = time.monotonic() + seconds
        while not condition():
            if not select.select([self.terminal], [], [], max(0, deadline - time.monotonic()))[0]:
                return False
            self.text += os.read(self.terminal, 4096).decode(errors="replace")
        return True
