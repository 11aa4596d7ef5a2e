"""The chat command: single questions, conversations through a pipe and a terminal, and its commands."""

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
from clips_mllm.talk.recipe import ChatRecipe
from clips_mllm.talk.sampling import Sampling
from clips_mllm.talk.start import check_model
from clips_mllm.talk.terminal import Terminal, dropped_files
from tests.helpers.errors import raises_user_error
from tests.helpers.train_runs import enable_ctrl_c

TOKENS = 10
GREEDY = Sampling(max_new_tokens=TOKENS)


@pytest.fixture(scope="module")
def engine(chat_mllm: Path) -> Iterator[Engine]:
    with Engine(load_mllm(chat_mllm, device="cpu")) as running:
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
    """Answer with `generate` on a newly loaded model, without streaming."""
    mllm = load_mllm(folder, device="cpu", quantize=quantize)
    text = mllm.processor.apply_chat_template(messages, add_generation_prompt=True)
    opened = [Image.open(file).convert("RGB") for file in files]
    inputs = mllm.processor(text=text, images=opened or None, return_tensors="pt")
    with torch.inference_mode():
        out = mllm.model.generate(**inputs, max_new_tokens=TOKENS, do_sample=False)
    return str(mllm.tokenizer.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))


def user(text: str, images: int = 0) -> dict[str, Any]:
    return {"role": "user", "content": [{"type": "image"}] * images + [{"type": "text", "text": text}]}


def assistant(text: str) -> dict[str, Any]:
    return {"role": "assistant", "content": [{"type": "text", "text": text}]}


def arguments(folder: Path, *words: str) -> list[str]:
    return [str(folder), "--max_new_tokens", str(TOKENS), "--device", "cpu", *words]


def pipe(monkeypatch: pytest.MonkeyPatch, *lines: str) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{line}\n" for line in lines)))


def test_one_question(chat_mllm: Path, images: list[Path], capsys: pytest.CaptureFixture[str]) -> None:
    main(arguments(chat_mllm, "--image", str(images[0]), "--question", "What is it?"))
    with_image = capsys.readouterr().out
    assert with_image == plain_answer(chat_mllm, [user("What is it?", 1)], images[:1]) + "\n"
    main(arguments(chat_mllm, *(word for file in images for word in ("--image", str(file))), "--question", "Which?"))
    assert capsys.readouterr().out == plain_answer(chat_mllm, [user("Which?", 2)], images) + "\n"
    main(arguments(chat_mllm, "--question", "What is it?"))
    without_image = capsys.readouterr().out
    assert without_image == plain_answer(chat_mllm, [user("What is it?")], []) + "\n"
    assert without_image != with_image


def test_4bit_quantization(chat_mllm: Path, images: list[Path], capsys: pytest.CaptureFixture[str]) -> None:
    main(arguments(chat_mllm, "--quantize", "4bit", "--image", str(images[0]), "--question", "What is it?"))
    prompt = ([user("What is it?", 1)], images[:1])
    quantized = plain_answer(chat_mllm, *prompt, quantize="4bit")
    assert capsys.readouterr().out == quantized + "\n"
    assert quantized != plain_answer(chat_mllm, *prompt), "the fixture's large weights make the difference visible"


def test_streamed_text_equals_plain_generate(engine: Engine, chat_mllm: Path, images: list[Path]) -> None:
    conversation = Conversation(engine)
    conversation.pending_images.append(read_image(images[1]))
    pieces = list(conversation.ask("Tell me all.", GREEDY))
    assert len(pieces) > 1
    assert "".join(pieces) == plain_answer(chat_mllm, [user("Tell me all.", 1)], images[1:])
    assert conversation.messages == [user("Tell me all.", 1), assistant("".join(pieces))]


def test_conversation_through_a_pipe(
    chat_mllm: Path, images: list[Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Earlier turns are part of each later prompt, until /reset."""
    pipe(monkeypatch, f"/image {images[0]}", "What?", "", f"/image '{images[1]}'", "And this?", "/reset", "Why?")
    main(arguments(chat_mllm))
    first = plain_answer(chat_mllm, [user("What?", 1)], images[:1])
    turns = [user("What?", 1), assistant(first), user("And this?", 1)]
    second = plain_answer(chat_mllm, turns, images)
    third = plain_answer(chat_mllm, [user("Why?")], [])
    assert capsys.readouterr().out == f"{first}\n{second}\n{third}\n"


def test_typos_keep_session_alive(
    chat_mllm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "bad.png").write_bytes(b"no image")
    missing = tmp_path / "missing.png"
    pipe(monkeypatch, f"/image {missing}", f"/image {tmp_path / 'bad.png'}", "What is <image>?", "Why?", "/quit", "No.")
    with raises_user_error() as rejected:
        main(arguments(chat_mllm))
    assert "3 input lines" in rejected.value.problem
    output = capsys.readouterr()
    assert output.out == plain_answer(chat_mllm, [user("Why?")], []) + "\n"
    errors = [line for line in output.err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 3
    for name, line in zip((str(missing), "bad.png", "<image>"), errors, strict=True):
        assert name in line


def test_unreadable_image_fails_before_the_model_is_loaded(tmp_path: Path) -> None:
    with raises_user_error(file=tmp_path / "gone.png"):
        main(["owner/name", "--image", str(tmp_path / "gone.png"), "--question", "What?"])


def test_redirected_output_contains_only_the_answer(chat_mllm: Path, images: list[Path], tmp_path: Path) -> None:
    """`echo question | clips-mllm chat MODEL --image x.png > file` in real processes."""
    command = [sys.executable, "-m", "clips_mllm.cli", "chat", *arguments(chat_mllm, "--image", str(images[0]))]
    with (tmp_path / "answer.txt").open("w") as out:
        subprocess.run(command, input="What is it?\n", stdout=out, text=True, check=True)
    expected = plain_answer(chat_mllm, [user("What is it?", 1)], images[:1])
    assert (tmp_path / "answer.txt").read_text() == expected + "\n"


def test_saved_conversation_passes_the_data_doctor(engine: Engine, images: list[Path], tmp_path: Path) -> None:
    from clips_mllm.doctor import main as doctor

    terminal = Terminal(engine, GREEDY, system="Be brief.")
    for line in (f"/image '{images[0]}'", "What?", f"/image '{images[1]}'", "And this?"):
        terminal.handle(line)
    terminal.handle(f"/save {tmp_path / 'kept.json'}")
    doctor([str(tmp_path / "kept.json"), "--output", str(tmp_path / "doctor.json")])
    report = json.loads((tmp_path / "doctor.json").read_text())
    assert (report["rows"], report["usable"]) == (1, 1), report


def test_save_overwrites_only_saved_conversations(
    engine: Engine, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    terminal = Terminal(engine, GREEDY)
    terminal.handle("What?")
    kept, photo, many = tmp_path / "kept.json", tmp_path / "photo.png", tmp_path / "many.json"
    for _ in range(2):
        terminal.handle(f"/save {kept}")
    photo.write_bytes(b"\x89PNG")
    many.write_text(json.dumps(json.loads(kept.read_text()) * 2))
    for file in (photo, many):
        before = file.read_bytes()
        with raises_user_error(file=file):
            terminal.handle(f"/save {file}")
        assert file.read_bytes() == before
    terminal.handle(f"/load {many}")
    assert "2 conversations" in capsys.readouterr().err


def test_temperature_samples(chat_mllm: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """On this model two samples of ten tokens practically never agree."""
    torch.manual_seed(0)
    for _ in range(2):
        main(arguments(chat_mllm, "--question", "Why?", "--temperature", "2.0"))
    first, second = capsys.readouterr().out.splitlines()[:2]
    assert first != second


def test_worker_errors_reach_the_caller(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    conversation = Conversation(engine)

    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(engine, "read", fail)
        with pytest.raises(RuntimeError, match="out of memory"):
            list(conversation.ask("Why?", GREEDY))
    assert conversation.messages == [], "a turn without an answer is not added"
    assert list(conversation.ask("Why?", GREEDY)), "the engine still answers"


def test_stage_1_checkpoint_needs_an_image(chat_mllm: Path, images: list[Path], tmp_path: Path) -> None:
    """The plain template renders images only, so a question without one has an empty prompt."""
    from clips_mllm.prompts.render import load_template

    folder = tmp_path / "align"
    shutil.copytree(chat_mllm, folder)
    (folder / "chat_template.jinja").write_text(load_template("plain"))
    with raises_user_error():
        main(arguments(folder, "--question", "Why?"))
    main(arguments(folder, "--image", str(images[0]), "--question", "Why?"))


def test_all_commands(
    chat_mllm: Path,
    images: list[Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """With quoted and escaped paths, and dropped files."""
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
    main(arguments(chat_mllm))
    first = plain_answer(chat_mllm, [user("Which?", 2)], images)
    why = plain_answer(chat_mllm, [user("Why?", 2)], images)
    these = plain_answer(chat_mllm, [user("And these?", 2)], [two, one])
    system = {"role": "system", "content": [{"type": "text", "text": "Be brief."}]}
    well = plain_answer(chat_mllm, [system, user("Well?")], [])
    row = json.loads((tmp_path / "kept.json").read_text())[0]
    assert row["image"] == [str(one), str(two)]
    assert row["conversations"][0] == {"from": "human", "value": "<image>\n<image>\nWhy?"}
    so = plain_answer(chat_mllm, [user("Why?", 2), assistant(why.strip()), user("So?")], images)
    output = capsys.readouterr()
    assert output.out.startswith("".join(f"{text}\n" for text in (first, first, why, these, well)))
    assert output.out.endswith(f"\n{so}\n")
    more = output.out.removeprefix("".join(f"{text}\n" for text in (first, first, why, these, well))).removesuffix(
        f"{so}\n"
    )
    assert 0 < len(more) < len(well)
    assert "error:" not in output.err and "Which?" in output.err


def test_undo_removes_the_last_turn_then_its_images(
    engine: Engine, images: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    terminal = Terminal(engine, GREEDY)
    for line in (f"'{images[0]}'", "What?", "/undo"):
        terminal.handle(line)
    assert "What?" in capsys.readouterr().err and not terminal.conversation.turns
    assert len(terminal.conversation.pending_images) == 1, "of the removed question"
    terminal.handle("/undo")
    assert not terminal.conversation.pending_images
    with raises_user_error():
        terminal.handle("/undo")


@pytest.mark.parametrize("kind", ["encoder_dir", "sample_world"])
def test_other_kinds_of_folders_fail_before_loading(kind: str, request: pytest.FixtureRequest) -> None:
    folder = str(request.getfixturevalue(kind))
    with raises_user_error(file=folder):
        check_model(folder, ChatRecipe(model=""))


@pytest.mark.parametrize(
    ("line", "fields"),
    [
        ("/image", {"key": "/image"}),
        ("/image 'open", {"key": "/image"}),
        ("/undo", {}),
        ("/save x.json", {}),
        ("/load gone.json", {"file": "gone.json"}),
        ("/load one.json two.json", {"key": "/load"}),
        ("/params color=red", {"key": "color"}),
        ("/params temperature=hot", {"key": "temperature", "value": "hot"}),
        ("/params top_p=2", {"key": "top_p", "value": 2.0}),
        ("/dance", {"key": "/dance"}),
    ],
)
def test_invalid_commands(engine: Engine, line: str, fields: dict[str, Any]) -> None:
    with raises_user_error(**fields):
        Terminal(engine, GREEDY).handle(line)


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
def test_lines_of_paths_attach_files(
    line: str, files: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A one-word question is not mistaken for a file of the same name."""
    monkeypatch.chdir(tmp_path)
    for name in ("photo.png", "my photo.png", "README"):
        (tmp_path / name).touch()
    assert dropped_files(line) == files


SLOW_CHAT = """
import sys, time
from clips_mllm import chat
from clips_mllm.talk.engine import Engine
from clips_mllm.talk.kv_cache import DecodingBatch
step, init = DecodingBatch.step, Engine.__init__
def slow(self, tokens, lengths):
    time.sleep(0.05)
    return step(self, tokens, lengths)
def endless(self, *args, **options):
    init(self, *args, **options)
    self.eos_tokens = set()
DecodingBatch.step, Engine.__init__ = slow, endless
chat.main(sys.argv[1:])
"""


def test_ctrl_c_ends_the_answer_not_the_program(chat_mllm: Path) -> None:
    """In a pseudo-terminal: interrupt an endless answer, ask another question, /quit with exit code 0."""
    import pty

    ours, theirs = pty.openpty()
    command = [sys.executable, "-c", SLOW_CHAT, str(chat_mllm), "--device", "cpu", "--max_new_tokens", "600"]
    process = subprocess.Popen(
        command, stdin=theirs, stdout=theirs, stderr=theirs, preexec_fn=lambda: take_terminal(theirs)
    )
    os.close(theirs)
    screen = Screen(ours)
    try:
        screen.wait_for("you> ")
        screen.type("Why?\n")
        screen.wait_for("Why?\r\n")
        screen.wait_for_output(20)
        screen.press_until("\x03", "stopped")
        screen.wait_for("you> ")
        screen.press_until("\x03", "/quit ends the program")
        screen.type("/params max_new_tokens=4\n")
        screen.wait_for("max_new_tokens=4")
        screen.wait_for("you> ")
        screen.type("And now?\n")
        screen.wait_for("And now?\r\n")
        screen.wait_for("you> ")
        screen.type("/quit\n")
        assert process.wait(60) == 0
    finally:
        process.kill()
        process.wait()
        os.close(ours)


def take_terminal(terminal: int) -> None:
    """Make it the controlling terminal, so that Ctrl-C becomes a signal.

    NOFLSH: by default the kernel discards unread output on Ctrl-C, possibly the reaction to the signal itself.
    """
    import fcntl
    import termios

    enable_ctrl_c()
    os.setsid()
    fcntl.ioctl(terminal, termios.TIOCSCTTY, 0)
    modes = termios.tcgetattr(terminal)
    modes[3] |= termios.NOFLSH
    termios.tcsetattr(terminal, termios.TCSANOW, modes)


class Screen:
    """Output of a terminal, and input to it."""

    def __init__(self, terminal: int) -> None:
        self.terminal = terminal
        self.text = ""

    def type(self, keys: str) -> None:
        os.write(self.terminal, keys.encode())

    def wait_for(self, text: str) -> None:
        """Read until the text appears, and discard everything up to it."""
        assert self._read_until(lambda: text in self.text), f"{text!r} did not appear: {self.text!r}"
        self.text = self.text.partition(text)[2]

    def press_until(self, key: str, text: str) -> None:
        """Repeat the key, because CPython's input() misses signals between printing its prompt and waiting."""
        for _ in range(60):
            self.type(key)
            if self._read_until(lambda: text in self.text, seconds=2):
                break
        self.wait_for(text)

    def wait_for_output(self, characters: int) -> None:
        assert self._read_until(lambda: len(self.text) > characters), f"too little output: {self.text!r}"

    def _read_until(self, condition: Callable[[], bool], seconds: float = 300) -> bool:
        """Return False after the time limit."""
        deadline = time.monotonic() + seconds
        while not condition():
            if not select.select([self.terminal], [], [], max(0, deadline - time.monotonic()))[0]:
                return False
            self.text += os.read(self.terminal, 4096).decode(errors="replace")
        return True
