"""The page, used with mouse and keyboard in a real headless Chromium.

`SCREENSHOTS=docs/images pytest tests/test_web.py` makes the documents' pictures anew; `MODEL=...` with a trained one.
"""

from __future__ import annotations

import base64
import contextlib
import io
import json
import os
import re
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from PIL import Image

from clips_mllm.llava_json import to_example
from clips_mllm.talk.attention import attention_maps, overlay
from clips_mllm.talk.batch import Batch
from clips_mllm.talk.engine import Engine
from clips_mllm.talk.prompt import Picture
from clips_mllm.talk.recipes import WebRecipe
from clips_mllm.talk.web import launch

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
ARGUMENTS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--no-first-run"]
SCREENSHOTS = os.environ.get("SCREENSHOTS")
SECONDS = 60_000  # of patience with a busy machine, in milliseconds

# Notes how long the first answer is whenever the page changes.
WATCH = """() => {
  window.lengths = [];
  new MutationObserver(() => {
    const answer = document.querySelector('#chat0 .bot.message');
    if (answer) window.lengths.push(answer.innerText.length);
  }).observe(document.body, {childList: true, subtree: true, characterData: true});
}"""

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine (apt-get install chromium)")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("uploads")
    for color in ("green", "red", "blue"):
        Image.new("RGB", (64, 48), color).save(folder / f"{color}.png")
    (folder / "corrupt.png").write_bytes(b"\x89PNG\r\n\x1a\n" + b"\0" * 40)
    (folder / "large.png").write_bytes((folder / "red.png").read_bytes() + os.urandom(1_200_000))
    (folder / "captions.txt").write_text("a red square\na green square\n")
    (folder / "examples.json").write_text(json.dumps([{"image": "green.png", "question": "Which colour is it?"}]))
    return folder


@pytest.fixture(scope="module")
def page_server(
    talker: Path, encoder_dir: Path, sample_world: Path, world: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Any]:
    """The page with all its parts, on two models (one twice), with a slow voice so that streaming can be seen."""
    beside = tmp_path_factory.mktemp("two") / "beside"
    beside.symlink_to(talker)
    cache = pytest.MonkeyPatch()
    cache.setenv("GRADIO_TEMP_DIR", str(tmp_path_factory.mktemp("gradio")))
    step = Batch.step

    def slow(self: Batch, cursors: list[Any]) -> torch.Tensor:
        time.sleep(0.03)
        return step(self, cursors)

    cache.setattr(Batch, "step", slow)
    pictures = world / "gallery"
    pictures.mkdir()
    for color in ("green", "red", "blue"):
        shutil.copy(world / f"{color}.png", pictures)
    recipe = WebRecipe(
        model=os.environ.get("MODEL", str(talker)),
        beside=str(beside),
        encoder=str(encoder_dir),
        pictures=str(pictures),
        captions=str(world / "captions.txt"),
        examples=str(world / "examples.json"),
        feedback=str(world / "feedback" / "rated.jsonl"),
        port=0,
        most_megabytes=1,
        device="cpu",
    )
    with contextlib.ExitStack() as stack:
        yield launch(recipe, stack)
    cache.undo()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as play:
        running = play.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        yield running
        running.close()


@pytest.fixture
def page(browser: Any, page_server: Any) -> Iterator[Any]:
    """A fresh session; requests that leave this machine fail the test."""
    context = browser.new_context(viewport={"width": 1200, "height": 900}, reduced_motion="reduce")
    abroad: list[str] = []

    def watch(route: Any) -> None:
        if route.request.url.startswith(page_server.local_url):
            route.continue_()
        else:
            abroad.append(route.request.url)
            route.abort()

    context.route(re.compile("^http"), watch)
    opened = context.new_page()
    opened.set_default_timeout(SECONDS)
    opened.goto(page_server.local_url)
    opened.locator("#box textarea").wait_for()
    yield opened
    context.close()
    assert not abroad, "no fonts, scripts or counts from elsewhere"


def ask(page: Any, text: str, *files: Path) -> None:
    """Upload, type, press Enter."""
    if files:
        page.locator("#box input[type=file]").set_input_files([str(file) for file in files])
        page.locator("#box").get_by_role("button", name=re.compile("remove|clear", re.IGNORECASE)).first.wait_for()
    page.locator("#box textarea").fill(text)
    page.locator("#box textarea").press("Enter")


def answers(page: Any, chat: int = 0) -> list[str]:
    return [text.strip() for text in page.locator(f"#chat{chat} .bot.message").all_inner_texts()]


def wait_until(condition: Any, page: Any) -> None:
    for _ in range(SECONDS // 50):
        if condition():
            return
        page.wait_for_timeout(50)
    pytest.fail("waited in vain")


def settled(page: Any, count: int, chat: int = 0) -> list[str]:
    """The answers, once there are `count` and the last has stopped growing."""
    wait_until(lambda: len(answers(page, chat)) == count and answers(page, chat)[-1], page)
    last = ""
    while last != (last := answers(page, chat)[-1]):
        page.wait_for_timeout(700)
    return answers(page, chat)


def limit_answers(page: Any, tokens: int) -> None:
    page.get_by_role("button", name="Settings").click()
    page.locator("#tokens input[type=number]").fill(str(tokens))
    page.locator("#tokens input[type=number]").press("Tab")


def picture_of(page: Any, name: str) -> None:
    if SCREENSHOTS is not None:
        Path(SCREENSHOTS).mkdir(parents=True, exist_ok=True)
        shot = Image.open(io.BytesIO(page.screenshot())).convert("RGB")
        shot.quantize(64).save(Path(SCREENSHOTS) / f"{name}.png", optimize=True)


def test_upload_ask_stream_second_turn_side_by_side(page: Any, world: Path) -> None:
    limit_answers(page, 40)
    page.evaluate(WATCH)
    ask(page, "What is this?", world / "green.png")
    first = settled(page, 1)
    assert len(set(page.evaluate("window.lengths"))) > 3, "the answer appeared while it was being made"
    assert settled(page, 1, chat=1) == first, "the second model, here the same one, says the same beside it"
    assert page.locator("#chat0 .user img").count() == 1
    ask(page, "And the colour?")
    both = settled(page, 2)
    assert both[0] == first[0]
    page.locator("#look").click()
    page.locator("#maps img").first.wait_for()
    picture_of(page, "web-chat")
    page.locator("#retry").click()
    page.wait_for_timeout(300)
    assert settled(page, 2) == both, "a greedy answer comes again"
    page.locator("#clear").click()
    wait_until(lambda: not answers(page), page)


def test_stop(page: Any) -> None:
    limit_answers(page, 1000)
    ask(page, "Tell me all.")
    wait_until(lambda: answers(page) and answers(page)[0], page)
    page.locator("#stop").click()
    page.wait_for_timeout(1000)
    stopped = settled(page, 1)[0]
    page.wait_for_timeout(1000)
    assert answers(page)[0] == stopped
    limit_answers_again = page.locator("#tokens input[type=number]")
    limit_answers_again.fill("5")
    limit_answers_again.press("Tab")
    ask(page, "Go on.")
    assert len(settled(page, 2)) == 2, "the conversation goes on after a stop"


def test_what_cannot_be_used_is_refused_with_words(page: Any, world: Path) -> None:
    limit_answers(page, 5)
    ask(page, "What is this?", world / "corrupt.png")
    page.get_by_text("Not a readable picture").first.wait_for()
    assert not [answer for answer in answers(page) if answer]
    page.reload()
    page.locator("#box input[type=file]").set_input_files(str(world / "large.png"))
    page.get_by_text(re.compile("exceeds|too large|maximum", re.IGNORECASE)).first.wait_for()
    picture_of(page, "web-refused")


def test_edit_a_question(page: Any) -> None:
    limit_answers(page, 8)
    ask(page, "One?")
    settled(page, 1)
    ask(page, "Two?")
    settled(page, 2)
    page.locator("#chat0 .user").first.hover()
    page.locator("#chat0").get_by_role("button", name=re.compile("edit", re.IGNORECASE)).first.click()
    field = page.locator("#chat0 textarea").first
    field.fill("Three?")
    page.locator("#chat0").get_by_role("button", name=re.compile("submit", re.IGNORECASE)).first.click()
    wait_until(lambda: len(answers(page)) == 1, page)
    assert "Three?" in page.locator("#chat0 .user").first.inner_text()


def test_examples_thumbs_and_the_keyboard_alone(page: Any, world: Path) -> None:
    """An example is taken, asked with Enter alone, and rated; what is kept is a training row."""
    limit_answers(page, 8)
    page.get_by_text("Which colour is it?").first.click()
    wait_until(lambda: page.locator("#box textarea").input_value() == "Which colour is it?", page)
    page.locator("#box textarea").focus()
    page.keyboard.press("Enter")
    settled(page, 1)
    for _ in range(60):  # Tab reaches every button
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.closest('#retry') !== null"):
            break
    else:
        pytest.fail("Tab does not reach Retry")
    page.keyboard.press("Enter")
    page.wait_for_timeout(300)
    said = settled(page, 1)[0]
    page.locator("#chat0").get_by_role(
        "button", name=re.compile("^(like|thumbs? ?up|good)", re.IGNORECASE)
    ).first.click()
    file = world / "feedback" / "rated.jsonl"
    wait_until(file.exists, page)
    (line,) = file.read_text().splitlines()
    row = json.loads(line)
    example = to_example(row)
    assert row["liked"] is True and example.messages[-1]["content"][0]["text"].split() == said.split()
    assert Image.open(file.parent / str(example.images[0])).size == (64, 48)


def test_paste_and_drop(page: Any, world: Path) -> None:
    """Pictures by clipboard and by dragging, as the browser tells a page of them."""
    content = base64.b64encode((world / "blue.png").read_bytes()).decode()
    script = """([content, kind]) => {
      const bytes = Uint8Array.from(atob(content), (c) => c.charCodeAt(0));
      const data = new DataTransfer();
      data.items.add(new File([bytes], 'blue.png', {type: 'image/png'}));
      const target = document.querySelector('#box textarea');
      const event = kind === 'paste'
        ? new ClipboardEvent('paste', {clipboardData: data, bubbles: true, cancelable: true})
        : new DragEvent('drop', {dataTransfer: data, bubbles: true, cancelable: true});
      target.dispatchEvent(event);
    }"""
    limit_answers(page, 5)
    for count, kind in enumerate(("paste", "drop"), start=1):
        page.evaluate(script, [content, kind])
        wait_until(lambda count=count: page.locator("#box img").count() == count, page)
    ask(page, "Two pictures?")
    settled(page, 1)
    assert page.locator("#chat0 .user img").count() == 2


def test_retrieval(page: Any, world: Path) -> None:
    page.get_by_role("tab", name="Retrieval").click()
    page.locator("#caption textarea, #caption input").first.fill("a red square")
    page.keyboard.press("Enter")
    wait_until(lambda: page.locator("#found img").count() >= 3, page)
    page.locator("#query input[type=file]").set_input_files(str(world / "red.png"))
    # Of the table's cells some are hidden: it measures with them.
    page.get_by_text("a green square").locator("visible=true").first.wait_for()
    picture_of(page, "web-retrieval")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_phone(browser: Any, page_server: Any, scheme: str) -> None:
    """Nothing is wider than the screen, and the colours follow the reader's system."""
    context = browser.new_context(viewport={"width": 375, "height": 700}, color_scheme=scheme, has_touch=True)
    page = context.new_page()
    page.set_default_timeout(SECONDS)
    page.goto(page_server.local_url)
    page.locator("#box textarea").wait_for()
    assert page.evaluate("document.documentElement.scrollWidth") <= 375
    red, green, blue = map(
        int, re.findall(r"\d+", page.evaluate("getComputedStyle(document.body).backgroundColor"))[:3]
    )
    assert (red + green + blue < 200) == (scheme == "dark")
    picture_of(page, f"web-phone-{scheme}")
    context.close()


def test_no_files_of_the_machine(page_server: Any, world: Path) -> None:
    """Neither by address nor as an upload that was none."""
    for path in (__file__, str(world / "captions.txt"), "/etc/passwd"):
        assert httpx.get(f"{page_server.local_url}gradio_api/file={path}").status_code in (403, 404)
    config = httpx.get(f"{page_server.local_url}config").json()
    place = next(i for i, entry in enumerate(config["dependencies"]) if any(t[1] == "submit" for t in entry["targets"]))
    box = {"text": "What?", "files": [{"path": "/etc/passwd", "meta": {"_type": "gradio.FileData"}}]}
    body = {"data": [box, None, None, "", 5, 0, 1, 1], "fn_index": place, "session_hash": "x"}
    joined = httpx.post(f"{page_server.local_url}gradio_api/queue/join", json=body)
    text = joined.text
    if joined.status_code == 200:
        with httpx.stream("GET", f"{page_server.local_url}gradio_api/queue/data?session_hash=x", timeout=60) as events:
            for line in events.iter_lines():
                text += line
                if "process_completed" in line or "close_stream" in line:
                    break
    assert "root:" not in text and '"success":true' not in text.replace(" ", "")


def test_binds_to_this_machine_and_deletes_uploads(page_server: Any) -> None:
    assert WebRecipe(model="m").host == "127.0.0.1"
    assert page_server.delete_cache == (300, 3600)
    assert page_server.analytics_enabled is False


def test_attention_falls_on_patches(talker: Path, world: Path) -> None:
    """A map for each picture, of its patches, that sums to 1; the same as in one pass over prompt and answer."""
    from clips_mllm.checkpoint import load_mllm
    from clips_mllm.talk.conversation import question

    pictures = [Picture(Image.open(world / f"{color}.png").convert("RGB")) for color in ("green", "red")]
    with Engine(load_mllm(talker, device="cpu")) as engine:
        prompt = engine.prompt([question("Which?", 2)], pictures)
        maps = attention_maps(engine, prompt, "the second")
        assert [tuple(weights.shape) for weights in maps] == [(3, 3), (3, 3)]
        assert all(abs(float(weights.sum()) - 1) < 1e-5 for weights in maps)
        answer = engine.mllm.tokenizer("the second", add_special_tokens=False)["input_ids"]
        model: Any = engine.mllm.model
        model.set_attn_implementation("eager")
        with torch.inference_mode():
            pixels = torch.stack([picture.pixels for picture in prompt.pictures])
            ids = torch.tensor([prompt.ids + answer])
            out = model(input_ids=ids, pixel_values=pixels, output_attentions=True)
        rows = torch.stack([layer[0, :, len(prompt.ids) :] for layer in out.attentions]).mean(dim=(0, 1, 2))
        expected = rows[prompt.starts[1] : prompt.starts[1] + 9]
        assert torch.allclose(maps[1].flatten(), expected / expected.sum(), atol=1e-5)
        assert overlay(pictures[0], maps[0]).size == (384, 384)
