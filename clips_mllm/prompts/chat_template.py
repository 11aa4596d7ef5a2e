"""Chat template of a checkpoint, chosen in training and saved with it.

BOS: some readers of a checkpoint tokenize the rendered prompt with special tokens (`processor(text=...)`), others
without (`tokenizer.apply_chat_template`, vLLM). If the LLM's tokenizer adds BOS, the template writes it instead and the
tokenizer no longer does, so that every reader gets exactly one.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from clips_mllm.prompts.conversation import Unsupervised
from clips_mllm.prompts.render import TemplateName, load_template, render_text
from clips_mllm.prompts.spans import special_tokens
from vision_tower.common.errors import UserError

if TYPE_CHECKING:
    from transformers import LlavaForConditionalGeneration, LlavaProcessor, PreTrainedTokenizerFast

# End token of answers. `plain` ends them with a line break; a model trained with it is not a chat model.
END_TOKENS = {"vicuna_v1": "</s>", "llama_2": "</s>", "llama_3": "<|eot_id|>", "chatml": "<|im_end|>"}
WRITES_BOS = {"": "{{- bos_token -}}", " ": "{{- bos_token + ' ' -}}"}  # by the gap between BOS and text
GAP = "{{%- set gap = '{}' -%}}"  # first statement of the built-in templates
KEY = "clips_mllm_llm"  # in tokenizer_config.json, in which transformers keeps unknown fields

PROBE = [
    {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is it?"}]},
    {"role": "assistant", "content": [{"type": "text", "text": "A cat."}]},
    {"role": "user", "content": [{"type": "text", "text": "And this?"}]},
    {"role": "assistant", "content": [{"type": "text", "text": "A dog."}]},
]


@dataclasses.dataclass(frozen=True)
class OwnFormat:
    """Prompt format of the LLM before a stage's template replaced it.

    Attributes:
        chat_template: its chat template, if it has one.
        adds_bos: True if its tokenizer adds BOS to every text.
        gap: text after a BOS or image in the template that gives the following words the ids they have at the start of
            a text. Vicuna's tokenizer starts a text with `▁A`, but continues after `<s>` or `<image>` with `A`. The
            original LLaVA tokenizes the text around images in pieces, each as the start of a text.
    """

    chat_template: str | None
    adds_bos: bool
    gap: str = ""


def own_format(tokenizer: PreTrainedTokenizerFast) -> OwnFormat:
    """Return the format saved by `adopt_template`, or that of the tokenizer as it is."""
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
    """Return the Jinja template for training and for the checkpoint.

    Args:
        key: recipe field or option of `name`, for messages.
    Raises:
        UserError: `name` is "tokenizer" and the LLM has no template.
    """
    own = own_format(tokenizer)
    if name != "tokenizer":
        gap = "" if name == "plain" else own.gap  # `plain` begins with an image
        return (WRITES_BOS[gap] if own.adds_bos else "") + _with_gap(load_template(name), own.gap)
    if not own.chat_template:
        remedy = f"choose another one: plain, {', '.join(END_TOKENS)}"
        raise UserError(
            f"{tokenizer.name_or_path or 'the LLM'} has no chat template", key=key, value="tokenizer", remedy=remedy
        )
    preamble = load_template("flatten")
    return own.chat_template if own.chat_template.startswith(preamble) else preamble + own.chat_template


def adopt_template(
    processor: LlavaProcessor,
    name: TemplateName,
    model: LlavaForConditionalGeneration | None = None,
    key: str = "data.template",
) -> str:
    """Install a template in processor and tokenizer, move BOS into it, and set the model's end token.

    Args:
        key: recipe field or option of `name`, for messages.
    Returns:
        The Jinja template.
    Raises:
        UserError: the template does not match the tokenizer, or answers cannot be found in its text.
    """
    tokenizer = processor.tokenizer
    text = template_for(tokenizer, name, key)
    # Saved in tokenizer_config.json, so that a later stage can choose the LLM's own template.
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
    tokenizer.add_bos_token = tokenizer.add_eos_token = False  # these setters rebuild the post-processor
    tokenizer.init_kwargs |= {"add_bos_token": False, "add_eos_token": False}  # the setters do not change saved values
    assert not tokenizer("")["input_ids"], "the tokenizer still adds special tokens"


def _end_of_answer(tokenizer: PreTrainedTokenizerFast, name: TemplateName, text: str, key: str) -> int | None:
    """Return the id of the token that ends an answer, taken from a rendered conversation."""
    if name == "plain":
        return None
    try:
        rendered, spans = render_text(PROBE, text, tokenizer)
    except Unsupervised as error:
        raise UserError(str(error), key=key, value=name, remedy="choose another template, such as chatml") from error
    for token in special_tokens(tokenizer):
        if rendered[: spans[-1][1]].endswith(token):
            return int(tokenizer.convert_tokens_to_ids(token))
    raise UserError(
        f"its end token {END_TOKENS.get(name, rendered[-20:])!r} is not a special token of this LLM's tokenizer",
        key=key,
        value=name,
        remedy="choose the template of the LLM's family, or 'tokenizer'",
    )


def _stop_at(generation_config: Any, end: int) -> None:
    """Add the end token: an instruct model's end of turn is often not the EOS of its base model."""
    known = generation_config.eos_token_id
    known = [] if known is None else [known] if isinstance(known, int) else list(known)
    if end not in known:
        generation_config.eos_token_id = [*known, end] if known else end
