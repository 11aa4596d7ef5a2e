"""Layout and event handlers of the page."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from html import escape
from pathlib import Path
from typing import Any

import gradio as gr

from clips_mllm.talk.conversation import truncation_notice
from clips_mllm.talk.engine import Engine
from clips_mllm.talk.images import InputImage
from clips_mllm.talk.sampling import Sampling
from clips_mllm.talk.web.attention import attention_maps, overlay
from clips_mllm.talk.web.retrieval import BUTTONS, Gallery, retrieval_tab
from clips_mllm.talk.web.toasts import errors_as_toasts, errors_as_warnings, toast
from clips_mllm.talk.web.turns import JOINER, Turn, append_feedback, chat_messages, generate, model_input, turn_index
from clips_mllm.talk.web.uploads import read_upload, reject_large_files
from vision_tower.common.errors import UserError

# System fonts, so that nothing is downloaded.
THEME = gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])
CSS = """
.message-buttons .download-link + button {display: none}  /* the chat's "share" button, which has no switch */
#maps .grid-container {grid-template-columns: repeat(auto-fill, minmax(280px, 384px)); grid-template-rows: auto}
#found .grid-container {grid-template-columns: repeat(auto-fill, minmax(110px, 1fr)); grid-template-rows: auto}
"""
# Gradio covers all outputs of an event with a progress display, and after an error with a blank panel.
NO_PROGRESS: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}
UNCHANGED: Any = gr.skip()  # as the new value of a component
CLEANUP_INTERVAL, UPLOAD_LIFETIME = 300, 3600  # seconds


@dataclasses.dataclass(frozen=True, kw_only=True)
class Page:
    """The chat page of one model, or of two side by side; `build` creates its components.

    Attributes:
        names: displayed name of each engine's model.
        examples: rows of {"image", "question"}.
        gallery: content of the retrieval tab.
        feedback: JSONL file for rated conversations.
    """

    engines: list[Engine]
    names: list[str]
    examples: list[dict[str, str]]
    gallery: Gallery | None
    feedback: Path | None
    max_upload_mb: int
    max_pixels: int
    max_images: int

    def build(self) -> gr.Blocks:
        """Build the page. Gradio deletes uploads after an hour, and all of them when the server stops."""
        with gr.Blocks(
            title="clips-mllm",
            analytics_enabled=False,
            delete_cache=(CLEANUP_INTERVAL, UPLOAD_LIFETIME),
            fill_height=True,
        ) as blocks:
            reject_large_files(self.max_upload_mb)
            with gr.Tab("Chat"):
                self._chat_tab()
            if self.gallery is not None:
                with gr.Tab("Retrieval"):
                    retrieval_tab(self.gallery, self.max_pixels)
        return blocks

    def _chat_tab(self) -> None:
        turns = gr.State([])
        with gr.Row():
            chats = [self._chat(model) for model in range(len(self.names))]
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
            attend = gr.Button("Where did it look?", elem_id="look", min_width=160)
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
                gr.Textbox("", label="System", elem_id="system"),  # None by default until the accordion is opened
                gr.Slider(1, 1024, value=256, step=1, label="Longest answer (tokens)", elem_id="tokens"),
                gr.Slider(0, 2, value=0, step=0.05, label="Temperature (0: greedy)", elem_id="temperature"),
                gr.Slider(0.05, 1, value=1, step=0.05, label="Top p"),
                gr.Slider(1, 2, value=1, step=0.05, label="Repetition penalty"),
            ]
        if self.examples:
            rows = [[{"text": row["question"], "files": [row["image"]]}] for row in self.examples]
            gr.Examples(rows, inputs=[box], label="Examples", elem_id="examples")
        outputs = [*chats, turns, box, camera, maps]  # the order of `_updates`
        answers = [
            box.submit(errors_as_warnings(self.ask), [box, camera, turns, *settings], outputs, **NO_PROGRESS),
            gr.on(
                [retry.click, chats[0].retry],
                errors_as_warnings(self.retry),
                [turns, *settings],
                outputs,
                **NO_PROGRESS,
            ),
            chats[0].edit(errors_as_warnings(self.edit), [turns, *settings], outputs, **NO_PROGRESS),
        ]
        stop.click(None, cancels=answers)
        # Cancel first, then clear; otherwise the last part of an answer could be displayed after the clearing.
        gr.on([clear.click, *(chat.clear for chat in chats)], None, cancels=answers).then(
            lambda: [*([[]] * len(chats)), [], None, None, gr.Gallery([], visible=False)], None, outputs, **NO_PROGRESS
        )
        attend.click(self.attention, turns, maps, api_visibility="private")
        if self.feedback is not None:
            for model, chat in enumerate(chats):
                chat.like(self._rating_handler(self.feedback, model), turns, None, api_visibility="private")

    def _chat(self, model: int) -> gr.Chatbot:
        return gr.Chatbot(
            label=self.names[model],
            elem_id=f"chat{model}",
            height="55vh",
            min_width=280,
            buttons=["copy"],
            editable="user" if model == 0 else None,
            group_consecutive_messages=False,  # Gradio's edit button does nothing in a group with an image
            allow_tags=False,
            render_markdown=False,  # Markdown could load images from other servers
        )

    def ask(self, box: dict[str, Any], camera: str | None, turns: list[Turn], *settings: Any) -> Iterator[list[Any]]:
        """Handle a new question."""
        files = [*box["files"], *([camera] if camera else [])]
        text = (box["text"] or "").strip()
        if not text and not files:
            yield self._updates(turns)
            return
        if len(files) > self.max_images:
            raise toast(f"A question may have {self.max_images} images, not {len(files)}; attach fewer")
        images, rejected = self._read_all(files)
        if rejected:
            for file, reason in rejected.items():
                gr.Warning(f"{escape(Path(file).name)}: {reason}", title="Rejected")
            valid = [file for file in box["files"] if file not in rejected]
            yield self._updates(turns, box={"text": box["text"], "files": valid})
            return
        yield from self._answer([*turns, Turn(text, tuple(images), tuple(files))], settings, clear_input=True)

    def retry(self, turns: list[Turn], *settings: Any) -> Iterator[list[Any]]:
        """Ask the last question again."""
        if not turns:
            raise toast("There is no question yet.")
        yield from self._answer(turns, settings)

    def edit(self, event: gr.EditData, turns: list[Turn], *settings: Any) -> Iterator[list[Any]]:
        """Change a question, and remove the turns after it."""
        index = turn_index(turns, event.index)
        edited = dataclasses.replace(turns[index], text=str(event.value).replace(JOINER, "").strip())
        if not edited.text and not edited.files:
            gr.Warning("A question needs text or an image; it was not changed.", title="Rejected")
            yield self._updates(turns)
            return
        yield from self._answer([*turns[:index], edited], settings)

    def _updates(
        self, turns: list[Turn], *, box: Any = UNCHANGED, camera: Any = UNCHANGED, maps: Any = UNCHANGED
    ) -> list[Any]:
        """Return new values of chats, turns, box, camera and maps; in the order of the outputs."""
        return [*(chat_messages(turns, model) for model in range(len(self.engines))), turns, box, camera, maps]

    def _answer(
        self, turns: list[Turn], settings: tuple[Any, ...], *, clear_input: bool = False
    ) -> Iterator[list[Any]]:
        """Yield updates while the answers grow. The first clears the input; text entered later stays."""
        system, tokens, *rest = settings
        temperature, top_p, penalty = map(float, rest)  # sliders return whole numbers as int
        sampling = Sampling(
            max_new_tokens=int(tokens), temperature=temperature, top_p=top_p, repetition_penalty=penalty
        )
        cleared = {"box": None, "camera": None} if clear_input else {}
        with errors_as_toasts():
            for step, turn in enumerate(generate(self.engines, turns, system.strip(), sampling)):
                updated = [*turns[:-1], turn]
                if step > 0:
                    yield self._updates(updated)
                    continue
                self._notify_of_truncation(updated)
                yield self._updates(updated, **cleared, maps=gr.Gallery([], visible=False))

    def _notify_of_truncation(self, turns: list[Turn]) -> None:
        """Name the models that left out more turns than in the turn before."""
        before = turns[-2].dropped if len(turns) > 1 else (0,) * len(self.engines)
        for name, dropped, known in zip(self.names, turns[-1].dropped, before, strict=True):
            if dropped > known:
                gr.Info(f"{name}: {truncation_notice(dropped)}")

    def _read_all(self, files: list[str]) -> tuple[list[InputImage], dict[str, str]]:
        """Return the readable images, and the error of each other file."""
        images, rejected = [], {}
        for file in files:
            try:
                images.append(read_upload(file, self.max_pixels))
            except UserError as error:
                rejected[file] = str(error)
        return images, rejected

    def attention(self, turns: list[Turn]) -> Any:
        """Return heat maps of the last answer for each model and image."""
        if not turns or not any(turn.images for turn in turns):
            raise toast("There is no answer about an image yet.")
        heat_maps = []
        with errors_as_toasts():
            for model, engine in enumerate(self.engines):
                truncated = model_input(engine, turns, model, turns[-1].system, Sampling(max_new_tokens=1))
                prompt = engine.prompt(truncated.messages, truncated.images)
                maps = attention_maps(engine, prompt, turns[-1].answers[model])
                for image, weights in zip(truncated.images if maps else [], maps, strict=True):
                    heat_maps.append((overlay(image, weights), self.names[model]))
        return gr.Gallery(heat_maps, visible=True)

    def _rating_handler(self, file: Path, model: int) -> Callable[[gr.LikeData, list[Turn]], None]:
        def rate(event: gr.LikeData, turns: list[Turn]) -> None:
            rated = turns[: turn_index(turns, event.index) + 1]
            with errors_as_toasts():
                append_feedback(file, rated, model, self.names[model], bool(event.liked))
            gr.Info("Saved, with its images.")

        return rate
