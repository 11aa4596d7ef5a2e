"""Every kind of tower and size: build, train a step, save, reload as stock LLaVA; image aspect ratios."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoProcessor,
    BitImageProcessor,
    CLIPConfig,
    CLIPImageProcessor,
    CLIPVisionConfig,
    Dinov2Config,
    Gemma2Config,
    GPT2Config,
    LlavaForConditionalGeneration,
    Siglip2VisionConfig,
    SiglipConfig,
    SiglipImageProcessor,
    SiglipVisionConfig,
    ViTConfig,
)

from clips_mllm.data.collator import InstructionCollator
from clips_mllm.model.build import build_mllm, read_llm
from clips_mllm.model.checkpoint import save_mllm
from clips_mllm.model.processors import image_tokens, set_aspect_ratio
from clips_mllm.model.towers import at_size
from clips_mllm.prompts.chat_template import adopt_template
from clips_mllm.prompts.render import render
from clips_mllm.training.trainer import supervised_loss
from tests.helpers.errors import raises_user_error
from vision_tower.model.positions import interpolate_positions, sincos_positions

SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": 64,
    "patch_size": 16,
}
LLM: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": 100,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": 1,
}
TEXT: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "vocab_size": 100,
    "max_position_embeddings": 16,
}
CONFIGS: dict[str, Any] = {
    "siglip": SiglipConfig(vision_config=SIZES, text_config=TEXT),  # also SigLIP 2 with a fixed size
    "siglip_vision": SiglipVisionConfig(**SIZES),
    "clip": CLIPConfig(vision_config=SIZES, text_config=TEXT),
    "clip_vision": CLIPVisionConfig(**SIZES),
    "vit": ViTConfig(**SIZES),
    "dinov2": Dinov2Config(**(SIZES | {"mlp_ratio": 2})),
}
CLASS_TOKEN = {"clip", "clip_vision", "vit", "dinov2"}


def processor(kind: str) -> Any:
    if kind in ("clip", "clip_vision"):
        return CLIPImageProcessor(size={"shortest_edge": 64}, crop_size={"height": 64, "width": 64})
    if kind == "dinov2":
        return BitImageProcessor(size={"shortest_edge": 72}, crop_size={"height": 64, "width": 64})
    return SiglipImageProcessor(size={"height": 64, "width": 64})


@pytest.fixture(scope="module")
def towers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    found = {}
    for kind, config in CONFIGS.items():
        torch.manual_seed(0)
        folder = tmp_path_factory.mktemp(kind)
        AutoModel.from_config(config).save_pretrained(folder)
        processor(kind).save_pretrained(folder)
        found[kind] = str(folder)
    return found


def build(tower: str, sample_world: Path, **values: Any) -> Any:
    options: dict[str, Any] = {"feature_layer": -2, "feature_select": "auto", "dtype": torch.float32} | values
    torch.manual_seed(0)
    return build_mllm(tower, str(sample_world / "llm"), **options)


@pytest.mark.parametrize(
    ("kind", "values"),
    [
        *((kind, {}) for kind in CONFIGS),
        ("clip", {"feature_select": "full"}),
        ("siglip", {"feature_layer": [-2, -3]}),
        ("clip", {"feature_layer": [-2, 1], "image_size": 96}),
        ("siglip", {"image_size": 96}),
        ("vit", {"image_size": 32}),
        ("dinov2", {"image_size": 96}),
    ],
)
def test_build_train_save_reload(
    kind: str, values: dict[str, Any], towers: dict[str, str], sample_world: Path, tmp_path: Path
) -> None:
    model, processor = build(towers[kind], sample_world, **values)
    template = adopt_template(processor, "chatml", model)
    side = values.get("image_size", 64) // 16
    count = side**2 + (values.get("feature_select") == "full" and kind in CLASS_TOKEN)
    assert image_tokens(processor) == count
    talk = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What?"}]},
        {"role": "assistant", "content": "A cat."},
    ]
    sample = render(talk, template=template, tokenizer=processor.tokenizer, image_tokens=count, max_length=999)
    image = Image.effect_noise((90, 50), 60).convert("RGB")
    batch = InstructionCollator(processor)([{"ids": sample.ids, "labels": sample.labels, "images": [image]}])
    layers = values.get("feature_layer", -2)
    assert model.model.multi_modal_projector.linear_1.in_features == 32 * (len(layers) if layers != -2 else 1)
    summed, _ = supervised_loss(model, model, batch)
    summed.backward()
    assert model.model.multi_modal_projector.linear_1.weight.grad.abs().sum() > 0
    with torch.no_grad():
        for parameter in model.model.multi_modal_projector.parameters():
            parameter -= 0.1 * parameter.grad
        after = supervised_loss(model, model, batch)[0]
    assert after < summed
    save_mllm(model, processor, tmp_path)
    stock, info = LlavaForConditionalGeneration.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    with torch.no_grad():
        torch.testing.assert_close(supervised_loss(stock.eval(), stock, batch)[0], after)
    used = AutoProcessor.from_pretrained(tmp_path)(text="<image>", images=[image], return_tensors="pt")
    assert used["input_ids"][0].tolist() == [processor.image_token_id] * count
    torch.testing.assert_close(used["pixel_values"], batch["pixel_values"])


def test_vision_tower_of_a_two_tower_checkpoint(towers: dict[str, str], sample_world: Path) -> None:
    whole = AutoModel.from_pretrained(towers["clip"])
    model, _ = build(towers["clip"], sample_world)
    wanted = whole.vision_model.state_dict()
    found = model.model.vision_tower.state_dict()
    assert set(found) == set(wanted)
    assert all(torch.equal(found[name], value) for name, value in wanted.items())


@pytest.mark.parametrize("kind", ["siglip_vision", "clip_vision", "vit", "dinov2"])
@pytest.mark.parametrize("fixed", [True, False])
def test_resized_positions(kind: str, fixed: bool, towers: dict[str, str]) -> None:
    """Sin-cos positions are recomputed, learned ones interpolated; other weights do not change."""
    tower = AutoModel.from_pretrained(towers[kind])
    classed = kind in CLASS_TOKEN
    name, table = next((name, p) for name, p in tower.named_parameters() if "position_embedding" in name)
    if fixed:
        table.data.copy_(sincos_positions(4, 32, classed).view_as(table))
    resized = at_size(tower, 96)
    assert resized.config.image_size == 96 and tower.config.image_size == 64
    found = dict(resized.named_parameters())[name].detach().flatten(end_dim=-2)
    old = table.detach().flatten(end_dim=-2)
    wanted = sincos_positions(6, 32, classed) if fixed else interpolate_positions(old, 6, classed)
    torch.testing.assert_close(found, wanted)
    for other, value in tower.state_dict().items():
        assert other == name or torch.equal(resized.state_dict()[other], value)
    assert at_size(tower, 64) is tower


def test_resizing_a_tower_of_this_project(encoder_dir: Path, sample_world: Path) -> None:
    """Its sin-cos positions are recomputed."""
    model, processor = build(str(encoder_dir / "tower"), sample_world, image_size=128)
    table = model.model.vision_tower.embeddings.position_embedding.weight
    torch.testing.assert_close(table.detach(), sincos_positions(4, 32))
    assert image_tokens(processor) == 16


def test_unsupported_towers_and_options(towers: dict[str, str], sample_world: Path, tmp_path: Path) -> None:
    with raises_user_error(key="model.image_size", value=50):
        build(towers["vit"], sample_world, image_size=50)
    with raises_user_error(key="model.feature_select", value="default"):
        build(towers["siglip"], sample_world, feature_select="default")
    naflex = Siglip2VisionConfig(**{**SIZES, "num_patches": 16})
    AutoModel.from_config(naflex).save_pretrained(tmp_path)
    processor("vit").save_pretrained(tmp_path)
    with raises_user_error(file=tmp_path):
        build(str(tmp_path), sample_world)
    with raises_user_error(file=sample_world / "llm"):
        build(str(sample_world / "llm"), sample_world)


@pytest.mark.parametrize(
    ("config", "key"),
    [
        (Gemma2Config(**LLM, head_dim=16), "final_logit_softcapping"),
        (GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=100), "architectures"),
        (SiglipVisionConfig(**SIZES), "model_type"),
    ],
)
def test_unsupported_llms(config: Any, key: str, tmp_path: Path) -> None:
    """Stock LLaVA would load all weights of Gemma 2 and compute other logits."""
    kind = AutoModel if isinstance(config, SiglipVisionConfig) else AutoModelForCausalLM
    kind.from_config(config).save_pretrained(tmp_path)
    with raises_user_error(file=tmp_path, key=key):
        read_llm(str(tmp_path), "auto")


@pytest.mark.parametrize("ratio", ["squash", "pad", "crop"])
def test_aspect_ratio_of_a_clip_processor(ratio: Any, towers: dict[str, str], sample_world: Path) -> None:
    """A 2:1 image with a red left and a blue right end; this processor crops by default."""
    image = Image.new("RGB", (128, 64), (0, 255, 0))
    image.paste((255, 0, 0), (0, 0, 16, 64))
    image.paste((0, 0, 255), (112, 0, 128, 64))
    _, given = build(towers["clip"], sample_world)
    set_aspect_ratio(given, ratio)
    own = given.image_processor
    pixels = torch.as_tensor(own(images=[image], return_tensors="pt")["pixel_values"])[0]
    assert pixels.shape == (3, 64, 64)
    mean, std = torch.tensor(own.image_mean).view(3, 1, 1), torch.tensor(own.image_std).view(3, 1, 1)
    seen = (pixels * std + mean).clamp(0, 1)
    left, middle, top = seen[:, 32, 1], seen[:, 32, 32], seen[:, 2, 32]
    assert middle[1] > 0.9
    if ratio == "crop":
        assert left[1] > 0.9, "the ends are cut off"
    else:
        assert left[0] > 0.9, "the ends are seen"
    padded = (top - mean.flatten()).abs().max() < 0.02
    assert padded == (ratio == "pad")
    assert image_tokens(given) == 16
