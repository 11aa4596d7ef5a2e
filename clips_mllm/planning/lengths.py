"""How long the samples of a recipe are, from its file where that is there, else as the recipe allows. No torch."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from clips_mllm.data.json_rows import read_rows
from clips_mllm.data.llava_json import BadRow, Example, to_example
from clips_mllm.data.mixture import mix, share
from clips_mllm.data.recipe import JSON_SUFFIXES, InstructionRecipe
from clips_mllm.model.recipe import MllmRecipe
from clips_mllm.prompts.conversation import Message
from vision_tower.common.errors import UserError

LOOKED_AT = 5000  # samples, spread over the file
TOKENS_A_WORD = 1.4  # where no tokenizer is at hand
AROUND_A_TURN = {  # what a template writes around a question and an answer; "tokenizer" is taken to be like ChatML
    "plain": ("", "\n"),
    "vicuna_v1": ("USER: ", " ASSISTANT: </s>"),
    "llama_2": ("<s>[INST]  [/INST]", "  </s>"),
    "llama_3": tuple(f"<|start_header_id|>{role}<|end_header_id|>\n\n<|eot_id|>" for role in ("user", "assistant")),
    "chatml": tuple(f"<|im_start|>{role}\n<|im_end|>\n" for role in ("user", "assistant")),
}
# Sizes of LLaVA-1.5's sets (Liu et al., arXiv 2310.03744), for files that are not there yet.
SAMPLES = {"blip_laion_cc_sbu_558k.json": 558_128, "llava_v1_5_mix665k.json": 665_298}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Lengths:
    """Of the samples, in tokens.

    Attributes:
        samples: their number; 0 where nothing says it.
        longest, mean: with image tokens.
        supervised: mean of those that are learnt from.
        images: mean of a sample.
        measured: whether they come from the file.
    """

    samples: int
    longest: int
    mean: float
    supervised: float
    images: float
    measured: bool


def read_lengths(data: InstructionRecipe, model: MllmRecipe, patches: int) -> Lengths:
    """Lengths of the recipe's samples.

    Raises:
        UserError: a file that is no LLaVA JSON.
    """
    files = [Path(source.file) for source in data.sources]
    if not all(file.is_file() and file.suffix in JSON_SUFFIXES for file in files):
        sizes = [SAMPLES.get(file.name, 0) for file in files]
        known = sum(share(source, size) for source, size in zip(data.sources, sizes, strict=True) if size)
        mean = min(data.max_length, patches + 300)
        return Lengths(
            samples=known,
            longest=data.max_length,
            mean=mean,
            supervised=mean - patches,
            images=1.0,
            measured=False,
        )
    found = [list(read_rows(file)) for file in files]
    rows = [row for part in found for row in part]
    chosen = mix(data.sources, [len(part) for part in found], data.seed)
    rows = rows if chosen is None else [rows[place] for place in chosen]
    looked = list(_examples(rows[:: max(1, len(rows) // LOOKED_AT)]))
    if not looked:
        raise UserError("no conversations", file=files[0], remedy="`clips-mllm data doctor` tells more")
    count = _counter(model)
    around = [count(text) for text in AROUND_A_TURN.get(data.template, AROUND_A_TURN["chatml"])]
    whole, learnt = [], []
    for example in looked:
        spoken = [(turn["role"] == "assistant", _text(turn, data.template)) for turn in example.messages]
        tokens = [(answer, count(text)) for answer, text in spoken]
        images = patches * len(example.images)
        whole.append(min(data.max_length, images + sum(around[answer] + length for answer, length in tokens)))
        learnt.append(sum(length + 1 for answer, length in tokens if answer))
    return Lengths(
        samples=len(rows),
        longest=max(whole),
        mean=sum(whole) / len(whole),
        supervised=sum(learnt) / len(learnt),
        images=sum(len(example.images) for example in looked) / len(looked),
        measured=True,
    )


def _examples(rows: list[Any]) -> Iterator[Example]:
    """Without the bad rows, which the doctor tells of and training leaves out."""
    for row in rows:
        with contextlib.suppress(BadRow):
            yield to_example(row)


def _text(turn: Message, template: str) -> str:
    """What of a turn is written: `plain` shows the images of a question alone."""
    if template == "plain" and turn["role"] != "assistant":
        return ""
    return "".join(part.get("text", "") for part in turn["content"])


def _counter(model: MllmRecipe) -> Any:
    """Tokens of a text: by the LLM's tokenizer.json where it is in a folder, else from its words."""
    folder = model.checkpoint or model.llm
    file = Path(folder or "") / "tokenizer.json"
    if not file.is_file():
        return lambda text: round(len(text.split()) * TOKENS_A_WORD)
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(file))
    return lambda text: len(tokenizer.encode(text, add_special_tokens=False).ids)
