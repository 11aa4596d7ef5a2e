"""The chat template of a checkpoint: chosen once for training, and carried on, BOS and all.

Who writes BOS? Some readers of a checkpoint tokenize the rendered prompt with special tokens (`processor(text=...)`),
others without (`tokenizer.apply_chat_template`, vLLM). Where the LLM's tokenizer puts BOS in front by itself, here the
template writes it instead and the tokenizer no longer does: every reader gets it exactly once.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from clips_mllm.prompts.conversation import Unsupervised
from clips_mllm.prompts.render import TemplateName, load_template, render_text
from clips_mllm.prompts.spans import special_pieces
from vision_tower.common.errors import UserError

if TYPE_CHECKING:
    from transformers import LlavaForConditionalGeneration, LlavaProcessor, PreTrainedTokenizerFast

# What ends an answer; `plain` ends with a line break, and a model trained with it is not for talking.
END_TOKENS = {"vicuna_v1": "</s>", "llama_2": "</s>", "llama_3": "<|eot_id|>", "chatml": "<|im_end|>"}
WRITES_BOS = {"": "{{- bos_token -}}", " ": "{{- bos_token + ' ' -}}"}  # by what stands between it and the words
GAP = "{{%- set gap = '{}' -%}}"  # begins every template of ours
KEY = "clips_mllm_llm"  # in tokenizer_config.json, where transformers keeps what it does not know

PROBE = [
    {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is it?"}]},
    {"role": "assistant", "content": [{"type": "text", "text": "A cat."}]},
    {"role": "user", "content": [{"type": "text", "text": "And this?"}]},
    {"role": "assistant", "content": [{"type": "text", "text": "A dog."}]},
]


@dataclasses.dataclass(frozen=True)
class OwnFormat:
    """What the LLM came with, before a stage's template took its place.

    Attributes:
        chat_template: its chat template, if it has one.
        adds_bos: whether its tokenizer puts BOS in front of every text.
        gap: what stands between a written BOS or image and the words, so that they become the ids that they are at
            the beginning of a text: Vicuna's begins one with `▁A`, but goes on after `<s>` or `<image>` with `A`. The
            original LLaVA tokenizes what stands between images piece by piece, each as a beginning.
    """

    chat_template: str | None
    adds_bos: bool
    gap: str = ""


def own_format(tokenizer: PreTrainedTokenizerFast) -> OwnFormat:
    """As kept by `adopt_template`, or as the tokenizer is now."""
    if KEY in tokenizer.init_kwargs:
        return OwnFormat(**tokenizer.init_kwargs[KEY])
    own = tokenizer.chat_template
    own = own.get("default") if isinstance(own, dict) else own
    bos = tokenizer.bos_token_id
    adds_bos = bos is not None and tokenizer("")["input_ids"][:1] == [bos]
    return OwnFormat(own, adds_bos, _gap(tokenizer))


def _gap(tokenizer: PreTrainedTokenizerFast) -> str:
    def ids(text: str) -> list[int]:
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])

    special = tokenizer.bos_token or tokenizer.eos_token
    if special is None:
        return ""
    written = (gap for gap in WRITES_BOS if ids(f"{special}{gap}A") == [*ids(special), *ids("A")])
    return next(written, "")


def template_for(tokenizer: PreTrainedTokenizerFast, name: TemplateName, key: str = "data.template") -> str:
    """The Jinja text that training renders with and the checkpoint carries.

    Args:
        key: where the name was given, for messages.
    Raises:
        UserError: `tokenizer` is asked for and the LLM has none of its own.
    """
    own = own_format(tokenizer)
    if name != "tokenizer":
        gap = "" if name == "plain" else own.gap  # which begins with an image
        return (WRITES_BOS[gap] if own.adds_bos else "") + _with_gap(load_template(name), own.gap)
    if not own.chat_template:
        raise UserError(
            f"{key}=tokenizer: {tokenizer.name_or_path or 'the LLM'} has no chat template of its own",
            remedy=f"choose another (plain, {', '.join(END_TOKENS)})",
        )
    preamble = load_template("flatten")
    return own.chat_template if own.chat_template.startswith(preamble) else preamble + own.chat_template


def adopt_template(
    processor: LlavaProcessor,
    name: TemplateName,
    model: LlavaForConditionalGeneration | None = None,
    key: str = "data.template",
) -> str:
    """Make a template the checkpoint's: processor, tokenizer, BOS, and where the model's answers end.

    Args:
        key: where the name was given, for messages.
    Returns:
        The Jinja text.
    Raises:
        UserError: the template does not suit the tokenizer, or labels cannot be told with it.
    """
    tokenizer = processor.tokenizer
    text = template_for(tokenizer, name, key)
    tokenizer.init_kwargs[KEY] = dataclasses.asdict(own_format(tokenizer))
    _leave_bos_to_the_template(tokenizer)
    end = _end_of_answer(tokenizer, name, text, key)
    if model is not None and end is not None:
        _stop_at(model.generation_config, end)
    processor.chat_template = tokenizer.chat_template = text
    return text


def _with_gap(template: str, gap: str) -> str:
    return template.replace(GAP.format(""), GAP.format(gap))


def _leave_bos_to_the_template(tokenizer: PreTrainedTokenizerFast) -> None:
    if tokenizer.bos_token is None or not tokenizer("")["input_ids"]:
        return
    tokenizer.add_bos_token = tokenizer.add_eos_token = False  # which rewrites the post-processor
    tokenizer.init_kwargs |= {"add_bos_token": False, "add_eos_token": False}
    assert not tokenizer("")["input_ids"], "the tokenizer still adds special tokens"


def _end_of_answer(tokenizer: PreTrainedTokenizerFast, name: TemplateName, text: str, key: str) -> int | None:
    """The id of the token that ends an answer, found in a rendered conversation."""
    if name == "plain":
        return None
    try:
        rendered, spans = render_text(PROBE, text, tokenizer)
    except Unsupervised as error:
        raise UserError(f"{key}={name}: {error}", remedy="choose another, chatml suits most LLMs") from error
    for piece in special_pieces(tokenizer):
        if rendered[: spans[-1][1]].endswith(piece):
            return int(tokenizer.convert_tokens_to_ids(piece))
    raise UserError(
        f"{key}={name}: it ends answers with {END_TOKENS.get(name, rendered[-20:])!r}, which is not one "
        f"special piece of this LLM's tokenizer",
        remedy="choose the template of its family, or 'tokenizer'",
    )


def _stop_at(generation_config: Any, end: int) -> None:
    """An instruct model's end of turn is often not the eos of its base model."""
    known = generation_config.eos_token_id
    known = [] if known is None else [known] if isinstance(known, int) else list(known)
    if end not in known:
        generation_config.eos_token_id = [*known, end] if known else end
