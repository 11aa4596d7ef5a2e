"""Recipes of `chat`, `web` and `serve`.

A module of its own because the recipe parser executes the TYPE_CHECKING imports of a recipe's module, and `--help` must
not load torch.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

from clips_mllm.model.quantize import Quantize
from vision_tower.common.errors import UserError

Dtype = Literal["auto", "float32", "bfloat16", "float16"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelRecipe:
    """Model to load.

    Args:
        model: full, adapter or merged checkpoint: folder or hub id.
        device: auto, cpu, cuda or mps.
        dtype: auto (as saved), float32, bfloat16 or float16.
        quantize: none, 4bit (nf4) or 8bit: precision of the LLM's weights; fewer bits need less memory.
        context: maximum length of a conversation in tokens; default: the model's own limit.
    """

    model: str
    device: str = "auto"
    dtype: Dtype = "auto"
    quantize: Quantize = "none"
    context: int | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class ChatRecipe(ModelRecipe):
    """Chat with a multimodal LLM in the terminal: one question, or a conversation.

    Args:
        image: image of the first question; may be repeated.
        question: ask this and exit; without it a conversation starts.
        system: system prompt.
        examples: JSON list of {"image", "question"}; ask each in a new conversation, print the answers and exit.
        output: JSON file for the answers to the examples.
        max_new_tokens: maximum length of an answer in tokens.
        temperature: sampling temperature; 0 is greedy decoding.
    """

    image: list[str] = dataclasses.field(default_factory=list)
    question: str | None = None
    system: str | None = None
    examples: str | None = None
    output: str | None = None
    max_new_tokens: int = 256
    temperature: float = 0.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class NetworkRecipe(ModelRecipe):
    """Address and access token of a server.

    Args:
        host: address to listen on; default: this machine only.
        port: port to listen on; 0 selects a free one.
        token_file: file with the password or token of clients; default: the environment variable CLIPS_MLLM_TOKEN.
    """

    host: str = "127.0.0.1"
    port: int
    token_file: str | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class WebRecipe(NetworkRecipe):
    """Chat with a multimodal LLM in the browser.

    Args:
        compare_with: a second checkpoint, which answers the same questions side by side.
        encoder: folder of a CLIPS encoder, for the retrieval tab.
        images: folder of images to search in the retrieval tab.
        captions: text file of captions to search in the retrieval tab, one per line.
        examples: JSON list of {"image", "question"} shown as examples; `data sample` writes one.
        feedback: JSONL file to which rated conversations are appended, in LLaVA's format; without it there are no
            rating buttons.
        max_upload_mb: maximum size of an uploaded file in MB.
        max_pixels: maximum size of an image in pixels.
        max_images: maximum number of images per question.
    """

    compare_with: str | None = None
    encoder: str | None = None
    images: str | None = None
    captions: str | None = None
    examples: str | None = None
    feedback: str | None = None
    port: int = 7860
    max_upload_mb: int = 20
    max_pixels: int = 50_000_000
    max_images: int = 8


@dataclasses.dataclass(frozen=True, kw_only=True)
class Limits:
    """Limits of a request.

    Args:
        images: maximum number of images.
        image_bytes: maximum size of an encoded image.
        image_pixels: maximum size of a decoded image.
        body_bytes: maximum size of a request.
        body_seconds: time limit for receiving a request.
        new_tokens: maximum length of an answer in tokens.
        batch_size: number of answers decoded together.
        queue_size: number of waiting requests; further ones get status 429.
        remote_images: fetch images from http(s) URLs with public addresses.
        fetch_seconds: time limit for fetching an image.
    """

    images: int = 8
    image_bytes: int = 20_000_000
    image_pixels: int = 50_000_000
    body_bytes: int = 64_000_000
    body_seconds: float = 60.0
    new_tokens: int = 1024
    batch_size: int = 8
    queue_size: int = 64
    remote_images: bool = False
    fetch_seconds: float = 10.0

    def check(self) -> None:
        """Raise UserError for limits that no request can meet."""
        for name, value in dataclasses.asdict(self).items():
            if value < 0 or (value == 0 and name not in ("images", "remote_images")):
                raise UserError("too small", key=f"limits.{name}", value=value, remedy="set a positive number")


@dataclasses.dataclass(frozen=True, kw_only=True)
class ServeRecipe(NetworkRecipe):
    """Serve a multimodal LLM to OpenAI clients.

    Args:
        name: model name for clients; default: the last part of its folder or hub id.
        shutdown_seconds: time for running requests to finish after SIGTERM or Ctrl-C.
        limits: limits of a request.
    """

    name: str | None = None
    port: int = 8000
    shutdown_seconds: float = 30.0
    limits: Limits = dataclasses.field(default_factory=Limits)
