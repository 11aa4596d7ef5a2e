"""How long the samples of a recipe are, from its file where that is there, else as the recipe allows. No torch."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from clips_mllm.mixture import mix, share
from clips_mllm.train_recipe import InstructionRecipe, MllmRecipe
from vision_tower.errors import UserError

LOOKED_AT = 5000  # samples, spread over the file
TOKENS_A_WORD = 1.4  # where no tokenizer is at hand
AROUND_A_TURN = {  # what a template writes around a question and an answer; "tokenizer" is taken to be like ChatML
    "plain": ("", ""),
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
        pictures: mean of a sample.
        measured: whether they come from the file.
    """

    samples: int
    longest: int
    mean: float
    supervised: float
    pictures: float
    measured: bool


def read_lengths(data: InstructionRecipe, model: MllmRecipe, patches: int) -> Lengths:
    """Lengths of the recipe's samples.

    Raises:
        UserError: a file that is no LLaVA JSON.
    """
    files = [Path(source.file) for source in data.sources]
    if not all(file.is_file() and file.suffix in (".json", ".jsonl") for file in files):
        sizes = [SAMPLES.get(file.name, 0) for file in files]
        known = sum(share(source, size) for source, size in zip(data.sources, sizes, strict=True) if size)
        mean = min(data.max_length, patches + 300)
        return Lengths(
            samples=known,
            longest=data.max_length,
            mean=mean,
            supervised=mean - patches,
            pictures=1.0,
            measured=False,
        )
    found = [_rows(file) for file in files]
    rows = [row for part in found for row in part]
    chosen = mix(data.sources, [len(part) for part in found], data.seed)
    rows = rows if chosen is None else [rows[place] for place in chosen]
    looked = [row for row in rows[:: max(1, len(rows) // LOOKED_AT)] if row.get("conversations")]
    if not looked:
        raise UserError(f"{files[0]}: no conversations; `clips-mllm data doctor` tells more")
    count = _counter(model)
    spoken = [[count(turn["value"]) for turn in row["conversations"]] for row in looked]
    learnt = [
        sum(tokens + 1 for tokens, turn in zip(counts, row["conversations"], strict=True) if turn["from"] == "gpt")
        for counts, row in zip(spoken, looked, strict=True)
    ]
    pictures = [sum(turn["value"].count("<image>") for turn in row["conversations"]) for row in looked]
    around = [count(text) for text in AROUND_A_TURN.get(data.template, AROUND_A_TURN["chatml"])]
    written = [sum(around[turn["from"] == "gpt"] for turn in row["conversations"]) for row in looked]
    whole = [
        min(data.max_length, sum(counts) + template + patches * seen)
        for counts, template, seen in zip(spoken, written, pictures, strict=True)
    ]
    return Lengths(
        samples=len(rows),
        longest=max(whole),
        mean=sum(whole) / len(whole),
        supervised=sum(learnt) / len(learnt),
        pictures=sum(pictures) / len(pictures),
        measured=True,
    )


def _rows(file: Path) -> list[dict[str, Any]]:
    text = file.read_text(encoding="utf-8")
    try:
        rows = [json.loads(line) for line in text.splitlines()] if file.suffix == ".jsonl" else json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(f"{file}: line {error.lineno}: not valid JSON ({error.msg}); make the file again") from error
    if not isinstance(rows, list):
        raise UserError(f"{file}: a list of samples is expected; give LLaVA JSON")
    return [row for row in rows if isinstance(row, dict)]


def _counter(model: MllmRecipe) -> Any:
    """Tokens of a text: by the LLM's tokenizer.json where it is in a folder, else from its words."""
    folder = model.checkpoint or model.llm
    file = Path(folder or "") / "tokenizer.json"
    if not file.is_file():
        return lambda text: round(len(text.split()) * TOKENS_A_WORD)
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(file))
    return lambda text: len(tokenizer.encode(text.replace("<image>", ""), add_special_tokens=False).ids)
