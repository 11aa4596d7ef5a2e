"""The page: what stands where, and what happens on a click."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import sys
import traceback
from collections.abc import Callable, Iterator
from html import escape
from pathlib import Path
from typing import Any

import gradio as gr
from PIL import Image

from clips_mllm.talk.conversation import cut_notice
from clips_mllm.talk.engine import Engine, QueueFull
from clips_mllm.talk.images import decode_limited
from clips_mllm.talk.prompt import InputImage
from clips_mllm.talk.sampling import Sampling
from clips_mllm.talk.web.attention import attention_maps, overlay
from clips_mllm.talk.web.gallery import Gallery
from clips_mllm.talk.web.messages import JOINER, rendered, turn_of
from clips_mllm.talk.web.turns import Turn, answered, append_feedback, asked_of
from clips_mllm.talk.web.uploads import refuse_large
from vision_tower.common.errors import UserError
from vision_tower.data.images import decode_image

# Fonts of the reader's own system: nothing is fetched from anywhere.
THEME = gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])
BUTTONS: list[Any] = ["download", "fullscreen"]  # of images; Gradio's "share" uploads them to a hub
CSS = """
.message-buttons .download-link + button {display: none}  /* the same "share", which a chat has no switch for */
#maps .grid-container {grid-template-columns: repeat(auto-fill, minmax(280px, 384px)); grid-template-rows: auto}
#found .grid-container {grid-template-columns: repeat(auto-fill, minmax(110px, 1fr)); grid-template-rows: auto}
"""
# Gradio lays its progress over all that an event may change, and after an error a blank panel; the toast is enough.
QUIETLY: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}
SMALL = 400  # pixels of a found image
LOOK, KEEP = 300, 3600  # seconds: how often uploads are looked at, how long one is kept


@dataclasses.dataclass(frozen=True, kw_only=True)
class Page:
    """What the page works with; `build` lays it out."""

    engines: list[Engine]
    names: list[str]
    examples: list[dict[str, str]]
    gallery: Gallery | None
    feedback: Path | None
    max_upload_mb: int
    max_pixels: int
    max_images: int

    def build(self) -> gr.Blocks:
        """The page. Uploaded files are deleted after an hour, and all of them when the server stops."""
        with gr.Blocks(
            title="clips-mllm", analytics_enabled=False, delete_cache=(LOOK, KEEP), fill_height=True
        ) as blocks:
            refuse_large(self.max_upload_mb)
            with gr.Tab("Chat"):
                self._chat()
            if self.gallery is not None:
                with gr.Tab("Retrieval"):
                    self._retrieval(self.gallery)
        return blocks

    def _chat(self) -> None:
        turns = gr.State([])
        with gr.Row():
            chats = [
                gr.Chatbot(
                    label=name,
                    elem_id=f"chat{place}",
                    height="55vh",
                    min_width=280,
                    buttons=["copy"],
                    editable="user" if place == 0 else None,
                    group_consecutive_messages=False,  # in one with an image Gradio's pencil does nothing
                    allow_tags=False,
                    render_markdown=False,  # it would fetch images from elsewhere
                )
                for place, name in enumerate(self.names)
            ]
        box = gr.MultimodalTextbox(
            placeholder="Ask, and drop, paste or upload images",
            show_label=False,
            file_types=["image"],
            file_count="multiple",
            elem_id="box",
        )
        with gr.Row():
            stop = gr.Button("Stop", elem_id="stop", variant="stop", min_width=80)
            retry = gr.Button("Retry", elem_id="retry", min_width=80)
            clear = gr.Button("Clear", elem_id="clear", min_width=80)
            look = gr.Button("Where did it look?", elem_id="look", min_width=160)
        maps = gr.Gallery(
            label="Attention of the last answer to the patches",
            visible=False,
            elem_id="maps",
            object_fit="contain",
            buttons=BUTTONS,
        )
        with gr.Accordion("Camera", open=False):
            camera = gr.Image(
                sources=["webcam"],
                type="filepath",
                label="An image for the next question",
                height=260,
                elem_id="camera",
            )
        with gr.Accordion("Settings", open=False):
            settings = [
                gr.Textbox("", label="System", elem_id="system"),  # by default nothing at all, until it is opened
                gr.Slider(1, 1024, value=256, step=1, label="Longest answer (tokens)", elem_id="tokens"),
                gr.Slider(0, 2, value=0, step=0.05, label="Temperature (0: greedy)", elem_id="temperature"),
                gr.Slider(0.05, 1, value=1, step=0.05, label="Top p"),
                gr.Slider(1, 2, value=1, step=0.05, label="Repetition penalty"),
            ]
        if self.examples:
            given = [[{"text": row["question"], "files": [row["image"]]}] for row in self.examples]
            gr.Examples(given, inputs=[box], label="Examples", elem_id="examples")
        shown = [*chats, turns, box, camera, maps]
        asking = box.submit(told(self.ask), [box, camera, turns, *settings], shown, **QUIETLY)
        again = gr.on([retry.click, chats[0].retry], told(self.again), [turns, *settings], shown, **QUIETLY)
        edited = chats[0].edit(told(self.edit), [turns, *settings], shown, **QUIETLY)
        stop.click(None, cancels=[asking, again, edited])
        # First the end of the answer, then the clearing: else its last piece may come after it.
        gr.on([clear.click, *(chat.clear for chat in chats)], None, cancels=[asking, again, edited]).then(
            lambda: [*([[]] * len(chats)), [], None, None, gr.Gallery([], visible=False)], None, shown, **QUIETLY
        )
        look.click(self.look, turns, maps, api_visibility="private")
        if self.feedback is not None:
            for place, chat in enumerate(chats):
                chat.like(self._thumb(place), turns, None, api_visibility="private")

    def _retrieval(self, gallery: Gallery) -> None:
        with gr.Row():
            with gr.Column(min_width=280):
                caption = gr.Textbox(label="A caption finds images", elem_id="caption", submit_btn=True)
                found = gr.Gallery(
                    label="Nearest images",
                    elem_id="found",
                    height=360,
                    object_fit="contain",
                    buttons=BUTTONS,
                )
            with gr.Column(min_width=280):
                image = gr.Image(label="An image finds captions", type="filepath", elem_id="query", height=260)
                captions = gr.Dataframe(
                    headers=["caption", "cosine"],
                    column_widths=["75%", "25%"],
                    wrap=True,
                    label="Nearest captions",
                    elem_id="captions",
                )

        self._check_first(image)

        def images_for(text: str) -> list[tuple[Image.Image, str]]:
            with in_words():
                found = gallery.images_for(text.strip()) if text.strip() else []
            # Not by their paths: Gradio shows files of its own folders and of the working directory only.
            return [(small(file), f"{score:.3f} {file.stem}") for file, score in found]

        def captions_for(file: str | None) -> list[list[Any]]:
            if file is None:
                return []
            with in_words():
                return [[text, round(score, 3)] for text, score in gallery.captions_for(self.read(file).image)]

        caption.submit(images_for, caption, found, api_visibility="private")
        image.change(captions_for, image, captions, api_visibility="private")

    def _check_first(self, image: gr.Image) -> None:
        """Refuse in words an image that Gradio, which decodes it before any event, would fail on without a word."""
        decode = image.preprocess

        def preprocess(payload: Any) -> Any:
            if payload is not None and payload.path:
                with in_words():
                    self.read(payload.path)
            return decode(payload)

        image.preprocess = preprocess  # type: ignore[method-assign]

    def ask(self, box: dict[str, Any], camera: str | None, turns: list[Turn], *settings: Any) -> Iterator[list[Any]]:
        """A new question."""
        files = [*box["files"], *([camera] if camera else [])]
        text = (box["text"] or "").strip()
        if not text and not files:
            yield self._shown(turns)
            return
        if len(files) > self.max_images:
            message = f"A question may have {self.max_images} images, these are {len(files)}; show fewer at a time"
            raise gr.Error(message, print_exception=False)
        images, refused = self.read_all(files)
        if refused:
            for file, reason in refused.items():
                gr.Warning(f"{escape(Path(file).name)}: {reason}", title="Refused")
            box = {"text": box["text"], "files": [file for file in box["files"] if file not in refused]}
            shown = self._shown(turns)
            shown[-3] = box
            yield shown
            return
        yield from self._answer([*turns, Turn(text, tuple(images), tuple(files))], settings, box=None)

    def again(self, turns: list[Turn], *settings: Any) -> Iterator[list[Any]]:
        """The last question again."""
        if not turns:
            raise gr.Error("Nothing was asked yet.", print_exception=False)
        yield from self._answer(turns, settings, box=gr.skip())

    def edit(self, event: gr.EditData, turns: list[Turn], *settings: Any) -> Iterator[list[Any]]:
        """A question in other words; what came after it is gone."""
        place = turn_of(turns, event.index)
        changed = dataclasses.replace(turns[place], text=str(event.value).replace(JOINER, "").strip())
        if not changed.text and not changed.files:
            gr.Warning("A question needs words or an image; it stays as it was.", title="Refused")
            yield self._shown(turns)
            return
        yield from self._answer([*turns[:place], changed], settings, box=gr.skip())

    def _shown(self, turns: list[Turn]) -> list[Any]:
        """Chats and turns; box, camera and maps as they are."""
        return [*(rendered(turns, model) for model in range(len(self.engines))), turns, gr.skip(), gr.skip(), gr.skip()]

    def _answer(self, turns: list[Turn], settings: tuple[Any, ...], *, box: Any) -> Iterator[list[Any]]:
        """Answers as they grow. Box and camera become `box` once: what is put there meanwhile is the next question."""
        system, tokens, *rest = settings
        temperature, top_p, penalty = map(float, rest)  # a slider gives whole numbers as int
        sampling = Sampling(
            max_new_tokens=int(tokens), temperature=temperature, top_p=top_p, repetition_penalty=penalty
        )
        with in_words():
            for number, turn in enumerate(answered(self.engines, turns, system.strip(), sampling)):
                now = [*turns[:-1], turn]
                shown = self._shown(now)
                if number == 0:
                    self._tell_of_cut(now)
                    shown[-3:] = [box, box, gr.Gallery([], visible=False)]
                yield shown

    def _tell_of_cut(self, turns: list[Turn]) -> None:
        """Say whose conversation has grown too long, when more of it is left out than before."""
        before = turns[-2].dropped if len(turns) > 1 else (0,) * len(self.engines)
        for name, dropped, known in zip(self.names, turns[-1].dropped, before, strict=True):
            if dropped > known:
                gr.Info(f"{name}: {cut_notice(dropped)}")

    def read_all(self, files: list[str]) -> tuple[list[InputImage], dict[str, str]]:
        """Uploaded images, and of those that cannot be read what is wrong with them."""
        images, refused = [], {}
        for file in files:
            try:
                images.append(self.read(file))
            except UserError as error:
                refused[file] = str(error)
        return images, refused

    def read(self, file: str) -> InputImage:
        """An uploaded image. Raises UserError."""
        try:
            content = Path(file).read_bytes()
        except OSError:
            raise UserError("the image is gone", remedy="upload it again") from None
        return decode_limited(content, max_bytes=len(content), max_pixels=self.max_pixels)

    def look(self, turns: list[Turn]) -> Any:
        """Heat maps of the last answer, for each model and image."""
        if not turns or not any(turn.images for turn in turns):
            raise gr.Error("There is no answer about an image yet.", print_exception=False)
        found = []
        with in_words():
            for model, engine in enumerate(self.engines):
                fitted = asked_of(engine, turns, model, turns[-1].system, Sampling(max_new_tokens=1))
                maps = attention_maps(engine, engine.prompt(fitted.messages, fitted.images), turns[-1].answers[model])
                for image, weights in zip(fitted.images if maps else [], maps, strict=True):
                    found.append((overlay(image, weights), self.names[model]))
        return gr.Gallery(found, visible=True)

    def _thumb(self, model: int) -> Any:
        def thumb(event: gr.LikeData, turns: list[Turn]) -> None:
            assert self.feedback is not None
            place = turn_of(turns, event.index)
            rated = turns[: place + 1]
            with in_words():
                append_feedback(self.feedback, rated, model, self.names[model], bool(event.liked))
            gr.Info("Kept, with its images.")

        return thumb


@contextlib.contextmanager
def in_words() -> Iterator[None]:
    """What goes wrong is said in a toast; of our own faults the log has all, and the page tells nothing of the machine.

    Raises:
        gr.Error: for every other error.
    """
    try:
        yield
    except gr.Error:
        raise
    except UserError as error:
        raise gr.Error(escape(str(error)), print_exception=False) from error
    except QueueFull:
        raise gr.Error("Too many questions are waiting; try again shortly.", print_exception=False) from None
    except Exception as error:
        traceback.print_exception(error, file=sys.stderr)
        raise gr.Error("Something went wrong; see the server's log.", print_exception=False) from None


def told(event: Callable[..., Iterator[list[Any]]]) -> Callable[..., Iterator[list[Any]]]:
    """An error of the event is told beside the chats, which stay: Gradio would lay the word "Error" over them."""

    @functools.wraps(event)  # Gradio reads the signature
    def run(*arguments: Any) -> Iterator[list[Any]]:
        try:
            yield from event(*arguments)
        except gr.Error as error:
            gr.Warning(error.message, title="Not done")
            yield gr.skip()  # type: ignore[misc]  # of all there is

    return run


def small(file: Path) -> Image.Image:
    """An image of the gallery to look at."""
    image = decode_image(file.read_bytes(), min_size=SMALL)
    image.thumbnail((SMALL, SMALL))
    return image
