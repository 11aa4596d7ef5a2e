"""Recipes of `chat`, `web` and `serve`, apart: the parser runs what stands under TYPE_CHECKING in their module.

No heavy imports: `--help` answers at once.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

from clips_mllm.model.quantize import Quantize
from clips_mllm.talk.limits import Limits

Dtype = Literal["auto", "float32", "bfloat16", "float16"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelRecipe:
    """Which model is loaded, and how.

    Args:
        model: full, adapter or merged checkpoint, folder or hub id.
        device: auto, cpu, cuda or mps.
        dtype: auto (as saved), float32, bfloat16 or float16.
        quantize: none, or the LLM's weights in 4bit (nf4) or 8bit, for less memory.
        context: most tokens of a conversation; the model's own limit if not given.
    """

    model: str
    device: str = "auto"
    dtype: Dtype = "auto"
    quantize: Quantize = "none"
    context: int | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class ChatRecipe(ModelRecipe):
    """Talk to a multimodal LLM: one question, or a conversation.

    Args:
        image: image to talk about; may be given several times.
        question: ask this and exit; without it a conversation starts.
        system: the system's words at the beginning of the conversation.
        examples: JSON list of {"image", "question"}; ask each by itself, print and exit.
        output: JSON file to keep the examples' answers in.
        max_new_tokens: longest answer, in tokens.
        temperature: 0 answers greedily, more samples.
    """

    image: list[str] = dataclasses.field(default_factory=list)
    question: str | None = None
    system: str | None = None
    examples: str | None = None
    output: str | None = None
    max_new_tokens: int = 256
    temperature: float = 0.0


@dataclasses.dataclass(frozen=True, kw_only=True)
class ListenRecipe(ModelRecipe):
    """Where others reach it.

    Args:
        host: address to listen on; only this machine by default.
        port: port to listen on; 0 takes a free one.
        token_file: file with the password or token that is asked for; the variable CLIPS_MLLM_TOKEN does the same.
    """

    host: str = "127.0.0.1"
    port: int
    token_file: str | None = None


@dataclasses.dataclass(frozen=True, kw_only=True)
class WebRecipe(ListenRecipe):
    """Talk to a multimodal LLM in the browser.

    Args:
        beside: a second checkpoint that answers the same questions next to it.
        encoder: folder of a CLIPS encoder for the retrieval tab.
        images: folder of images that the retrieval tab finds.
        captions: text file of captions, one a line, that the retrieval tab finds.
        examples: JSON list of {"image", "question"} to begin with, as `data sample` writes it.
        feedback: JSONL file that thumbs append conversations to, in LLaVA's format; without it there are no thumbs.
        max_upload_mb: largest file that may be uploaded.
        max_pixels: largest image that is decoded.
        max_images: images in one question.
    """

    beside: str | None = None
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
class ServeRecipe(ListenRecipe):
    """Serve a multimodal LLM to OpenAI's clients.

    Args:
        name: what clients call the model; the last part of its folder or id if not given.
        patience: seconds that running answers get when the server is stopped.
        limits: what a client may ask for.
    """

    name: str | None = None
    port: int = 8000
    patience: float = 30.0
    limits: Limits = dataclasses.field(default_factory=Limits)
