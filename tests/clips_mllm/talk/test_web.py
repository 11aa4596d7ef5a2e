"""The page in headless Chromium, with mouse and keyboard.

SCREENSHOTS=docs/images writes the images of docs/chat.md: of the tests' random models, or of trained ones with
MODEL=runs/quickstart/finetune COMPARE_WITH=runs/quickstart/align ENCODER=runs/quickstart/encoder
DATA=runs/quickstart/data.
"""

from __future__ import annotations

import base64
import contextlib
import dataclasses
import io
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gradio
import httpx
import pytest
import torch
from PIL import Image

from clips_mllm import web
from clips_mllm.data.llava_json import to_example
from clips_mllm.talk.conversation import truncation_notice, user_message
from clips_mllm.talk.engine import Engine
from clips_mllm.talk.images import InputImage
from clips_mllm.talk.kv_cache import DecodingBatch
from clips_mllm.talk.recipe import WebRecipe
from clips_mllm.talk.requests import QueueFull
from clips_mllm.talk.web import page as web_page
from clips_mllm.talk.web import toasts
from clips_mllm.talk.web.attention import attention_maps, overlay
from clips_mllm.web import launch, short_names
from tests.helpers.server import assert_no_paths, bomb
from vision_tower.common.errors import UserError

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
ARGUMENTS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--no-first-run"]
ARGUMENTS += ["--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream"]  # a fake camera with permission
SCREENSHOTS = os.environ.get("SCREENSHOTS")
IMAGES = {"web-chat", "web-attention", "web-retrieval", "web-phone"}  # of docs/chat.md
TIMEOUT = 60_000  # milliseconds

# Records the length of the first answer whenever the page changes.
WATCH = """() => {
  window.lengths = [];
  new MutationObserver(() => {
    const answer = document.querySelector('#chat0 .bot.message');
    if (answer) window.lengths.push(answer.innerText.length);
  }).observe(document.body, {childList: true, subtree: true, characterData: true});
}"""

# Dispatches the browser's events for pasting or dropping a file.
PASTE_OR_DROP = """([content, name, way]) => {
  const bytes = Uint8Array.from(atob(content), (c) => c.charCodeAt(0));
  const data = new DataTransfer();
  data.items.add(new File([bytes], name, {type: 'image/png'}));
  const target = document.querySelector('#box textarea');
  const options = {bubbles: true, cancelable: true};
  if (way === 'drop') target.dispatchEvent(new DragEvent('dragenter', {dataTransfer: data, ...options}));
  target.dispatchEvent(way === 'paste'
    ? new ClipboardEvent('paste', {clipboardData: data, ...options})
    : new DragEvent('drop', {dataTransfer: data, ...options}));
}"""


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("uploads")
    for color in ("green", "red", "blue"):
        Image.new("RGB", (64, 48), color).save(folder / f"{color}.png")
    (folder / "corrupt.png").write_bytes(b"\x89PNG\r\n\x1a\n" + b"\0" * 40)
    (folder / "large.png").write_bytes((folder / "red.png").read_bytes() + os.urandom(1_150_000))
    (folder / "bomb.png").write_bytes(bomb(60_000))
    (folder / "captions.txt").write_text("a red square\na green square\n")
    (folder / "examples.json").write_text(json.dumps([{"image": "green.png", "question": "Which color is it?"}]))
    return folder


@pytest.fixture(scope="module")
def engines() -> list[Engine]:
    """Engines of `page_server`."""
    return []


@pytest.fixture(scope="module")
def page_server(
    chat_mllm: Path,
    encoder_dir: Path,
    sample_world: Path,
    world: Path,
    engines: list[Engine],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Any]:
    """The page with all features and the same model twice; decoding is slow, so that streaming is visible."""
    second = tmp_path_factory.mktemp("two") / "second"
    second.symlink_to(chat_mllm)
    patch = pytest.MonkeyPatch()
    step, start = DecodingBatch.step, web.start_engine

    def slow(self: DecodingBatch, tokens: list[int], lengths: list[int]) -> torch.Tensor:
        time.sleep(0.03)
        return step(self, tokens, lengths)

    def recorded(*args: Any, **options: Any) -> Engine:
        engines.append(start(*args, **options))
        return engines[-1]

    patch.setattr(DecodingBatch, "step", slow)
    patch.setattr(web, "start_engine", recorded)
    images = world / "gallery"
    images.mkdir()
    for color in ("green", "red", "blue"):
        shutil.copy(world / f"{color}.png", images)
    recipe = WebRecipe(
        model=str(chat_mllm),
        compare_with=str(second),
        encoder=str(encoder_dir),
        images=str(images),
        captions=str(world / "captions.txt"),
        examples=str(world / "examples.json"),
        feedback=str(world / "feedback" / "rated.jsonl"),
        port=0,
        max_upload_mb=1,
        device="cpu",
    )
    with contextlib.ExitStack() as stack:
        yield launch(recipe, stack)
    patch.undo()


@dataclasses.dataclass(frozen=True)
class DocsPage:
    """A page for screenshots, with a query for its retrieval tab."""

    server: Any
    caption: str
    image: Path


@pytest.fixture(scope="module")
def docs_page(
    request: pytest.FixtureRequest, world: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[DocsPage]:
    """The page of the trained model MODEL if it is set, else of the tests' model."""
    if "MODEL" not in os.environ:
        yield DocsPage(request.getfixturevalue("page_server"), "a red square", world / "red.png")
        return
    data = Path(os.environ["DATA"])
    rows = json.loads((data / "retrieval" / "test.json").read_text())["images"]
    captions = tmp_path_factory.mktemp("captions") / "captions.txt"
    captions.write_text("\n".join(row["sentences"][0]["raw"] for row in rows))
    recipe = WebRecipe(
        model=os.environ["MODEL"],
        compare_with=os.environ["COMPARE_WITH"],
        encoder=os.environ["ENCODER"],
        images=str(data / "retrieval" / "images"),
        captions=str(captions),
        examples=str(data / "examples.json"),
        feedback=str(captions.with_name("rated.jsonl")),
        port=0,
    )
    with contextlib.ExitStack() as stack:
        server = launch(recipe, stack)
        yield DocsPage(server, rows[0]["sentences"][0]["raw"], data / "retrieval" / "images" / rows[0]["filename"])


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    if CHROMIUM is None:
        pytest.skip("no Chromium on this machine (apt-get install chromium)")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as play:
        running = play.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        yield running
        running.close()


@contextlib.contextmanager
def visit(browser: Any, server: Any, **options: Any) -> Iterator[Any]:
    """A new session; a request to another server fails the test."""
    context = browser.new_context(reduced_motion="reduce", **options)
    external: list[str] = []

    def watch(route: Any) -> None:
        if route.request.url.startswith(server.local_url):
            route.continue_()
        else:
            external.append(route.request.url)
            route.abort()

    context.route(re.compile("^http"), watch)
    opened = context.new_page()
    opened.set_default_timeout(TIMEOUT)
    opened.goto(server.local_url)
    opened.locator("#box textarea").wait_for()
    yield opened
    context.close()
    assert not external, "no fonts, scripts or analytics of other servers"


@pytest.fixture
def page(browser: Any, page_server: Any) -> Iterator[Any]:
    with visit(browser, page_server, viewport={"width": 1200, "height": 900}) as opened:
        yield opened


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
    for _ in range(TIMEOUT // 50):
        if condition():
            return
        page.wait_for_timeout(50)
    pytest.fail("the condition did not become true")


def wait_for_answers(page: Any, count: int, chat: int = 0) -> list[str]:
    """Wait until there are `count` answers and the last stops growing; return them."""
    wait_until(lambda: len(answers(page, chat)) == count and answers(page, chat)[-1], page)
    last = ""
    while last != (last := answers(page, chat)[-1]):
        page.wait_for_timeout(700)
    return answers(page, chat)


def limit_answers(page: Any, tokens: int) -> None:
    set_number(page, "#tokens", tokens)


def set_number(page: Any, slider: str, value: int) -> None:
    settings = page.get_by_role("button", name="Settings")
    settings.click()
    page.locator(f"{slider} input[type=number]").fill(str(value))
    page.locator(f"{slider} input[type=number]").press("Tab")
    page.wait_for_timeout(300)  # until the page has the value; a question asked at once would use the old one
    settings.click()


def screenshot(element: Any, name: str) -> None:
    """Save an image of the page or of a part of it, if SCREENSHOTS is set."""
    assert name in IMAGES
    if SCREENSHOTS is not None:
        Path(SCREENSHOTS).mkdir(parents=True, exist_ok=True)
        shot = Image.open(io.BytesIO(element.screenshot())).convert("RGB")
        shot.quantize(128).save(Path(SCREENSHOTS) / f"{name}.png", optimize=True)


def take_example(page: Any) -> None:
    """Click an example, and wait for its question and image in the box."""
    page.locator("#examples tbody tr, #examples button.gallery-item").first.click()
    wait_until(lambda: page.locator("#box textarea").input_value() and page.locator("#box img").count(), page)


def tab_to(page: Any, selector: str) -> None:
    """Press Tab until something in `selector` has the focus."""
    for _ in range(100):
        page.keyboard.press("Tab")
        if page.locator(selector).evaluate_all("(found) => found.some((e) => e.contains(document.activeElement))"):
            return
    pytest.fail(f"Tab does not reach {selector}")


def test_upload_streaming_second_turn_and_comparison(page: Any, world: Path) -> None:
    limit_answers(page, 40)
    page.evaluate(WATCH)
    ask(page, "What is this?", world / "green.png")
    first = wait_for_answers(page, 1)
    assert len(set(page.evaluate("window.lengths"))) > 3, "the answer is streamed"
    assert wait_for_answers(page, 1, chat=1) == first, "both engines have the same model"
    assert page.locator("#chat0 .user img").count() == 1
    ask(page, "And the color?")
    both = wait_for_answers(page, 2)
    assert both[0] == first[0]
    page.locator("#look").click()
    page.locator("#maps img").first.wait_for()
    page.locator("#retry").click()
    maps = page.locator("#maps img").locator("visible=true")
    wait_until(lambda: maps.count() == 0, page)  # of an answer that was replaced
    wait_until(lambda: answers(page) == both, page)  # greedy decoding
    page.locator("#chat0 .user").first.hover()
    assert page.get_by_role("button", name=re.compile("share", re.IGNORECASE)).locator("visible=true").count() == 0
    page.locator("#clear").click()
    wait_until(lambda: not answers(page), page)


def test_stop(page: Any) -> None:
    limit_answers(page, 1000)
    ask(page, "Tell me all.")
    wait_until(lambda: answers(page) and answers(page)[0], page)
    page.locator("#stop").click()
    page.wait_for_timeout(1000)
    stopped = wait_for_answers(page, 1)[0]
    page.wait_for_timeout(1000)
    assert answers(page)[0] == stopped
    limit_answers(page, 5)
    ask(page, "Continue.")
    assert len(wait_for_answers(page, 2)) == 2


def test_unusable_uploads_are_rejected_and_others_kept(page: Any, world: Path) -> None:
    limit_answers(page, 5)
    ask(page, "What is this?", world / "corrupt.png", world / "red.png")
    page.get_by_text("corrupt.png").first.wait_for()
    assert not [answer for answer in answers(page) if answer]
    assert page.get_by_text("Error", exact=True).locator("visible=true").count() == 0, "Gradio does not cover the chat"
    wait_until(lambda: page.locator("#box img").count() == 1, page)
    assert page.locator("#box textarea").input_value() == "What is this?", "the question and valid images stay"
    page.locator("#box textarea").press("Enter")
    wait_for_answers(page, 1)
    page.reload()
    ask(page, "What is this?", world / "bomb.png")
    page.get_by_text("bomb.png").first.wait_for()
    assert not [answer for answer in answers(page) if answer]


def test_tags_are_displayed_as_text_and_errors_keep_the_chat(page: Any) -> None:
    limit_answers(page, 5)
    text = 'Is 1<2, <b>bold</b> & "x" &amp; fine?'
    ask(page, text)
    wait_for_answers(page, 1)
    question = page.locator("#chat0 .user").first.inner_text()
    assert question.replace("\u2060", "").strip() == text
    ask(page, "What is <image>?")
    page.get_by_text("<image> in a question").first.wait_for()
    assert page.get_by_text("Error", exact=True).locator("visible=true").count() == 0
    assert page.locator("#chat0 .user").first.inner_text() == question
    assert page.locator("#box textarea").input_value() == "What is <image>?", "it stays, to be corrected"


@pytest.mark.parametrize("way", ["upload", "paste", "drop", "search"])
def test_oversized_files_are_rejected_before_upload(page: Any, world: Path, way: str) -> None:
    """One toast with size and limit; smaller files are accepted afterwards."""
    sent: list[str] = []
    page.on("request", lambda request: sent.append(request.url) if "/upload" in request.url else None)
    if way in ("upload", "search"):
        if way == "search":
            page.get_by_role("tab", name="Retrieval").click()
        page.locator(f"{'#query' if way == 'search' else '#box'} input[type=file]").set_input_files(
            [str(world / "large.png")]
        )
    else:
        page.evaluate(PASTE_OR_DROP, [base64.b64encode((world / "large.png").read_bytes()).decode(), "large.png", way])
    toast = page.get_by_text("large.png has 1.2 MB").first
    toast.wait_for()
    assert "1 MB" in toast.inner_text()
    assert page.get_by_text(re.compile("exceed", re.IGNORECASE)).count() == 0, "no second message by Gradio"
    assert sent == [] and page.locator(".dragging").count() == 0
    if way == "search":
        page.locator("#query input[type=file]").set_input_files(str(world / "red.png"))
        page.get_by_text("a green square").locator("visible=true").first.wait_for()
    else:
        page.locator("#box input[type=file]").set_input_files(str(world / "red.png"))
        wait_until(lambda: page.locator("#box img").count() == 1, page)


def test_truncated_conversation_is_reported(page: Any, engines: list[Engine], monkeypatch: pytest.MonkeyPatch) -> None:
    """One notice for each model whose context is exceeded."""
    room = 2 * len(engines[0].prompt([user_message("Question 0?", 0)], []).ids) + 3 * 8
    for engine in engines:
        monkeypatch.setattr(engine, "context", room)
    limit_answers(page, 8)
    notice = page.get_by_text(truncation_notice(1))
    for number in range(3):
        ask(page, f"Question {number}?")
        wait_for_answers(page, number + 1)
        if notice.count():
            break
    assert number > 0 and notice.count() == len(engines) == 2, "one for each model"
    assert page.get_by_text(f"second: {truncation_notice(1)}").count() == 1
    assert len(answers(page)) == number + 1, "dropped turns are still displayed"


def test_text_typed_during_an_answer_is_kept(page: Any) -> None:
    """The temperature slider returns an int; Markdown in the question is not rendered."""
    limit_answers(page, 60)
    set_number(page, "#temperature", 1)
    ask(page, "What is ![a](http://127.0.0.1:9/a.png)?")
    wait_until(lambda: answers(page) and answers(page)[0], page)
    page.locator("#box textarea").fill("And next?")
    wait_for_answers(page, 1)
    assert page.locator("#box textarea").input_value() == "And next?"
    assert "![a](http://127.0.0.1:9/a.png)" in page.locator("#chat0 .user").first.inner_text()


def test_edit_a_question(page: Any) -> None:
    limit_answers(page, 8)
    ask(page, "One?")
    wait_for_answers(page, 1)
    ask(page, "Two?")
    wait_for_answers(page, 2)
    page.locator("#chat0 .user").first.hover()
    page.locator("#chat0").get_by_role("button", name=re.compile("edit", re.IGNORECASE)).first.click()
    field = page.locator("#chat0 textarea").first
    field.fill("Three?")
    page.locator("#chat0").get_by_role("button", name=re.compile("submit", re.IGNORECASE)).first.click()
    wait_until(lambda: len(answers(page)) == 1, page)
    assert "Three?" in page.locator("#chat0 .user").first.inner_text()


def test_example_retry_and_rating(page: Any, world: Path) -> None:
    """A rated conversation is saved as a training row."""
    limit_answers(page, 8)
    page.get_by_text("Which color is it?").first.click()
    wait_until(lambda: page.locator("#box textarea").input_value() == "Which color is it?", page)
    page.locator("#box textarea").focus()
    page.keyboard.press("Enter")
    wait_for_answers(page, 1)
    for _ in range(60):  # Tab reaches every button
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.closest('#retry') !== null"):
            break
    else:
        pytest.fail("Tab does not reach Retry")
    page.keyboard.press("Enter")
    page.wait_for_timeout(300)
    answer = wait_for_answers(page, 1)[0]
    page.locator("#chat0").get_by_role(
        "button", name=re.compile("^(like|thumbs? ?up|good)", re.IGNORECASE)
    ).first.click()
    file = world / "feedback" / "rated.jsonl"
    wait_until(lambda: file.exists() and file.read_text().endswith("\n"), page)
    (line,) = file.read_text().splitlines()
    row = json.loads(line)
    example = to_example(row)
    assert row["liked"] is True and example.messages[-1]["content"][0]["text"].split() == answer.split()
    assert Image.open(file.parent / str(example.images[0])).size == (64, 48)


def test_paste_and_drop(page: Any, world: Path) -> None:
    """Images from the clipboard and by dragging."""
    content = base64.b64encode((world / "blue.png").read_bytes()).decode()
    limit_answers(page, 5)
    for count, way in enumerate(("paste", "drop"), start=1):
        page.evaluate(PASTE_OR_DROP, [content, "blue.png", way])
        wait_until(lambda count=count: page.locator("#box img").count() == count, page)
    ask(page, "Two images?")
    wait_for_answers(page, 1)
    assert page.locator("#chat0 .user img").count() == 2


def test_camera(page: Any) -> None:
    """Its image belongs to the next question."""
    limit_answers(page, 5)
    page.get_by_role("button", name="Camera").click()
    page.locator("#camera button:visible").first.click()
    page.wait_for_function("document.querySelector('#camera video')?.videoWidth > 0")
    page.locator("#camera button[aria-label='capture photo']").click()
    page.locator("#camera img:visible").first.wait_for()
    ask(page, "What do you see?")
    wait_for_answers(page, 1)
    assert page.locator("#chat0 .user img").count() == 1


def search(page: Any, caption: str, image: Path, expected: str) -> None:
    """Use the retrieval tab both ways."""
    page.get_by_role("tab", name="Retrieval").click()
    page.locator("#caption textarea, #caption input").first.fill(caption)
    page.keyboard.press("Enter")
    wait_until(lambda: page.locator("#found img").count() >= 3, page)
    page.locator("#query input[type=file]").set_input_files(str(image))
    # The table has hidden cells, which it uses to measure widths.
    page.get_by_text(expected).locator("visible=true").first.wait_for()


def test_retrieval(page: Any, world: Path) -> None:
    search(page, "a red square", world / "red.png", "a green square")
    scores = [float(text) for text in page.locator("#captions td:visible").all_inner_texts() if "0." in text]
    assert scores == sorted(scores, reverse=True)


@pytest.mark.parametrize(("name", "reason"), [("bomb", "pixels"), ("corrupt", "not a readable")])
def test_retrieval_rejects_unusable_images(page: Any, world: Path, name: str, reason: str) -> None:
    page.get_by_role("tab", name="Retrieval").click()
    page.locator("#query input[type=file]").set_input_files(str(world / f"{name}.png"))
    page.get_by_text(reason).first.wait_for()


def test_screenshots_of_the_guide(browser: Any, docs_page: DocsPage) -> None:
    """Two checkpoints answer about an example, their attention maps, and retrieval."""
    guide = (Path(__file__).parents[3] / "docs" / "chat.md").read_text()
    assert set(re.findall(r"images/(web-[\w-]+)\.png", guide)) == IMAGES
    with visit(browser, docs_page.server, viewport={"width": 1200, "height": 1100}) as page:
        limit_answers(page, 16)
        take_example(page)
        page.locator("#box textarea").press("Enter")
        wait_for_answers(page, 1)
        wait_for_answers(page, 1, chat=1)
        ask(page, "What is in the image?")
        wait_for_answers(page, 2)
        wait_for_answers(page, 2, chat=1)
        page.evaluate("window.scrollTo(0, 0)")
        screenshot(page, "web-chat")
        page.locator("#look").click()
        page.locator("#maps img").first.wait_for()
        screenshot(page.locator("#maps"), "web-attention")
        search(page, docs_page.caption, docs_page.image, docs_page.caption)
        screenshot(page, "web-retrieval")


# WCAG 2 contrast between an element's text and its background.
CONTRAST = """(selector) => {
  const parse = (text) => text.match(/[\\d.]+/g).map(Number);
  const luminance = ([r, g, b]) => [r, g, b].map((v) => v / 255)
    .map((v) => v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
    .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
  const element = document.querySelector(selector);
  let behind = element;
  while (behind && parse(getComputedStyle(behind).backgroundColor)[3] === 0) behind = behind.parentElement;
  const [light, dark] = [getComputedStyle(element).color, getComputedStyle(behind ?? document.body).backgroundColor]
    .map((text) => luminance(parse(text))).sort((a, b) => b - a);
  return (light + 0.05) / (dark + 0.05);
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_phone(browser: Any, docs_page: DocsPage, scheme: str) -> None:
    """By touch on a small screen: nothing is wider than it, and the contrast is sufficient."""
    screen = {"width": 375, "height": 740}
    with visit(browser, docs_page.server, viewport=screen, color_scheme=scheme, has_touch=True, is_mobile=True) as page:

        def assert_fits() -> None:
            assert page.evaluate("document.documentElement.scrollWidth") <= 375
            for name in ("box", "stop", "retry", "clear", "look"):
                bounds = page.locator(f"#{name}").bounding_box()
                assert bounds["x"] >= 0 and bounds["x"] + bounds["width"] <= 375 and bounds["height"] >= 24, name

        assert_fits()
        limit_answers(page, 12)
        take_example(page)
        page.locator("#box").get_by_role("button", name=re.compile("submit|send", re.IGNORECASE)).tap()
        wait_for_answers(page, 1)
        red, green, blue = map(
            int, re.findall(r"\d+", page.evaluate("getComputedStyle(document.body).backgroundColor"))[:3]
        )
        assert (red + green + blue < 200) == (scheme == "dark")
        for selector in ("#chat0 .bot.message", "#chat0 .user.message", "#box textarea", "#retry"):
            assert page.evaluate(CONTRAST, selector) >= 4.5, selector
        if scheme == "dark":
            page.evaluate("window.scrollTo(0, 0)")
            screenshot(page, "web-phone")
        page.locator("#look").tap()
        page.locator("#maps img").first.wait_for()
        assert_fits()
        page.get_by_role("tab", name="Retrieval").tap()
        page.locator("#caption").wait_for()
        assert page.evaluate("document.documentElement.scrollWidth") <= 375


def test_keyboard_only(page: Any, world: Path) -> None:
    """Choose an image, ask, stop, retry, show attention, change a setting and the question, clear, switch tabs."""
    with page.expect_file_chooser() as chosen:
        tab_to(page, "#box [data-testid=upload-button]")
        page.keyboard.press("Enter")
    chosen.value.set_files(str(world / "green.png"))
    wait_until(lambda: page.locator("#box img").count() == 1, page)
    tab_to(page, "#box textarea")
    page.keyboard.type("What is this?")
    page.keyboard.press("Enter")
    wait_until(lambda: answers(page) and answers(page)[0], page)
    tab_to(page, "#stop")
    page.keyboard.press("Enter")
    page.wait_for_timeout(300)
    stopped = wait_for_answers(page, 1)[0]
    tab_to(page, "button:has-text('Settings')")
    page.keyboard.press("Enter")
    tab_to(page, "#tokens input[type=number]")
    page.keyboard.press("Control+a")
    page.keyboard.type("8")
    tab_to(page, "#retry")
    page.keyboard.press("Enter")
    page.wait_for_timeout(300)
    answer = wait_for_answers(page, 1)[0]
    assert answer.startswith(stopped) or stopped.startswith(answer), "greedy decoding"
    assert page.locator("#tokens input[type=number]").input_value() == "8"
    tab_to(page, "#look")
    page.keyboard.press("Enter")
    page.locator("#maps img").first.wait_for()
    tab_to(page, "#chat0 button[aria-label*=dit]")
    page.keyboard.press("Enter")
    wait_until(lambda: page.evaluate("document.activeElement.closest('#chat0 textarea') !== null"), page)
    page.keyboard.press("Control+a")
    page.keyboard.type("And that?")
    tab_to(page, "#chat0 button[aria-label*=ubmit]")
    page.keyboard.press("Enter")
    wait_until(lambda: "And that?" in page.locator("#chat0").inner_text(), page)
    wait_for_answers(page, 1)
    tab_to(page, "#clear")
    page.keyboard.press("Space")
    wait_until(lambda: not answers(page), page)
    tab_to(page, "#examples button, #examples tr")
    page.keyboard.press("Enter")
    wait_until(lambda: page.locator("#box textarea").input_value() == "Which color is it?", page)
    tab_to(page, "[role=tab]:has-text('Retrieval')")
    page.keyboard.press("Enter")
    page.locator("#caption").wait_for()


# --- security ---------------------------------------------------------------------------------------------------------


def ask_by_http(server: Any, file: str | None = None, tokens: int = 5) -> str:
    """Send a question as a hand-written client could; return the events of the answer."""
    files = [] if file is None else [file_data(file)]
    return call_handler(server, "submit", [{"text": "What?", "files": files}, None, None, "", tokens, 0, 1, 1])


def search_by_http(server: Any, file: str) -> str:
    """Search captions with a file as a hand-written client could; return the events of the answer."""
    return call_handler(server, "change", [file_data(file)])


def file_data(path: str) -> dict[str, Any]:
    return {"path": path, "meta": {"_type": "gradio.FileData"}}


def call_handler(server: Any, event: str, data: list[Any]) -> str:
    """Call the first event handler of this kind without the page."""
    config = httpx.get(f"{server.local_url}config").json()
    index = next(i for i, entry in enumerate(config["dependencies"]) if any(t[1] == event for t in entry["targets"]))
    name = os.urandom(4).hex()
    body = {"data": data, "fn_index": index, "session_hash": name}
    joined = httpx.post(f"{server.local_url}gradio_api/queue/join", json=body)
    text = joined.text
    if joined.status_code == 200:
        address = f"{server.local_url}gradio_api/queue/data?session_hash={name}"
        with httpx.stream("GET", address, timeout=60) as events:
            for line in events.iter_lines():
                text += line
                if "process_completed" in line or "close_stream" in line:
                    break
    return text.replace(" ", "")


def test_local_files_and_urls_are_not_read(page_server: Any, world: Path) -> None:
    """Neither by Gradio's file route nor as a forged upload; the server fetches no URL."""
    for path in (__file__, str(world / "captions.txt"), "/etc/passwd"):
        assert httpx.get(f"{page_server.local_url}gradio_api/file={path}").status_code in (403, 404)
    assert '"success":true' in ask_by_http(page_server), "the request is valid"
    for call in (ask_by_http, search_by_http):
        text = call(page_server, "/etc/passwd")
        assert "root:" not in text and '"success":true' not in text
    assert '"success":true' not in search_by_http(page_server, str(world / "red.png")), "an image, but not an upload"
    uploaded = str(upload(page_server.local_url, (world / "red.png").read_bytes()))
    assert '"success":true' in search_by_http(page_server, uploaded)
    with socket.create_server(("127.0.0.1", 0)) as internal:
        internal.setblocking(False)
        for call in (ask_by_http, search_by_http):
            assert '"success":true' not in call(page_server, f"http://127.0.0.1:{internal.getsockname()[1]}/a.png")
        with pytest.raises(BlockingIOError):
            internal.accept()


def test_limits_hold_without_the_page(page_server: Any, world: Path) -> None:
    """The server checks the limits of the sliders and scripts again."""
    assert '"success":true' not in ask_by_http(page_server, tokens=1025)
    files = {"files": ("large.png", (world / "large.png").read_bytes())}
    assert httpx.post(f"{page_server.local_url}gradio_api/upload", files=files).status_code == 413
    limits = {"max_upload_mb": 1, "max_pixels": 9, "max_images": 2}
    page = web_page.Page(engines=[], names=[], examples=[], gallery=None, feedback=None, **limits)
    with pytest.raises(gradio.Error):
        next(page.ask({"text": "What?", "files": ["a.png"] * 3}, None, []))


def test_error_toasts_reveal_no_paths(
    page: Any, engines: list[Engine], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError(f"cannot open {__file__}")

    with monkeypatch.context() as patch:
        patch.setattr(engines[0], "read", fail)
        ask(page, "Why?")
        page.get_by_text("the server's log").first.wait_for()
    assert_no_paths(page.locator("body").inner_text())
    assert __file__ in caplog.text
    for error in (UserError("too long"), QueueFull("64")):
        with pytest.raises(gradio.Error), toasts.errors_as_toasts():
            raise error


def test_displayed_model_names_are_as_short_as_possible() -> None:
    assert short_names(["/data/me/runs/a/finetune"]) == ["finetune"]
    assert short_names(["/data/me/runs/a/finetune", "/data/me/runs/b/finetune"]) == ["a/finetune", "b/finetune"]
    assert short_names(["/runs/a", "/runs/a"]) == ["a", "a"]


def test_default_address_is_loopback_and_analytics_are_off(page_server: Any) -> None:
    assert WebRecipe(model="m").host == "127.0.0.1" and page_server.local_url.startswith("http://127.0.0.1:")
    assert page_server.analytics_enabled is False


def test_uploads_are_deleted_after_their_lifetime(chat_mllm: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(web_page, "CLEANUP_INTERVAL", 0.1)
    monkeypatch.setattr(web_page, "UPLOAD_LIFETIME", 1.0)
    with contextlib.ExitStack() as stack:
        server = launch(WebRecipe(model=str(chat_mllm), port=0, device="cpu"), stack)
        file = upload(server.local_url)
        assert file.is_file()
        deadline = time.monotonic() + 60
        while file.exists() and time.monotonic() < deadline:
            time.sleep(0.1)
        assert not file.exists()


def upload(address: str, content: bytes = b"image", post: Callable[..., httpx.Response] = httpx.post) -> Path:
    """Upload a file and return its path on the server."""
    response = post(f"{address}gradio_api/upload", files={"files": ("a.png", content)})
    return Path(response.raise_for_status().json()[0])


@pytest.mark.slow
def test_password_and_deleted_uploads_after_sigterm(chat_mllm: Path, tmp_path: Path) -> None:
    """The command with a 4-bit LLM: clients need the password, and other users of the machine cannot read uploads."""
    (tmp_path / "token").write_text("secret\n")
    folder = tmp_path / "temporary"
    folder.mkdir()
    options = ["--port", "0", "--device", "cpu", "--quantize", "4bit", "--token_file", str(tmp_path / "token")]
    process = subprocess.Popen(
        [sys.executable, "-m", "clips_mllm.web", str(chat_mllm), *options],
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"TMPDIR": str(folder)},
    )
    try:
        assert process.stdout is not None
        address = process.stdout.readline().split()[2]
        with httpx.Client(base_url=address) as stranger:
            assert stranger.post("/login", data={"username": "x", "password": "wrong"}).status_code == 400
            assert stranger.get("/config").status_code == 401
            assert stranger.post("/gradio_api/upload", files={"files": ("a.png", b"x")}).status_code == 401
        with httpx.Client(base_url=address) as guest:
            guest.post("/login", data={"username": "x", "password": "secret"}).raise_for_status()
            file = upload("/", post=guest.post)
        (own,) = folder.glob("clips-mllm-web-*")
        assert file.is_file() and file.is_relative_to(own) and own.stat().st_mode & 0o777 == 0o700
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
        assert not own.exists()
    finally:
        process.kill()
        process.communicate()


def test_4bit_quantization(chat_mllm: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both models of the page are loaded with quantized weights, and answer."""
    engines: list[Engine] = []
    start = web.start_engine

    def recorded(*args: Any, **options: Any) -> Engine:
        engines.append(start(*args, **options))
        return engines[-1]

    monkeypatch.setattr(web, "start_engine", recorded)
    recipe = WebRecipe(model=str(chat_mllm), compare_with=str(chat_mllm), port=0, device="cpu", quantize="4bit")
    with contextlib.ExitStack() as stack:
        server = launch(recipe, stack)
        layers: list[Any] = [engine.mllm.model.model.language_model.layers[0] for engine in engines]
        assert [type(layer.mlp.up_proj).__name__ for layer in layers] == ["Linear4bit"] * 2
        assert '"success":true' in ask_by_http(server)


def test_attention_maps_equal_those_of_one_pass(chat_mllm: Path, world: Path) -> None:
    """One map per image that sums to 1, as in a single pass over prompt and answer."""
    from clips_mllm.model.checkpoint import load_mllm

    images = [InputImage(Image.open(world / f"{color}.png").convert("RGB")) for color in ("green", "red")]
    with Engine(load_mllm(chat_mllm, device="cpu")) as engine:
        prompt = engine.prompt([user_message("Which?", 2)], images)
        maps = attention_maps(engine, prompt, "the second")
        assert [tuple(weights.shape) for weights in maps] == [(3, 3), (3, 3)]
        assert all(abs(float(weights.sum()) - 1) < 1e-5 for weights in maps)
        answer = engine.mllm.tokenizer("the second", add_special_tokens=False)["input_ids"]
        model: Any = engine.mllm.model
        model.set_attn_implementation("eager")
        with torch.inference_mode():
            pixels = torch.stack([image.pixels for image in prompt.images])
            ids = torch.tensor([prompt.ids + answer])
            out = model(input_ids=ids, pixel_values=pixels, output_attentions=True)
        rows = torch.stack([layer[0, :, len(prompt.ids) :] for layer in out.attentions]).mean(dim=(0, 1, 2))
        expected = rows[prompt.starts[1] : prompt.starts[1] + 9]
        assert torch.allclose(maps[1].flatten(), expected / expected.sum(), atol=1e-5)
        assert overlay(images[0], maps[0]).size == (384, 384)
