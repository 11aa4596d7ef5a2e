"""Uploads of the page: what is too large is refused before a byte is sent, the rest lies in a folder of its own."""

from __future__ import annotations

import contextlib
import math
import os
import tempfile
from collections.abc import Iterator
from html import escape

import gradio as gr

MEGABYTE = 10**6

# Before Gradio's own listeners see a file, whichever way it comes; they would refuse it in words of their own.
WATCH = """
const refuse = (event, files) => {
  const large = Array.from(files ?? []).find((file) => file.size > %d);
  if (!large) return;
  event.preventDefault();
  event.stopImmediatePropagation();
  if (event.type === 'drop')  // the place that lit up for the drop waits for it no longer
    event.target.dispatchEvent(new DragEvent('dragleave', {bubbles: true, clientX: -1, clientY: -1}));
  trigger('upload', {name: large.name, size: large.size});
};
document.addEventListener('change', (event) => refuse(event, event.target.files), true);
document.addEventListener('drop', (event) => refuse(event, event.dataTransfer?.files), true);
document.addEventListener('paste', (event) => refuse(event, event.clipboardData?.files), true);
"""


def refuse_large(max_upload_mb: int) -> None:
    """Let the page that is being built say of a file that is too large how large it is, and what to do."""

    def tell(event: gr.EventData) -> None:
        name, size = escape(str(event.name)), math.ceil(10 * float(event.size) / MEGABYTE) / 10
        raise gr.Error(
            f"{name} has {size} MB, more than the {max_upload_mb} MB allowed; send a smaller one",
            print_exception=False,
        )

    watch = gr.HTML(visible="hidden", js_on_load=WATCH % (max_upload_mb * MEGABYTE))
    watch.upload(tell, None, None, api_visibility="private")


@contextlib.contextmanager
def upload_folder() -> Iterator[None]:
    """Gradio's uploads go to a folder that only this user may read, and that is deleted with all that is in it."""
    before = os.environ.get("GRADIO_TEMP_DIR")
    with tempfile.TemporaryDirectory(prefix="clips-mllm-web-", ignore_cleanup_errors=True) as folder:
        os.environ["GRADIO_TEMP_DIR"] = folder
        try:
            yield
        finally:
            os.environ.pop("GRADIO_TEMP_DIR")
            if before is not None:
                os.environ["GRADIO_TEMP_DIR"] = before
