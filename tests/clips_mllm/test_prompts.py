"""Prompts: expected text, labels token by token, and the same ids in training and inference."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoProcessor, LlavaProcessor, PreTrainedTokenizerFast, SiglipImageProcessor

from clips_mllm.model.processors import image_tokens
from clips_mllm.prompts.conversation import IGNORED, IMAGE, Unsupervised
from clips_mllm.prompts.render import Rendered, load_template, render, render_text

TEMPLATES = ("plain", "chatml", "llama_2", "llama_3", "vicuna_v1")
PATCHES = 9
ENDS = {"plain": "\n", "chatml": "<|im_end|>", "llama_2": " </s>", "llama_3": "<|eot_id|>", "vicuna_v1": "</s>"}
SPECIAL = {
    "plain": ["<s>", "</s>"],
    "chatml": ["<|im_start|>", "<|im_end|>"],
    "llama_2": ["<s>", "</s>"],
    "llama_3": ["<s>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"],
    "vicuna_v1": ["<s>", "</s>"],
}
VICUNA = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions. "
)


def user(text: str, images: int = 0) -> dict[str, Any]:
    return {"role": "user", "content": [{"type": "image"}] * images + [{"type": "text", "text": text}]}


def assistant(text: str) -> dict[str, Any]:
    return {"role": "assistant", "content": [{"type": "text", "text": text}]}


SYSTEM = {"role": "system", "content": [{"type": "text", "text": "Be brief."}]}
ONE = [user("What is it?", 1), assistant("A cat.")]
SEVERAL = [*ONE, user("Which colour?"), assistant("Black, 3 spots!")]
WITH_SYSTEM = [SYSTEM, *ONE]
TEXT = [user("2 plus 2?"), assistant("Four.")]
TWO_IMAGES = [user("Same?", 2), assistant("No.")]
CONVERSATIONS = {"one": ONE, "several": SEVERAL, "system": WITH_SYSTEM, "text": TEXT, "two_images": TWO_IMAGES}

EXPECTED = {
    "plain": {
        "one": "<image>A cat.\n",
        "several": "<image>A cat.\nBlack, 3 spots!\n",
        "system": "<image>A cat.\n",
        "text": "Four.\n",
        "two_images": "<image><image>No.\n",
    },
    "chatml": {
        "one": "<|im_start|>user\n<image>\nWhat is it?<|im_end|>\n<|im_start|>assistant\nA cat.<|im_end|>\n",
        "several": "<|im_start|>user\n<image>\nWhat is it?<|im_end|>\n<|im_start|>assistant\nA cat.<|im_end|>\n"
        "<|im_start|>user\nWhich colour?<|im_end|>\n<|im_start|>assistant\nBlack, 3 spots!<|im_end|>\n",
        "system": "<|im_start|>system\nBe brief.<|im_end|>\n"
        "<|im_start|>user\n<image>\nWhat is it?<|im_end|>\n<|im_start|>assistant\nA cat.<|im_end|>\n",
        "text": "<|im_start|>user\n2 plus 2?<|im_end|>\n<|im_start|>assistant\nFour.<|im_end|>\n",
        "two_images": "<|im_start|>user\n<image>\n<image>\nSame?<|im_end|>\n<|im_start|>assistant\nNo.<|im_end|>\n",
    },
    "llama_2": {
        "one": "[INST] <image>\nWhat is it? [/INST] A cat. </s>",
        "several": "[INST] <image>\nWhat is it? [/INST] A cat. </s>[INST] Which colour? [/INST] Black, 3 spots! </s>",
        "system": "[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\n<image>\nWhat is it? [/INST] A cat. </s>",
        "text": "[INST] 2 plus 2? [/INST] Four. </s>",
        "two_images": "[INST] <image>\n<image>\nSame? [/INST] No. </s>",
    },
    "llama_3": {
        "one": "<|start_header_id|>user<|end_header_id|>\n\n<image>\nWhat is it?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\nA cat.<|eot_id|>",
        "several": "<|start_header_id|>user<|end_header_id|>\n\n<image>\nWhat is it?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\nA cat.<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nWhich colour?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\nBlack, 3 spots!<|eot_id|>",
        "system": "<|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\n<image>\nWhat is it?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\nA cat.<|eot_id|>",
        "text": "<|start_header_id|>user<|end_header_id|>\n\n2 plus 2?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\nFour.<|eot_id|>",
        "two_images": "<|start_header_id|>user<|end_header_id|>\n\n<image>\n<image>\nSame?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\nNo.<|eot_id|>",
    },
    "vicuna_v1": {
        "one": VICUNA + "USER: <image>\nWhat is it? ASSISTANT: A cat.</s>",
        "several": VICUNA + "USER: <image>\nWhat is it? ASSISTANT: A cat.</s>"
        "USER: Which colour? ASSISTANT: Black, 3 spots!</s>",
        "system": "Be brief. USER: <image>\nWhat is it? ASSISTANT: A cat.</s>",
        "text": VICUNA + "USER: 2 plus 2? ASSISTANT: Four.</s>",
        "two_images": VICUNA + "USER: <image>\n<image>\nSame? ASSISTANT: No.</s>",
    },
}
GENERATION_PROMPTS = {
    "plain": "",
    "chatml": "<|im_start|>assistant\n",
    "llama_2": " [/INST]",
    "llama_3": "<|start_header_id|>assistant<|end_header_id|>\n\n",
    "vicuna_v1": "ASSISTANT:",
}


def byte_level(template: str) -> PreTrainedTokenizerFast:
    """Like those of GPT-2, LLaMA-3 and SmolLM. If it has `<s>`, it adds that to every text, as LLaMA's does."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    return _trained(core, SPECIAL[template], pre_tokenizers.ByteLevel.alphabet())


def metaspace(template: str) -> PreTrainedTokenizerFast:
    """Like those of LLaMA-2 and Vicuna: a space belongs to the next word, a line break is a token."""
    core = Tokenizer(models.BPE(unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split("\n", "isolated"), pre_tokenizers.Metaspace(prepend_scheme="first")]
    )
    core.decoder = decoders.Metaspace(prepend_scheme="first")
    return _trained(core, ["<unk>", *SPECIAL[template]], sorted({c for text in _texts() for c in text}))


def _texts() -> list[str]:
    return [text for by_talk in EXPECTED.values() for text in by_talk.values()]


def _trained(core: Tokenizer, special: list[str], alphabet: list[str]) -> PreTrainedTokenizerFast:
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    core.train_from_iterator(_texts() * 3, trainer)
    if "<s>" in special:
        core.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", core.token_to_id("<s>"))]
        )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token=special[-1], pad_token=special[-1])
    tokenizer.add_tokens([AddedToken(IMAGE, special=True, normalized=False)], special_tokens=True)
    return tokenizer


def processor_with(tokenizer: PreTrainedTokenizerFast, template: str) -> LlavaProcessor:
    return LlavaProcessor(
        image_processor=SiglipImageProcessor(size={"height": 96, "width": 96}),
        tokenizer=tokenizer,
        patch_size=32,
        vision_feature_select_strategy="full",
        num_additional_image_tokens=0,
        chat_template=load_template(template),  # type: ignore[arg-type]
    )


def rendered(conversation: list[dict[str, Any]], template: str, tokenizer: Any, max_length: int = 10_000) -> Rendered:
    return render(
        conversation,
        template=load_template(template),  # type: ignore[arg-type]
        tokenizer=tokenizer,
        image_tokens=PATCHES,
        max_length=max_length,
    )


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("conversation", list(CONVERSATIONS))
def test_rendered_text_is_as_expected(template: str, conversation: str, tmp_path: Path) -> None:
    """In training, and from the processor of a saved checkpoint."""
    text, spans = render_text(CONVERSATIONS[conversation], load_template(template))  # type: ignore[arg-type]
    assert text == EXPECTED[template][conversation]
    answers = [m["content"][0]["text"] for m in CONVERSATIONS[conversation] if m["role"] == "assistant"]
    assert [text[start:end].strip(" ") for start, end in spans] == [answer + ENDS[template] for answer in answers]
    processor_with(byte_level(template), template).save_pretrained(tmp_path)
    saved = AutoProcessor.from_pretrained(tmp_path)
    assert saved.apply_chat_template(CONVERSATIONS[conversation]) == text
    prompt = saved.apply_chat_template(CONVERSATIONS[conversation][:-1], add_generation_prompt=True)
    assert text.startswith(prompt)
    assert prompt.endswith(GENERATION_PROMPTS[template])


@pytest.mark.parametrize("template", ["llama_2", "vicuna_v1"])
def test_later_system_messages_are_refused(template: Any) -> None:
    """These templates have no place for them. A system message at the start is rendered completely."""

    def message(role: str, *texts: str) -> dict[str, Any]:
        return {"role": role, "content": [{"type": "text", "text": text} for text in texts]}

    conversation: list[Any] = [
        message("system", "Be brief", " and kind."),
        message("user", "Hi."),
        message("assistant", "Yes."),
    ]
    assert "Be brief and kind." in render_text(conversation, load_template(template))[0]
    for index in (1, 3):
        with pytest.raises(Unsupervised):
            render_text(
                [*conversation[:index], message("system", "Be long."), *conversation[index:]], load_template(template)
            )


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("conversation", list(CONVERSATIONS))
def test_string_content_renders_like_parts(template: str, conversation: str) -> None:
    """lmms-eval's simple mode passes strings that contain `<image>`."""
    plain = [
        {
            "role": message["role"],
            "content": "".join(f"{IMAGE}\n" if p["type"] == "image" else p["text"] for p in message["content"]),
        }
        for message in CONVERSATIONS[conversation]
    ]
    assert render_text(plain, load_template(template))[0] == EXPECTED[template][conversation]  # type: ignore[arg-type]


# Pieces of the text in order, and True if supervised. Byte-level BPE never merges over these borders.
LABELS = {
    ("chatml", "one"): [
        ("<|im_start|>user\n<image>\nWhat is it?<|im_end|>\n<|im_start|>assistant\n", False),
        ("A cat.<|im_end|>", True),
        ("\n", False),
    ],
    ("chatml", "several"): [
        ("<|im_start|>user\n<image>\nWhat is it?<|im_end|>\n<|im_start|>assistant\n", False),
        ("A cat.<|im_end|>", True),
        ("\n<|im_start|>user\nWhich colour?<|im_end|>\n<|im_start|>assistant\n", False),
        ("Black, 3 spots!<|im_end|>", True),
        ("\n", False),
    ],
    ("chatml", "system"): [
        ("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n<image>\nWhat is it?<|im_end|>\n", False),
        ("<|im_start|>assistant\n", False),
        ("A cat.<|im_end|>", True),
        ("\n", False),
    ],
    ("chatml", "text"): [
        ("<|im_start|>user\n2 plus 2?<|im_end|>\n<|im_start|>assistant\n", False),
        ("Four.<|im_end|>", True),
        ("\n", False),
    ],
    ("chatml", "two_images"): [
        ("<|im_start|>user\n<image>\n<image>\nSame?<|im_end|>\n<|im_start|>assistant\n", False),
        ("No.<|im_end|>", True),
        ("\n", False),
    ],
    ("plain", "one"): [("<s><image>", False), ("A cat.\n", True)],
    ("plain", "text"): [("<s>", False), ("Four.\n", True)],
    ("llama_3", "several"): [
        ("<s><|start_header_id|>user<|end_header_id|>\n\n<image>\nWhat is it?<|eot_id|>", False),
        ("<|start_header_id|>assistant<|end_header_id|>\n\n", False),
        ("A cat.<|eot_id|>", True),
        ("<|start_header_id|>user<|end_header_id|>\n\nWhich colour?<|eot_id|>", False),
        ("<|start_header_id|>assistant<|end_header_id|>\n\n", False),
        ("Black, 3 spots!<|eot_id|>", True),
    ],
    ("vicuna_v1", "several"): [
        (f"<s>{VICUNA}USER: <image>\nWhat is it? ASSISTANT:", False),
        (" A cat.</s>", True),
        ("USER: Which colour? ASSISTANT:", False),
        (" Black, 3 spots!</s>", True),
    ],
}


@pytest.mark.parametrize(("template", "conversation"), list(LABELS))
def test_labels_token_by_token(template: str, conversation: str) -> None:
    tokenizer = byte_level(template)
    image = tokenizer.convert_tokens_to_ids(IMAGE)
    ids: list[int] = []
    labels: list[int] = []
    for piece, supervised in LABELS[template, conversation]:
        for token in tokenizer.encode(piece, add_special_tokens=False):
            repeat = PATCHES if token == image else 1
            ids += [token] * repeat
            labels += [token if supervised else IGNORED] * repeat
    assert rendered(CONVERSATIONS[conversation], template, tokenizer) == Rendered(ids, labels)


@pytest.mark.parametrize("make", [byte_level, metaspace])
@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("conversation", list(CONVERSATIONS))
def test_training_ids_equal_inference_ids(template: str, conversation: str, make: Any) -> None:
    """Training ids start with the stock processor's prompt ids; supervised tokens are the answers and end tokens."""
    from PIL import Image

    tokenizer = make(template)
    processor = processor_with(tokenizer, template)
    sample = rendered(CONVERSATIONS[conversation], template, tokenizer)
    assert image_tokens(processor) == PATCHES
    turns = [at for at, message in enumerate(CONVERSATIONS[conversation]) if message["role"] == "assistant"]
    answers = []
    for at in turns:
        before = CONVERSATIONS[conversation][:at]
        images = sum(part["type"] == "image" for message in before for part in message["content"])
        photos = [Image.new("RGB", (40, 30))] * images
        text = processor.apply_chat_template(before, add_generation_prompt=True)
        prompt = processor(text=text, images=photos or None)["input_ids"][0]
        assert sample.ids[: len(prompt)] == prompt
        assert prompt.count(processor.image_token_id) == images * PATCHES
        answers.append(CONVERSATIONS[conversation][at]["content"][0]["text"] + ENDS[template])
        assert sample.labels[len(prompt)] == sample.ids[len(prompt)] != IGNORED, "the first token is supervised"
    supervised = [label for label in sample.labels if label != IGNORED]
    assert tokenizer.decode(supervised).replace(" ", "") == "".join(answers).replace(" ", "")
    assert all(label in (IGNORED, token) for token, label in zip(sample.ids, sample.labels, strict=True))


def test_first_token_has_no_label() -> None:
    """Plain text without an image or `<s>`: the first token has no predecessor."""
    tokenizer = byte_level("chatml")
    sample = rendered(TEXT, "plain", tokenizer)
    assert sample.labels == [IGNORED, *sample.ids[1:]]


def test_truncation() -> None:
    tokenizer = byte_level("chatml")
    full = rendered(SEVERAL, "chatml", tokenizer)
    first = next(at for at, label in enumerate(full.labels) if label != IGNORED)
    inside = rendered(SEVERAL, "chatml", tokenizer, max_length=first + 1)
    assert inside == Rendered(full.ids[: first + 1], full.labels[: first + 1])
    assert len(rendered(SEVERAL, "chatml", tokenizer, max_length=len(full.ids)).ids) == len(full.ids)
    with pytest.raises(Unsupervised):
        rendered(SEVERAL, "chatml", tokenizer, max_length=first)
    end_of_image = max(at for at, token in enumerate(full.ids) if token == tokenizer.convert_tokens_to_ids(IMAGE))
    with pytest.raises(Unsupervised):
        rendered(SEVERAL, "chatml", tokenizer, max_length=end_of_image)


def test_truncation_before_a_later_image_is_refused() -> None:
    """The first answer fits, the second image does not: its features would have no positions."""
    tokenizer = byte_level("chatml")
    conversation = [*ONE, user("And this?", 1), assistant("A dog.")]
    fits = len(rendered(ONE, "chatml", tokenizer).ids)
    with pytest.raises(Unsupervised):
        rendered(conversation, "chatml", tokenizer, max_length=fits + 6)
