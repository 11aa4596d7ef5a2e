"""Templates with every family of LLMs: all readers of a checkpoint get the ids of training, including BOS."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from tokenizers import processors
from transformers import AutoModelForCausalLM, AutoProcessor, LlavaForConditionalGeneration

from clips_mllm.data.collator import InstructionCollator
from clips_mllm.model.build import add_image_token, build_mllm, read_llm
from clips_mllm.model.checkpoint import load_parts, save_mllm
from clips_mllm.prompts.chat_template import adopt_template, own_format, template_for
from clips_mllm.prompts.conversation import IGNORED, IMAGE, Unsupervised
from clips_mllm.prompts.render import load_template, render, render_text
from clips_mllm.training.trainer import supervised_loss
from tests.helpers.errors import raises_user_error
from tests.helpers.tiny_llms import FAMILIES, TEXT, tiny_tokenizer, write_sentencepiece, write_tiny_llm

PATCHES = 9
PAIRS = [
    ("llama_2", "plain"),
    ("llama_2", "vicuna_v1"),
    ("llama_2", "llama_2"),
    ("llama_2", "tokenizer"),
    ("llama_3", "llama_3"),
    ("llama_3", "tokenizer"),
    ("mistral", "tokenizer"),
    ("qwen2", "chatml"),
    ("qwen2", "tokenizer"),
    ("qwen3", "chatml"),
    ("qwen3", "tokenizer"),
]


def message(role: str, text: str, images: int = 0) -> dict[str, Any]:
    return {"role": role, "content": [{"type": "image"}] * images + [{"type": "text", "text": text}]}


ONE = [message("user", "What is it?", 1), message("assistant", "A cat.")]
CONVERSATIONS = {
    "several": [*ONE, message("user", "Which colour?"), message("assistant", "Black, 3 spots!")],
    "system": [message("system", "Be brief."), *ONE, message("user", "And?"), message("assistant", "it")],
    "text": [message("user", "2 plus 2?"), message("assistant", "Four.")],
    "images": [
        message("user", "Same?", 2),
        message("assistant", "A cat."),
        message("user", "?", 1),
        message("assistant", "i"),
    ],
}


@pytest.fixture(scope="module")
def llms(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {family: write_tiny_llm(family, tmp_path_factory.mktemp(family)) for family in FAMILIES}


@pytest.fixture(scope="module", params=PAIRS, ids="-".join)
def trained(
    request: Any, llms: dict[str, Path], encoder_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, str, Path]:
    """(family, template, checkpoint): built, trained for a step, saved."""
    family, name = request.param
    model, processor = build_mllm(
        str(encoder_dir / "tower"),
        str(llms[family]),
        feature_layer=-2,
        feature_select="auto",
        dtype=torch.float32,
    )
    template = adopt_template(processor, name, model)
    tokenizer = processor.tokenizer
    samples = []
    for conversation, count in (("several", 1), ("text", 0)):
        sample = render(
            CONVERSATIONS[conversation], template=template, tokenizer=tokenizer, image_tokens=PATCHES, max_length=1000
        )
        images = [Image.new("RGB", (40, 30), "red")] * count
        samples.append({"ids": sample.ids, "labels": sample.labels, "images": images})
    batch = InstructionCollator(processor)(samples)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    curve = []
    for _ in range(2):
        summed, count = supervised_loss(model, model, batch)
        optimizer.zero_grad()
        (summed / count).backward()
        optimizer.step()
        curve.append(float(summed.detach()))
    assert curve[1] < curve[0], "one step, and the loss falls"
    folder = tmp_path_factory.mktemp("checkpoint")
    save_mllm(model, processor, folder)
    return family, name, folder


def test_checkpoint_reloads_as_stock_llava(trained: tuple[str, str, Path], llms: dict[str, Path]) -> None:
    family, name, folder = trained
    model, info = LlavaForConditionalGeneration.from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    own = AutoModelForCausalLM.from_pretrained(llms[family])
    assert type(model.model.language_model) is type(own.model)
    end = {"llama_3": "<|eot_id|>", "qwen2": "<|im_end|>", "qwen3": "<|im_end|>"}.get(family, "</s>")
    stops = model.generation_config.eos_token_id
    stops = stops if isinstance(stops, list) else [stops]
    if name != "plain":
        assert AutoProcessor.from_pretrained(folder).tokenizer.convert_tokens_to_ids(end) in stops, "answers end"


@pytest.mark.parametrize("conversation", list(CONVERSATIONS))
def test_every_reader_gets_the_ids_of_training(trained: tuple[str, str, Path], conversation: str) -> None:
    """Compare the text, the ids of both ways of the processor, and of a server that adds no special tokens."""
    family, name, folder = trained
    processor = AutoProcessor.from_pretrained(folder)
    tokenizer = processor.tokenizer
    template = template_for(tokenizer, name)  # type: ignore[arg-type]
    assert template == processor.chat_template, "the next stage renders the same"
    messages = CONVERSATIONS[conversation]
    if conversation == "system" and FAMILIES[family][3] is FAMILIES["mistral"][3] and name == "tokenizer":
        with pytest.raises(Unsupervised):
            render_text(messages, template, tokenizer)
        return
    text, _ = render_text(messages, template, tokenizer)
    assert processor.apply_chat_template(messages) == text
    sample = render(messages, template=template, tokenizer=tokenizer, image_tokens=PATCHES, max_length=1000)
    bos = FAMILIES[family][1]
    assert text.count(bos or "\0") >= (bos is not None)
    assert sample.ids.count(tokenizer.bos_token_id if bos else -1) == (text.count(bos) if bos else 0)

    supervised = [label for label in sample.labels if label != IGNORED]
    answers = [m["content"][0]["text"] for m in messages if m["role"] == "assistant"]
    spoken = "".join(tokenizer.decode(supervised).replace("<think>\n\n</think>\n\n", "").split())
    end = {"llama_3": "<|eot_id|>", "qwen2": "<|im_end|>", "qwen3": "<|im_end|>"}.get(family, "</s>")
    end = "" if name == "plain" else end
    assert spoken == "".join("".join(answer.split()) + end for answer in answers)

    for at in (at for at, message in enumerate(messages) if message["role"] == "assistant"):
        before = messages[:at]
        image = Image.new("RGB", (40, 30))
        count = sum(part["type"] == "image" for message in before for part in message["content"])
        shown = [
            message | {"content": [p if "text" in p else {"image": image, **p} for p in message["content"]]}
            for message in before
        ]
        prompt = processor.apply_chat_template(before, add_generation_prompt=True)
        by_chat = processor.apply_chat_template(shown, add_generation_prompt=True, tokenize=True, return_dict=True)
        by_text = processor(text=prompt, images=[image] * count or None)
        server = tokenizer(prompt.replace(IMAGE, IMAGE * PATCHES), add_special_tokens=False)
        ids = by_text["input_ids"][0]
        assert sample.ids[: len(ids)] == ids == server["input_ids"]
        assert torch.as_tensor(by_chat["input_ids"]).flatten().tolist() == ids
        assert sample.labels[len(ids)] == sample.ids[len(ids)], "the first token of the answer is supervised"


def test_llm_template_is_kept_through_stage_1(llms: dict[str, Path], encoder_dir: Path, tmp_path: Path) -> None:
    """Train with `plain`, then with the LLM's template, which the checkpoint of stage 1 has kept, as it has the BOS."""
    options: dict[str, Any] = {"feature_layer": -2, "feature_select": "auto", "dtype": torch.float32}
    model, processor = build_mllm(str(encoder_dir / "tower"), str(llms["mistral"]), **options)
    before = own_format(processor.tokenizer)
    assert before.adds_bos
    adopt_template(processor, "plain", model)
    save_mllm(model, processor, tmp_path)
    _, later = load_parts(tmp_path, dtype=torch.float32)
    assert own_format(later.tokenizer) == before
    adopt_template(later, "tokenizer")
    assert later.chat_template.endswith(FAMILIES["mistral"][3])
    adopt_template(later, "vicuna_v1")
    ids = later(text=later.apply_chat_template(CONVERSATIONS["text"]))["input_ids"][0]
    assert ids[0] == later.tokenizer.bos_token_id != ids[1]


class Holder:
    """Minimal processor for `adopt_template`."""

    def __init__(self, family: str, template: str | None) -> None:
        self.tokenizer = tiny_tokenizer(family)
        self.tokenizer.chat_template = template
        self.chat_template = template


@pytest.mark.parametrize(
    ("family", "own", "name"),
    [
        ("qwen2", None, "tokenizer"),
        ("qwen2", "x", "vicuna_v1"),
        ("llama_2", "x", "llama_3"),
        # The prompt differs from the conversation; the answer is changed; the answer has no end token.
        ("qwen2", "{{ messages | length }}" + FAMILIES["qwen2"][3], "tokenizer"),
        ("qwen2", FAMILIES["qwen2"][3].replace("m['content'] +", "m['content'] | upper +"), "tokenizer"),
        ("qwen2", "{% for m in messages %}{{ m['content'] }}\n{% endfor %}", "tokenizer"),
    ],
)
def test_unsuitable_templates_are_refused(family: str, own: str | None, name: Any) -> None:
    with raises_user_error(key="data.template", value=name) as error:
        adopt_template(Holder(family, own), name)  # type: ignore[arg-type]
    assert "\n" not in str(error.value)


def test_answer_that_also_occurs_in_the_template() -> None:
    """`i` also occurs in `<think>`; only the answer is supervised."""
    tokenizer = tiny_tokenizer("qwen3")
    text, spans = render_text(CONVERSATIONS["images"], template_for(tokenizer, "tokenizer"), tokenizer)
    assert [text[a:b] for a, b in spans] == ["A cat.<|im_end|>", "<think>\n\n</think>\n\ni<|im_end|>"]


@pytest.mark.parametrize(("family", "name"), [("llama_2", "vicuna_v1"), ("llama_2", "llama_2"), ("llama_3", "llama_3")])
def test_ids_after_bos_are_those_of_the_llm(family: str, name: Any) -> None:
    """Vicuna was trained with `▁A` there, not `A`: its tokenizer adds BOS to the start of a text."""
    tokenizer, fresh = tiny_tokenizer(family), tiny_tokenizer(family)
    template = template_for(tokenizer, name)
    text, _ = render_text(CONVERSATIONS["text"], template, tokenizer)
    sample = render(
        CONVERSATIONS["text"], template=template, tokenizer=tokenizer, image_tokens=PATCHES, max_length=1000
    )
    assert sample.ids == fresh(text.removeprefix(fresh.bos_token).removeprefix(" "))["input_ids"]


@pytest.mark.parametrize("name", ["vicuna_v1", "llama_2", "plain"])
@pytest.mark.parametrize("family", ["llama_2", "llama_3", "qwen2", "sentencepiece", "without BOS"])
def test_ids_between_images_equal_the_original_llava(family: str, name: Any, tmp_path: Path) -> None:
    """The original LLaVA tokenizes each piece separately and drops its BOS; with sentencepiece each begins with `▁`.

    Yi's tokenizer, for example, is such a one without BOS.
    """
    if family == "sentencepiece":
        llm = write_tiny_llm("llama_2", tmp_path / "llm")
        (llm / "tokenizer.json").unlink()
        write_sentencepiece(llm)
        tokenizer, fresh = (read_llm(str(llm), "auto")[1] for _ in range(2))
    elif family == "without BOS":
        tokenizer, fresh = tiny_tokenizer("llama_2"), tiny_tokenizer("llama_2")
        for one in (tokenizer, fresh):
            one.backend_tokenizer.post_processor = processors.Sequence([])
    else:
        tokenizer, fresh = tiny_tokenizer(family), tiny_tokenizer(family)
    own = len(fresh("")["input_ids"])
    image = add_image_token(tokenizer)
    template = template_for(tokenizer, name)
    conversation = CONVERSATIONS["images"][:2] if name == "plain" else CONVERSATIONS["images"]
    if name == "plain":  # the original has one image there
        conversation = [{"role": "user", "content": [{"type": "image"}]}, conversation[1]]
    sample = render(conversation, template=template, tokenizer=tokenizer, image_tokens=1, max_length=1000)
    raw, _ = render_text(conversation, load_template(name), tokenizer)
    begin, *pieces = raw.split("<image>")
    wanted = fresh(begin)["input_ids"]
    for piece in pieces:
        wanted += [image, *(fresh(piece)["input_ids"][own:] if piece else [])]
    assert sample.ids == wanted


@pytest.mark.parametrize("name", ["vicuna_v1", "llama_2", "llama_3", "chatml", "plain"])
def test_string_content_renders_like_parts_if_a_blank_follows_the_image(name: Any) -> None:
    tokenizer = tiny_tokenizer("llama_2")
    template = template_for(tokenizer, name)
    strings = [
        message | {"content": "".join(f"{IMAGE}\n" if p["type"] == "image" else p["text"] for p in message["content"])}
        for message in CONVERSATIONS["images"]
    ]
    text, _ = render_text(CONVERSATIONS["images"], template, tokenizer)
    assert "<image> " in text
    assert render_text(strings, template, tokenizer)[0] == text


def test_llm_with_only_a_sentencepiece_model(tmp_path: Path) -> None:
    """As published for Vicuna. The pinned versions of sentencepiece and protobuf must be compatible."""
    import sentencepiece

    llm = write_tiny_llm("llama_2", tmp_path / "llm")
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (llm / name).unlink(missing_ok=True)
    write_sentencepiece(llm)
    _, tokenizer = read_llm(str(llm), "auto")
    own = sentencepiece.SentencePieceProcessor(model_file=str(llm / "tokenizer.model"))
    for text in (TEXT, "two  blanks\nnaïve 日本"):
        assert tokenizer(text)["input_ids"] == [own.bos_id(), *own.encode(text)]
