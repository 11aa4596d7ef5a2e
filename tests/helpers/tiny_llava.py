"""A tiny random stock LLaVA, images, and benchmark files, for the tests of evaluation."""

from __future__ import annotations

import io
import random
from collections.abc import Callable
from operator import itemgetter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from PIL import Image

TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{% if m['content'] is string %}{{ m['content'] }}{% else %}"
    "{% for p in m['content'] %}{% if p['type'] == 'image' %}<image>{% else %}{{ p['text'] }}{% endif %}{% endfor %}"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def build_tokenizer() -> Any:
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE(vocab={"</s>": 0, **{c: i + 1 for i, c in enumerate(alphabet)}}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="</s>", pad_token="</s>")
    tokenizer.add_tokens([AddedToken("<image>", special=True, normalized=False)], special_tokens=True)
    return tokenizer


def plain_answer(mllm: Any, images: list[Image.Image], question: str) -> str:
    """Generate with the stock processor and model, one document at a time."""
    content = [*({"type": "image"} for _ in images), {"type": "text", "text": question}]
    prompt = mllm.processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    inputs = mllm.processor(text=prompt, images=images or None, return_tensors="pt")
    with torch.inference_mode():
        out = mllm.model.generate(**inputs, max_new_tokens=6, do_sample=False)
    return str(mllm.processor.tokenizer.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))


def build_tiny_mllm() -> SimpleNamespace:
    """Return an object like that of `load_mllm`, with random weights so large that answers depend on images."""
    from transformers import (
        LlamaConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
        LlavaProcessor,
        SiglipImageProcessor,
        SiglipVisionConfig,
    )

    tokenizer = build_tokenizer()
    vision = SiglipVisionConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=32,
        patch_size=16,
        vision_use_head=False,
    )
    text = LlamaConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        vocab_size=len(tokenizer),
        initializer_range=0.3,
        eos_token_id=0,
        pad_token_id=0,
        bos_token_id=None,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        vision_feature_layer=-2,
        vision_feature_select_strategy="full",
    )
    torch.manual_seed(0)
    model = LlavaForConditionalGeneration(config).eval()
    with torch.no_grad():
        for parameter in model.model.multi_modal_projector.parameters():
            parameter.normal_(std=0.5)
    processor = LlavaProcessor(
        image_processor=SiglipImageProcessor(size={"height": 32, "width": 32}),
        tokenizer=tokenizer,
        patch_size=16,
        vision_feature_select_strategy="full",
        num_additional_image_tokens=0,
        chat_template=TEMPLATE,
    )
    tokenizer.padding_side = "left"
    return SimpleNamespace(model=model, processor=processor, device=torch.device("cpu"))


def make_image(seed: int, size: int = 40) -> Image.Image:
    rng = random.Random(seed)
    image = Image.new("RGB", (size, size), tuple(rng.randrange(256) for _ in range(3)))
    image.paste(tuple(rng.randrange(256) for _ in range(3)), (0, 0, size // 2, rng.randrange(4, size)))
    return image


def make_requests(
    documents: list[tuple[list[Image.Image], str]], model: Any, task: str = "t", *, simple: bool = False
) -> list[Any]:
    """Return lmms-eval requests for (images, question) documents, in chat or simple mode."""
    from lmms_eval.api.instance import Instance

    def doc_to_messages(doc: tuple[list[Image.Image], str]) -> list[dict[str, Any]]:
        content: list[dict[str, Any]] = [{"type": "image", "url": image} for image in doc[0]]
        return [{"role": "user", "content": [*content, {"type": "text", "text": doc[1]}]}]

    model.task_dict[task] = {"test": documents}
    options = {"max_new_tokens": 6, "temperature": 0, "until": ["\n\n"]}
    return [
        Instance(
            request_type="generate_until",
            arguments=(question, dict(options), itemgetter(0), place, task, "test")
            if simple
            else (question, doc_to_messages, dict(options), place, task, "test"),
            idx=0,
            metadata={"task": task, "doc_id": place, "repeats": 1},
        )
        for place, (_, question) in enumerate(documents)
    ]


def png(image: Image.Image) -> dict[str, Any]:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return {"bytes": buffer.getvalue(), "path": None}


def write_parquet(file: Path, rows: list[dict[str, Any]], columns: tuple[str, ...] = ()) -> Path:
    import pyarrow as pa
    import pyarrow.parquet as pq
    from datasets import Features, Value
    from datasets import Image as ImageFeature

    names = list(rows[0]) if rows else list(columns)
    kinds = {name: Value("int64") if name == "index" else Value("string") for name in names}
    schema = Features({**kinds, **({"image": ImageFeature()} if "image" in names else {})}).arrow_schema
    file.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), file)
    return file


def pope_rows(count: int = 6) -> list[dict[str, Any]]:
    return [
        {
            "id": str(n),
            "question_id": str(n),
            "question": f"Is there a thing {'x' * (n % 3)}?",
            "answer": "yes" if n % 2 else "no",
            "image_source": "s",
            "image": png(make_image(n % 3)),
            "category": "random",
        }
        for n in range(count)
    ]


def mmbench_rows() -> list[dict[str, Any]]:
    fixed = {"hint": "nan", "C": "nan", "D": "nan", "category": "c", "L2-category": "l", "source": "s", "split": "dev"}
    return [
        {
            "index": n,
            "question": "What?",
            "answer": "AB"[n % 2],
            "A": "cat",
            "B": "dog",
            "image": png(make_image(n)),
            **fixed,
        }
        for n in range(4)
    ]


def easy_vqa_rows() -> list[dict[str, Any]]:
    kinds = [("open", "red"), ("yes_no", "yes"), ("open", "circle"), ("yes_no", "no")]
    return [
        {
            "question_id": str(n),
            "question": "Q?",
            "answer": a,
            "kind": k,
            "image_id": "1",
            "image": png(make_image(n % 2)),
        }
        for n, (k, a) in enumerate(kinds)
    ]


ROWS: dict[str, Callable[[], list[dict[str, Any]]]] = {
    "clips_pope_random": pope_rows,
    "clips_mmbench": mmbench_rows,
    "clips_easy_vqa": easy_vqa_rows,
}
