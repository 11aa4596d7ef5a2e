"""The page, used with mouse and keyboard in a real headless Chromium.

With SCREENSHOTS=docs/images the guide's images are made anew, of the tests' random models; of trained ones with
MODEL=runs/quickstart/finetune BESIDE=runs/quickstart/align ENCODER=runs/quickstart/encoder DATA=runs/quickstart/data.
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
from clips_mllm.talk.batch import Batch
from clips_mllm.talk.conversation import question
from clips_mllm.talk.engine import Engine, QueueFull
from clips_mllm.talk.prompt import InputImage
from clips_mllm.talk.recipes import WebRecipe
from clips_mllm.talk.web import page as web_page
from clips_mllm.talk.web.attention import attention_maps, overlay
from clips_mllm.web import launch, short_names
from tests.helpers.server import assert_no_paths, bomb
from vision_tower.common.errors import UserError

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
ARGUMENTS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--no-first-run"]
ARGUMENTS += ["--use-fake-device-for-media-stream", "--use-fake-ui-for-media-stream"]  # a camera, and consent to it
SCREENSHOTS = os.environ.get("SCREENSHOTS")
IMAGES = {"web-chat", "web-attention", "web-retrieval", "web-phone"}  # of docs/chat.md
SECONDS = 60_000  # of patience with a busy machine, in milliseconds

# Notes how long the first answer is whenever the page changes.
WATCH = """() => {
  window.lengths = [];
  new MutationObserver(() => {
    const answer = document.querySelector('#chat0 .bot.message');
    if (answer) window.lengths.push(answer.innerText.length);
  }).observe(document.body, {childList: true, subtree: true, characterData: true});
}"""

# Hands a file over as the browser does on a paste or a drop.
HAND_OVER = """([content, name, way]) => {
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
    (folder / "examples.json").write_text(json.dumps([{"image": "green.png", "question": "Which colour is it?"}]))
    return folder


@pytest.fixture(scope="module")
def engines() -> list[Engine]:
    """Those behind the page, once it is served."""
    return []


@pytest.fixture(scope="module")
def page_server(
    talker: Path,
    encoder_dir: Path,
    sample_world: Path,
    world: Path,
    engines: list[Engine],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Any]:
    """The page with all its parts, on two models (one twice), with a slow voice so that streaming can be seen."""
    beside = tmp_path_factory.mktemp("two") / "beside"
    beside.symlink_to(talker)
    patch = pytest.MonkeyPatch()
    step, start = Batch.step, web.start_engine

    def slow(self: Batch, cursors: list[Any]) -> torch.Tensor:
        time.sleep(0.03)
        return step(self, cursors)

    def noted(*words: Any, **options: Any) -> Engine:
        engines.append(start(*words, **options))
        return engines[-1]

    patch.setattr(Batch, "step", slow)
    patch.setattr(web, "start_engine", noted)
    images = world / "gallery"
    images.mkdir()
    for color in ("green", "red", "blue"):
        shutil.copy(world / f"{color}.png", images)
    recipe = WebRecipe(
        model=str(talker),
        beside=str(beside),
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
class Shown:
    """A page to be looked at, with something to search for in its retrieval tab."""

    server: Any
    caption: str
    image: Path


@pytest.fixture(scope="module")
def shown(request: pytest.FixtureRequest, world: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shown]:
    """The page of a trained model, where MODEL names one, or the tests' own."""
    if "MODEL" not in os.environ:
        yield Shown(request.getfixturevalue("page_server"), "a red square", world / "red.png")
        return
    data = Path(os.environ["DATA"])
    rows = json.loads((data / "retrieval" / "test.json").read_text())["images"]
    captions = tmp_path_factory.mktemp("captions") / "captions.txt"
    captions.write_text("\n".join(row["sentences"][0]["raw"] for row in rows))
    recipe = WebRecipe(
        model=os.environ["MODEL"],
        beside=os.environ["BESIDE"],
        encoder=os.environ["ENCODER"],
        images=str(data / "retrieval" / "images"),
        captions=str(captions),
        examples=str(data / "examples.json"),
        feedback=str(captions.with_name("rated.jsonl")),
        port=0,
    )
    with contextlib.ExitStack() as stack:
        server = launch(recipe, stack)
        yield Shown(server, rows[0]["sentences"][0]["raw"], data / "retrieval" / "images" / rows[0]["filename"])


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
    """A fresh session; requests that leave this machine fail the test."""
    context = browser.new_context(reduced_motion="reduce", **options)
    abroad: list[str] = []

    def watch(route: Any) -> None:
        if route.request.url.startswith(server.local_url):
            route.continue_()
        else:
            abroad.append(route.request.url)
            route.abort()

    context.route(re.compile("^http"), watch)
    opened = context.new_page()
    opened.set_default_timeout(SECONDS)
    opened.goto(server.local_url)
    opened.locator("#box textarea").wait_for()
    yield opened
    context.close()
    assert not abroad, "no fonts, scripts or counts from elsewhere"


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
    set_number(page, "#tokens", tokens)


def set_number(page: Any, slider: str, value: int) -> None:
    settings = page.get_by_role("button", name="Settings")
    settings.click()
    page.locator(f"{slider} input[type=number]").fill(str(value))
    page.locator(f"{slider} input[type=number]").press("Tab")
    page.wait_for_timeout(300)  # until the page knows: a question asked at once would go out with the old value
    settings.click()


def image_of(seen: Any, name: str) -> None:
    """Of the page, or of a part of it."""
    assert name in IMAGES
    if SCREENSHOTS is not None:
        Path(SCREENSHOTS).mkdir(parents=True, exist_ok=True)
        shot = Image.open(io.BytesIO(seen.screenshot())).convert("RGB")
        shot.quantize(128).save(Path(SCREENSHOTS) / f"{name}.png", optimize=True)


def take_example(page: Any, place: int = 0) -> None:
    """Click one, and wait until its question and image are in the box."""
    page.locator("#examples tbody tr, #examples button.gallery-item").nth(place).click()
    wait_until(lambda: page.locator("#box textarea").input_value() and page.locator("#box img").count(), page)


def tab_to(page: Any, selector: str) -> None:
    """Press Tab until something in `selector` has the focus."""
    for _ in range(100):
        page.keyboard.press("Tab")
        if page.locator(selector).evaluate_all("(found) => found.some((e) => e.contains(document.activeElement))"):
            return
    pytest.fail(f"Tab does not reach {selector}")


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
    page.locator("#retry").click()
    maps = page.locator("#maps img").locator("visible=true")
    wait_until(lambda: maps.count() == 0, page)  # they were of an answer that is gone
    wait_until(lambda: answers(page) == both, page)  # a greedy answer comes again
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
    stopped = settled(page, 1)[0]
    page.wait_for_timeout(1000)
    assert answers(page)[0] == stopped
    limit_answers(page, 5)
    ask(page, "Go on.")
    assert len(settled(page, 2)) == 2, "the conversation goes on after a stop"


def test_what_cannot_be_used_is_refused_with_words(page: Any, world: Path) -> None:
    limit_answers(page, 5)
    ask(page, "What is this?", world / "corrupt.png", world / "red.png")
    page.get_by_text("corrupt.png: not a readable image").first.wait_for()
    assert not [answer for answer in answers(page) if answer]
    assert page.get_by_text("Error", exact=True).locator("visible=true").count() == 0, "no blank panel over the chat"
    wait_until(lambda: page.locator("#box img").count() == 1, page)
    assert page.locator("#box textarea").input_value() == "What is this?", "what was good stays, to be asked with"
    page.locator("#box textarea").press("Enter")
    settled(page, 1)
    page.reload()
    ask(page, "What is this?", world / "bomb.png")
    page.get_by_text("more than the 50,000,000 pixels allowed; send a smaller one").first.wait_for()
    assert not [answer for answer in answers(page) if answer]


def test_tags_are_text_and_an_error_leaves_the_chat(page: Any) -> None:
    limit_answers(page, 5)
    text = 'Is 1<2, <b>bold</b> & "x" &amp; fine?'
    ask(page, text)
    settled(page, 1)
    shown = page.locator("#chat0 .user").first.inner_text()
    assert shown.replace("\u2060", "").strip() == text
    ask(page, "What is <image>?")
    page.get_by_text("<image> in a question stands for an image").first.wait_for()
    assert page.get_by_text("Error", exact=True).locator("visible=true").count() == 0
    assert page.locator("#chat0 .user").first.inner_text() == shown
    assert page.locator("#box textarea").input_value() == "What is <image>?", "it stays, to be mended"


@pytest.mark.parametrize("way", ["upload", "paste", "drop", "search"])
def test_an_oversized_file_is_refused_before_it_is_sent(page: Any, world: Path, way: str) -> None:
    """In our words: how large it is, how large it may be, and what to do. What fits is taken afterwards."""
    sent: list[str] = []
    page.on("request", lambda request: sent.append(request.url) if "/upload" in request.url else None)
    if way in ("upload", "search"):
        if way == "search":
            page.get_by_role("tab", name="Retrieval").click()
        page.locator(f"{'#query' if way == 'search' else '#box'} input[type=file]").set_input_files(
            [str(world / "large.png")]
        )
    else:
        page.evaluate(HAND_OVER, [base64.b64encode((world / "large.png").read_bytes()).decode(), "large.png", way])
    page.get_by_text("large.png has 1.2 MB, more than the 1 MB allowed; send a smaller one").first.wait_for()
    assert page.get_by_text(re.compile("exceed", re.IGNORECASE)).count() == 0, "Gradio's own words do not come, too"
    assert sent == [] and page.locator(".dragging").count() == 0
    if way == "search":
        page.locator("#query input[type=file]").set_input_files(str(world / "red.png"))
        page.get_by_text("a green square").locator("visible=true").first.wait_for()
    else:
        page.locator("#box input[type=file]").set_input_files(str(world / "red.png"))
        wait_until(lambda: page.locator("#box img").count() == 1, page)


def test_a_cut_conversation_is_told(page: Any, engines: list[Engine], monkeypatch: pytest.MonkeyPatch) -> None:
    """As in the terminal: which turns the model no longer reads, of each model that has outgrown its context."""
    room = 2 * len(engines[0].prompt([question("Question 0?", 0)], []).ids) + 3 * 8
    for engine in engines:
        monkeypatch.setattr(engine, "context", room)
    limit_answers(page, 8)
    notice = page.get_by_text("its first turn is left out")
    for number in range(3):
        ask(page, f"Question {number}?")
        settled(page, number + 1)
        if notice.count():
            break
    assert number > 0 and notice.count() == len(engines) == 2, "one for each model"
    assert page.get_by_text("beside: the conversation is longer than the model's context").count() == 1
    assert len(answers(page)) == number + 1, "what was left out is still there to be read"


def test_what_is_typed_during_an_answer_is_the_next_question(page: Any) -> None:
    """Sampled at a temperature that the slider gives as a whole number."""
    limit_answers(page, 60)
    set_number(page, "#temperature", 1)
    ask(page, "What is ![a](http://127.0.0.1:9/a.png)?")
    wait_until(lambda: answers(page) and answers(page)[0], page)
    page.locator("#box textarea").fill("And next?")
    settled(page, 1)
    assert page.locator("#box textarea").input_value() == "And next?"
    shown = page.locator("#chat0 .user").first.inner_text()
    assert "![a](http://127.0.0.1:9/a.png)" in shown, "no Markdown: nothing is fetched"


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
    wait_until(lambda: file.exists() and file.read_text().endswith("\n"), page)
    (line,) = file.read_text().splitlines()
    row = json.loads(line)
    example = to_example(row)
    assert row["liked"] is True and example.messages[-1]["content"][0]["text"].split() == said.split()
    assert Image.open(file.parent / str(example.images[0])).size == (64, 48)


def test_paste_and_drop(page: Any, world: Path) -> None:
    """Images by clipboard and by dragging, as the browser tells a page of them."""
    content = base64.b64encode((world / "blue.png").read_bytes()).decode()
    limit_answers(page, 5)
    for count, way in enumerate(("paste", "drop"), start=1):
        page.evaluate(HAND_OVER, [content, "blue.png", way])
        wait_until(lambda count=count: page.locator("#box img").count() == count, page)
    ask(page, "Two images?")
    settled(page, 1)
    assert page.locator("#chat0 .user img").count() == 2


def test_the_camera(page: Any) -> None:
    """What it sees goes with the next question."""
    limit_answers(page, 5)
    page.get_by_role("button", name="Camera").click()
    page.locator("#camera button:visible").first.click()
    page.wait_for_function("document.querySelector('#camera video')?.videoWidth > 0")
    page.locator("#camera button[aria-label='capture photo']").click()
    page.locator("#camera img:visible").first.wait_for()
    ask(page, "What do you see?")
    settled(page, 1)
    assert page.locator("#chat0 .user img").count() == 1


def search(page: Any, caption: str, image: Path, expected: str) -> None:
    """Use the retrieval tab both ways."""
    page.get_by_role("tab", name="Retrieval").click()
    page.locator("#caption textarea, #caption input").first.fill(caption)
    page.keyboard.press("Enter")
    wait_until(lambda: page.locator("#found img").count() >= 3, page)
    page.locator("#query input[type=file]").set_input_files(str(image))
    # Of the table's cells some are hidden: it measures with them.
    page.get_by_text(expected).locator("visible=true").first.wait_for()


def test_retrieval(page: Any, world: Path) -> None:
    search(page, "a red square", world / "red.png", "a green square")
    scores = [float(text) for text in page.locator("#captions td:visible").all_inner_texts() if "0." in text]
    assert scores == sorted(scores, reverse=True)


@pytest.mark.parametrize(("name", "words"), [("bomb", "50,000,000 pixels allowed"), ("corrupt", "not a readable")])
def test_the_search_refuses_with_words(page: Any, world: Path, name: str, words: str) -> None:
    page.get_by_role("tab", name="Retrieval").click()
    page.locator("#query input[type=file]").set_input_files(str(world / f"{name}.png"))
    page.get_by_text(words).first.wait_for()


def test_images_of_the_guide(browser: Any, shown: Shown) -> None:
    """Two checkpoints answer about an example, where they looked, and retrieval: all that the guide shows."""
    guide = (Path(__file__).parents[3] / "docs" / "chat.md").read_text()
    assert set(re.findall(r"images/(web-[\w-]+)\.png", guide)) == IMAGES
    with visit(browser, shown.server, viewport={"width": 1200, "height": 1100}) as page:
        limit_answers(page, 16)
        take_example(page)
        page.locator("#box textarea").press("Enter")
        settled(page, 1)
        settled(page, 1, chat=1)
        ask(page, "What is in the image?")
        settled(page, 2)
        settled(page, 2, chat=1)
        page.evaluate("window.scrollTo(0, 0)")
        image_of(page, "web-chat")
        page.locator("#look").click()
        page.locator("#maps img").first.wait_for()
        image_of(page.locator("#maps"), "web-attention")
        search(page, shown.caption, shown.image, shown.caption)
        image_of(page, "web-retrieval")


# The contrast of WCAG 2 between an element's text and what is behind it.
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
def test_a_phone(browser: Any, shown: Shown, scheme: str) -> None:
    """An example is asked and looked into by touch; nothing is wider than the screen, and all can be read."""
    screen = {"width": 375, "height": 740}
    with visit(browser, shown.server, viewport=screen, color_scheme=scheme, has_touch=True, is_mobile=True) as page:

        def fits() -> None:
            assert page.evaluate("document.documentElement.scrollWidth") <= 375
            for name in ("box", "stop", "retry", "clear", "look"):
                place = page.locator(f"#{name}").bounding_box()
                assert place["x"] >= 0 and place["x"] + place["width"] <= 375 and place["height"] >= 24, name

        fits()
        limit_answers(page, 12)
        take_example(page)
        page.locator("#box").get_by_role("button", name=re.compile("submit|send", re.IGNORECASE)).tap()
        settled(page, 1)
        red, green, blue = map(
            int, re.findall(r"\d+", page.evaluate("getComputedStyle(document.body).backgroundColor"))[:3]
        )
        assert (red + green + blue < 200) == (scheme == "dark")
        for selector in ("#chat0 .bot.message", "#chat0 .user.message", "#box textarea", "#retry"):
            assert page.evaluate(CONTRAST, selector) >= 4.5, selector
        if scheme == "dark":
            page.evaluate("window.scrollTo(0, 0)")
            image_of(page, "web-phone")
        page.locator("#look").tap()
        page.locator("#maps img").first.wait_for()
        fits()
        page.get_by_role("tab", name="Retrieval").tap()
        page.locator("#caption").wait_for()
        assert page.evaluate("document.documentElement.scrollWidth") <= 375


def test_everything_by_keyboard(page: Any, world: Path) -> None:
    """No mouse: choose an image, ask, stop, ask again, look, change a setting and the question, clear, search."""
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
    stopped = settled(page, 1)[0]
    tab_to(page, "button:has-text('Settings')")
    page.keyboard.press("Enter")
    tab_to(page, "#tokens input[type=number]")
    page.keyboard.press("Control+a")
    page.keyboard.type("8")
    tab_to(page, "#retry")
    page.keyboard.press("Enter")
    page.wait_for_timeout(300)
    said = settled(page, 1)[0]
    assert said.startswith(stopped) or stopped.startswith(said), "the same question to a greedy model"
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
    settled(page, 1)
    tab_to(page, "#clear")
    page.keyboard.press("Space")
    wait_until(lambda: not answers(page), page)
    tab_to(page, "#examples button, #examples tr")
    page.keyboard.press("Enter")
    wait_until(lambda: page.locator("#box textarea").input_value() == "Which colour is it?", page)
    tab_to(page, "[role=tab]:has-text('Retrieval')")
    page.keyboard.press("Enter")
    page.locator("#caption").wait_for()


# --- safety -----------------------------------------------------------------------------------------------------------


def made_up(server: Any, file: str | None = None, tokens: int = 5) -> str:
    """What the page's function for a question tells a client that makes up its request."""
    config = httpx.get(f"{server.local_url}config").json()
    place = next(i for i, entry in enumerate(config["dependencies"]) if any(t[1] == "submit" for t in entry["targets"]))
    files = [] if file is None else [{"path": file, "meta": {"_type": "gradio.FileData"}}]
    name = os.urandom(4).hex()
    data = [{"text": "What?", "files": files}, None, None, "", tokens, 0, 1, 1]
    body = {"data": data, "fn_index": place, "session_hash": name}
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


def test_no_files_of_the_machine_and_no_addresses(page_server: Any, world: Path) -> None:
    """Neither by address nor as an upload that was none; nor does the page fetch what a client names."""
    for path in (__file__, str(world / "captions.txt"), "/etc/passwd"):
        assert httpx.get(f"{page_server.local_url}gradio_api/file={path}").status_code in (403, 404)
    assert '"success":true' in made_up(page_server), "what is well made is answered"
    text = made_up(page_server, "/etc/passwd")
    assert "root:" not in text and '"success":true' not in text
    with socket.create_server(("127.0.0.1", 0)) as inside:
        inside.setblocking(False)
        assert '"success":true' not in made_up(page_server, f"http://127.0.0.1:{inside.getsockname()[1]}/a.png")
        with pytest.raises(BlockingIOError):
            inside.accept()


def test_limits_hold_for_clients_of_their_own(page_server: Any, world: Path) -> None:
    """What the page's sliders and scripts keep people from, the server refuses."""
    assert '"success":true' not in made_up(page_server, tokens=1025)
    files = {"files": ("large.png", (world / "large.png").read_bytes())}
    assert httpx.post(f"{page_server.local_url}gradio_api/upload", files=files).status_code == 413
    limits = {"max_upload_mb": 1, "max_pixels": 9, "max_images": 2}
    page = web_page.Page(engines=[], names=[], examples=[], gallery=None, feedback=None, **limits)
    with pytest.raises(gradio.Error, match="may have 2 images, these are 3; show fewer"):
        next(page.ask({"text": "What?", "files": ["a.png"] * 3}, None, []))


def test_what_goes_wrong_is_said_without_paths(
    page: Any, engines: list[Engine], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError(f"cannot open {__file__}")

    with monkeypatch.context() as patch:
        patch.setattr(engines[0], "read", fail)
        ask(page, "Why?")
        page.get_by_text("Something went wrong; see the server's log").first.wait_for()
    assert_no_paths(page.locator("body").inner_text())
    assert __file__ in capfd.readouterr().err
    for error, words in ((UserError("too long"), "too long"), (QueueFull("64"), "questions are waiting")):
        with pytest.raises(gradio.Error, match=words), web_page.in_words():
            raise error


def test_names_of_models_tell_no_more_than_they_must() -> None:
    assert short_names(["/data/me/runs/a/finetune"]) == ["finetune"]
    assert short_names(["/data/me/runs/a/finetune", "/data/me/runs/b/finetune"]) == ["a/finetune", "b/finetune"]
    assert short_names(["/runs/a", "/runs/a"]) == ["a", "a"]


def test_binds_to_this_machine_and_counts_nothing(page_server: Any) -> None:
    assert WebRecipe(model="m").host == "127.0.0.1" and page_server.local_url.startswith("http://127.0.0.1:")
    assert page_server.analytics_enabled is False


def test_uploads_are_deleted_in_time(talker: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(web_page, "LOOK", 0.1)
    monkeypatch.setattr(web_page, "KEEP", 1.0)
    with contextlib.ExitStack() as stack:
        server = launch(WebRecipe(model=str(talker), port=0, device="cpu"), stack)
        file = upload(lambda *words, **options: httpx.post(server.local_url + words[0], **options))
        assert file.is_file()
        deadline = time.monotonic() + 60
        while file.exists() and time.monotonic() < deadline:
            time.sleep(0.1)
        assert not file.exists()


def upload(post: Callable[..., httpx.Response]) -> Path:
    """Where the server keeps it."""
    return Path(post("gradio_api/upload", files={"files": ("a.png", b"image")}).raise_for_status().json()[0])


@pytest.mark.slow
def test_a_password_and_no_upload_left_after_sigterm(talker: Path, tmp_path: Path) -> None:
    """The real command, its LLM in four bits: strangers get nothing, others on the machine cannot read along."""
    (tmp_path / "token").write_text("secret\n")
    folder = tmp_path / "temporary"
    folder.mkdir()
    words = ["--port", "0", "--device", "cpu", "--quantize", "4bit", "--token_file", str(tmp_path / "token")]
    process = subprocess.Popen(
        [sys.executable, "-m", "clips_mllm.web", str(talker), *words],
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
            file = upload(guest.post)
        (own,) = folder.glob("clips-mllm-web-*")
        assert file.is_file() and file.is_relative_to(own) and own.stat().st_mode & 0o777 == 0o700
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
        assert not own.exists()
    finally:
        process.kill()
        process.communicate()


def test_the_llm_in_four_bits(talker: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both models of the page are loaded rounded, and the page's function answers."""
    found: list[Engine] = []
    start = web.start_engine

    def noted(*words: Any, **options: Any) -> Engine:
        found.append(start(*words, **options))
        return found[-1]

    monkeypatch.setattr(web, "start_engine", noted)
    recipe = WebRecipe(model=str(talker), beside=str(talker), port=0, device="cpu", quantize="4bit")
    with contextlib.ExitStack() as stack:
        server = launch(recipe, stack)
        layers: list[Any] = [engine.mllm.model.model.language_model.layers[0] for engine in found]
        assert [type(layer.mlp.up_proj).__name__ for layer in layers] == ["Linear4bit"] * 2
        assert '"success":true' in made_up(server)


def test_attention_falls_on_patches(talker: Path, world: Path) -> None:
    """A map for each image, of its patches, that sums to 1; the same as in one pass over prompt and answer."""
    from clips_mllm.model.checkpoint import load_mllm

    images = [InputImage(Image.open(world / f"{color}.png").convert("RGB")) for color in ("green", "red")]
    with Engine(load_mllm(talker, device="cpu")) as engine:
        prompt = engine.prompt([question("Which?", 2)], images)
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
