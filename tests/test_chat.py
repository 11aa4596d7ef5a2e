"""Chat: one question, several turns through a pipe, pictures, and streaming that equals plain generation."""

from __future__ import annotations

import io
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from clips_mllm.chat import ChatRecipe, Conversation, main
from clips_mllm.checkpoint import load_mllm, save_mllm
from vision_tower.errors import UserError

TOKENS = 10


@pytest.fixture(scope="module")
def talker(mllm_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny MLLM with weights so large that every prompt and picture has another answer."""
    mllm = load_mllm(mllm_dir, device="cpu", dtype="float32")
    torch.manual_seed(7)
    with torch.no_grad():
        for parameter in mllm.model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.25)
    folder = tmp_path_factory.mktemp("talker")
    save_mllm(mllm.model, mllm.processor, folder)
    return folder


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("pictures with blanks")
    files = []
    for color in ("green", "red"):
        files.append(folder / f"{color} one.png")
        Image.new("RGB", (50, 40), color).save(files[-1])
    return files


def plain_answer(folder: Path, messages: list[dict[str, Any]], files: list[Path]) -> str:
    """`generate` at once, without streaming, on a fresh model."""
    mllm = load_mllm(folder, device="cpu")
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


def test_one_question(talker: Path, pictures: list[Path], capsys: pytest.CaptureFixture[str]) -> None:
    main(arguments(talker, "--image", str(pictures[0]), "--question", "What is it?"))
    seen = capsys.readouterr().out
    assert seen == plain_answer(talker, [asked("What is it?", 1)], pictures[:1]) + "\n"
    main(arguments(talker, "--question", "What is it?"))
    blind = capsys.readouterr().out
    assert blind == plain_answer(talker, [asked("What is it?")], []) + "\n"
    assert blind != seen


def test_pieces_join_to_the_whole_answer(talker: Path, pictures: list[Path]) -> None:
    conversation = Conversation(ChatRecipe(model=str(talker), max_new_tokens=TOKENS, device="cpu"))
    conversation.add_image(str(pictures[1]))
    pieces = list(conversation.ask("Tell me all."))
    assert len(pieces) > 1
    assert "".join(pieces) == plain_answer(talker, [asked("Tell me all.", 1)], pictures[1:])
    assert conversation.messages == [asked("Tell me all.", 1), answered("".join(pieces))]


def test_a_talk_through_a_pipe(
    talker: Path, pictures: list[Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What was said and shown before is part of every later prompt, until /reset."""
    pipe(monkeypatch, f"/image {pictures[0]}", "What?", "", f"/image '{pictures[1]}'", "And this?", "/reset", "Why?")
    main(arguments(talker))
    first = plain_answer(talker, [asked("What?", 1)], pictures[:1])
    talk = [asked("What?", 1), answered(first), asked("And this?", 1)]
    second = plain_answer(talker, talk, pictures)
    third = plain_answer(talker, [asked("Why?")], [])
    assert capsys.readouterr().out == f"{first}\n{second}\n{third}\n"


def test_slips_of_the_finger_do_not_end_the_talk(
    talker: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "bad.png").write_bytes(b"no picture")
    gone = tmp_path / "gone.png"
    pipe(monkeypatch, f"/image {gone}", f"/image {tmp_path / 'bad.png'}", "What is <image>?", "Why?", "/quit", "No.")
    main(arguments(talker))
    said = capsys.readouterr()
    assert said.out == plain_answer(talker, [asked("Why?")], []) + "\n"
    errors = [line for line in said.err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 3
    assert str(gone) in errors[0]
    assert "bad.png: not a readable picture" in errors[1]
    assert "<image> in a question" in errors[2]


def test_a_bad_picture_is_told_before_the_model_loads(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"gone\.png: no such picture"):
        main(["no-model-here", "--image", str(tmp_path / "gone.png"), "--question", "What?"])


def test_sampling(talker: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A temperature samples: on this model two draws of ten tokens are never alike."""
    torch.manual_seed(0)
    for _ in range(2):
        main(arguments(talker, "--question", "Why?", "--temperature", "2.0"))
    first, second = capsys.readouterr().out.splitlines()[:2]
    assert first != second


def test_what_the_generating_thread_raises_reaches_the_caller(talker: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    conversation = Conversation(ChatRecipe(model=str(talker), max_new_tokens=TOKENS, device="cpu"))

    def fail(**_: Any) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(conversation.mllm.model, "generate", fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        list(conversation.ask("Why?"))
    assert conversation.messages == [], "a turn without an answer is not remembered"


def test_a_stage_1_checkpoint_needs_a_picture(talker: Path, pictures: list[Path], tmp_path: Path) -> None:
    """The plain template has no words for a question."""
    from clips_mllm.prompts import load_template

    folder = tmp_path / "align"
    shutil.copytree(talker, folder)
    (folder / "chat_template.jinja").write_text(load_template("plain"))
    with pytest.raises(UserError, match="room for pictures only"):
        main(arguments(folder, "--question", "Why?"))
    main(arguments(folder, "--image", str(pictures[0]), "--question", "Why?"))
