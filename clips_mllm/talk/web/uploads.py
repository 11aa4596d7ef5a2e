"""Uploaded images: large files are rejected by the browser before they are sent; the server checks again."""

from __future__ import annotations

import math
from html import escape
from pathlib import Path

import gradio as gr

from clips_mllm.talk.images import InputImage, decode_limited
from clips_mllm.talk.web.toasts import toast
from vision_tower.common.errors import UserError

MEGABYTE = 10**6

# Listens in the capture phase, before Gradio's own listeners, whose message states neither size nor limit.
WATCH = """
const reject = (event, files) => {
  const large = Array.from(files ?? []).find((file) => file.size > %d);
  if (!large) return;
  event.preventDefault();
  event.stopImmediatePropagation();
  if (event.type === 'drop')  // clear the drop-zone highlight
    event.target.dispatchEvent(new DragEvent('dragleave', {bubbles: true, clientX: -1, clientY: -1}));
  trigger('upload', {name: large.name, size: large.size});
};
document.addEventListener('change', (event) => reject(event, event.target.files), true);
document.addEventListener('drop', (event) => reject(event, event.dataTransfer?.files), true);
document.addEventListener('paste', (event) => reject(event, event.clipboardData?.files), true);
"""


def reject_large_files(max_upload_mb: int) -> None:
    """Add a listener to the page under construction; its toast states the file's size and the limit."""

    def show_toast(event: gr.EventData) -> None:
        name, size = escape(str(event.name)), math.ceil(10 * float(event.size) / MEGABYTE) / 10
        raise toast(f"{name} has {size} MB, more than the {max_upload_mb} MB allowed; send a smaller one")

    watch = gr.HTML(visible="hidden", js_on_load=WATCH % (max_upload_mb * MEGABYTE))
    watch.upload(show_toast, None, None, api_visibility="private")


def read_upload(file: str, max_pixels: int) -> InputImage:
    """Decode an uploaded image.

    Raises:
        UserError: unreadable, too large, or deleted since. The message contains no path.
    """
    try:
        content = Path(file).read_bytes()
    except OSError:
        raise UserError("the image was deleted", remedy="upload it again") from None
    return decode_limited(content, max_bytes=len(content), max_pixels=max_pixels)
