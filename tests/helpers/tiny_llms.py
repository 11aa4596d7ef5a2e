"""Random two-layer LLMs of several families, each with its family's kind of tokenizer and chat template."""

from __future__ import annotations

import json
import string
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    PreTrainedTokenizerFast,
)

TEXT = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, detailed, "
    "and polite answers to the user's questions. USER: What is it? ASSISTANT: A cat. Which colour? Black, 3 spots! 4."
)
INST = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}"
    "{% if loop.index0 % 2 %}{{ raise_exception('roles must alternate') }}{% endif %}[INST] {{ m['content'] }} [/INST]"
    "{% elif m['role'] == 'assistant' %} {{ m['content'] }}{{ eos_token }}"
    "{% else %}{{ raise_exception('no system message, please') }}{% endif %}{% endfor %}"
)
HEADERS = (
    "{% for m in messages %}{% if loop.first %}{{ bos_token }}{% endif %}"
    "{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' + m['content'] | trim + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
CHATML = (
    "{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nYou help.<|im_end|>\n' }}{% endif %}"
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# Like Qwen3's: only the last answer has (empty) reasoning.
THINKING = (
    "{% for m in messages %}{% if m['role'] == 'assistant' and loop.last %}"
    "{{ '<|im_start|>assistant\n<think>\n\n</think>\n\n' + m['content'] + '<|im_end|>\n' }}"
    "{% else %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# family: (model type, BOS that the tokenizer adds, other special pieces of which the last is eos, template)
FAMILIES: dict[str, tuple[str, str | None, list[str], str]] = {
    "llama_2": ("llama", "<s>", ["</s>"], INST),
    "llama_3": (
        "llama",
        "<|begin_of_text|>",
        ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|end_of_text|>"],
        HEADERS,
    ),
    "mistral": ("mistral", "<s>", ["</s>"], INST),
    "qwen2": ("qwen2", None, ["<|im_start|>", "<|endoftext|>", "<|im_end|>"], CHATML),
    "qwen3": ("qwen3", None, ["<|im_start|>", "<|endoftext|>", "<|im_end|>"], THINKING),
}


def tiny_tokenizer(family: str) -> PreTrainedTokenizerFast:
    """Train a tokenizer: like sentencepiece for LLaMA-2 and Mistral, byte-level for the others."""
    _, bos, special, template = FAMILIES[family]
    if family in ("llama_2", "mistral"):
        core = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
        core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
        core.decoder = decoders.Sequence([decoders.Metaspace(prepend_scheme="first"), decoders.Fuse()])
        first, alphabet = ["<unk>"], sorted(set(string.printable))
    else:
        core = Tokenizer(models.BPE())
        core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        core.decoder = decoders.ByteLevel()
        first, alphabet = [], pre_tokenizers.ByteLevel.alphabet()
    known = [*first, *([bos] if bos else []), *special]
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=known, initial_alphabet=alphabet, show_progress=False)
    core.train_from_iterator([TEXT] * 3, trainer)
    if bos:
        core.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, core.token_to_id(bos))]
        )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, bos_token=bos, eos_token=special[-1])
    tokenizer.chat_template = template
    return tokenizer


def write_sentencepiece(folder: Path) -> None:
    """Write the tokenizer as published for Vicuna and LLaVA-1.5: tokenizer.model without tokenizer.json."""
    import sentencepiece

    with (folder / "tokenizer.model").open("wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter([TEXT] * 3),
            model_writer=file,
            vocab_size=340,
            hard_vocab_limit=False,
            model_type="bpe",
            byte_fallback=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            minloglevel=2,
        )
    config = {"tokenizer_class": "LlamaTokenizer", "legacy": False, "add_bos_token": True, "add_eos_token": False}
    pieces = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": None}
    (folder / "tokenizer_config.json").write_text(json.dumps(config | pieces))


def write_tiny_llm(family: str, folder: Path) -> Path:
    """Write weights, tokenizer and chat template to a folder."""
    kind, _, _, _ = FAMILIES[family]
    tokenizer = tiny_tokenizer(family)
    values: dict[str, Any] = {"head_dim": 16} if kind in ("qwen3", "mistral") else {}
    config = AutoConfig.for_model(
        kind,
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=None,
        **values,
    )
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
