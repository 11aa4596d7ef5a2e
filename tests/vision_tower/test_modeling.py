"""The pretraining model against naive references and the stock classes."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModel, SiglipTextModel, ViTModel

from vision_tower.checkpoints.encoder import Encoder, load_encoder
from vision_tower.common.errors import UserError
from vision_tower.model.config import ClipsConfig
from vision_tower.model.modeling import MAX_SCALE, ClipsModel
from vision_tower.model.positions import sincos_positions
from vision_tower.training.model_tools import parameter_groups

VISION = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "intermediate_size": 32,
    "num_attention_heads": 2,
    "image_size": 24,
    "patch_size": 8,
    "layer_norm_eps": 1e-6,
    "hidden_act": "gelu",
}
TOWERS = {
    "patches only": VISION | {"vision_use_head": False},
    "class token": VISION | {"model_type": "vit"},
}
TEXT = {
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "intermediate_size": 32,
    "num_attention_heads": 2,
    "max_position_embeddings": 7,
    "vocab_size": 50,
    "projection_size": 12,
}


CAPTIONER: dict[str, Any] = {
    "captioner_width": 16,
    "captioner_layers": 2,
    "captioner_heads": 2,
    "captioner_mlp": 32,
    "captioner_queries": 6,
}


def build(tower: str = "patches only", **options: Any) -> ClipsModel:
    torch.manual_seed(0)
    config = ClipsConfig(
        vision_config=TOWERS[tower],
        **{"text_config": TEXT} | CAPTIONER | options,
        projection_dim=12,
    )
    return ClipsModel.from_scratch(config).eval()


@pytest.fixture(params=TOWERS)
def model(request: pytest.FixtureRequest) -> ClipsModel:
    return build(request.param)


def inputs(batch: int = 3) -> dict[str, torch.Tensor]:
    torch.manual_seed(1)
    return {
        "pixel_values": torch.randn(batch, 3, 24, 24),
        "web_ids": torch.randint(0, 50, (batch, 7)),
        "sub_ids": torch.randint(0, 50, (batch, 7)),
        "labels": torch.randint(0, 50, (batch, 6)),
    }


def naive_positions(side: int, width: int) -> torch.Tensor:
    """Compute MoCo v3's build_2d_sincos_position_embedding element by element."""
    quarter = width // 4
    rows = []
    for y in range(side):
        for x in range(side):
            omegas = [1.0 / 10000 ** (i / (quarter - 1)) for i in range(quarter)]
            row = [math.sin(x * omega) for omega in omegas] + [math.cos(x * omega) for omega in omegas]
            row += [math.sin(y * omega) for omega in omegas] + [math.cos(y * omega) for omega in omegas]
            rows.append(row)
    return torch.tensor(rows)


@pytest.mark.parametrize(("side", "width"), [(3, 16), (7, 128), (16, 8)])
def test_sincos_positions(side: int, width: int) -> None:
    torch.testing.assert_close(sincos_positions(side, width), naive_positions(side, width), atol=1e-6, rtol=0)


def patch_positions(model: ClipsModel) -> torch.Tensor:
    """Return the positions of the patches; that of a class token must be zero."""
    tower = model.vision_model
    if not isinstance(tower, ViTModel):
        return tower.embeddings.position_embedding.weight
    assert not tower.embeddings.position_embeddings[0, 0].any()
    return tower.embeddings.position_embeddings[0, 1:]


def test_unused_parameters_stay_fixed_in_training(model: ClipsModel) -> None:
    before = {name: value.clone() for name, value in model.named_parameters()}
    optimizer = torch.optim.AdamW(parameter_groups(model, 0.5), lr=0.1)
    out = model(**inputs())
    (out.image.sum() + out.texts["web"].sum() + out.texts["sub"].sum() + out.scale + out.caption_sum).backward()
    optimizer.step()
    torch.testing.assert_close(patch_positions(model), naive_positions(3, 16), atol=1e-6, rtol=0)
    frozen = {name for name, value in model.named_parameters() if torch.equal(value, before[name])}
    embeddings = "vision_model.embeddings."
    expected = {embeddings + "patch_embedding.bias", embeddings + "position_embedding.weight"}
    if isinstance(model.vision_model, ViTModel):
        expected = {embeddings + "patch_embeddings.projection.bias", embeddings + "position_embeddings"}
        expected |= {"vision_model.pooler.dense.weight", "vision_model.pooler.dense.bias"}
    assert frozen == expected | {"text_model.head.bias"}
    assert all(not before[name].any() for name in frozen if not name.startswith(embeddings + "position"))


@pytest.mark.parametrize("tower", TOWERS)
def test_learned_positions_are_initialized_as_sincos_and_trained(tower: str) -> None:
    model = build(tower, positions="learned")
    torch.testing.assert_close(patch_positions(model), naive_positions(3, 16), atol=1e-6, rtol=0)
    model.embed_images(inputs()["pixel_values"])[:, 0].sum().backward()
    position = [value for name, value in model.vision_model.named_parameters() if "position" in name]
    assert len(position) == 1 and position[0].grad is not None and position[0].grad.any()
    assert all(position[0] is not value for value in parameter_groups(model, 0.2)[0]["params"])


def test_model_without_captioner() -> None:
    whole, bare = build(), build(captioner_layers=0)
    assert not [name for name in bare.state_dict() if name.startswith("captioner")]
    bare.load_state_dict({name: value for name, value in whole.state_dict().items() if name in bare.state_dict()})
    with torch.no_grad():
        given = {name: value for name, value in inputs().items() if name != "labels"}
        first, second = whole(**inputs()), bare(**given)
    assert first.caption_sum is not None and second.caption_sum is None and torch.equal(first.image, second.image)


def padded_texts(length: int, count: int = 3) -> torch.Tensor:
    """Return texts of 1, 2, ... tokens in the contrastive layout, padded with 0 to `length`."""
    rows = [[1, *range(10, 11 + row), 2] for row in range(count)]
    return torch.tensor([row + [0] * (length - 1 - len(row)) + [3] for row in rows])


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_embeddings_do_not_depend_on_masked_padding(attention: str, precision: str) -> None:
    """Trimmed batches have equal embeddings and losses; with attended padding they would differ."""
    text = TEXT | {"pad_token_id": 0}
    given = inputs()
    whole, trimmed = ({**given, "web_ids": padded_texts(n), "sub_ids": padded_texts(n).flip(0)} for n in (7, 6))
    masking, attending = (build(text_config=text, padding=kind) for kind in ("masked", "attended"))
    for some in (masking, attending):
        some.set_attn_implementation(attention)
        with torch.no_grad():
            for value in some.text_model.encoder.parameters():
                value.mul_(4)  # initial weights attend so evenly that bf16 rounding would hide the effect of padding
    close = 1e-6 if precision == "fp32" else 0.02
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
        first, second = masking(**whole), masking(**trimmed)
        alone = masking.embed_texts(padded_texts(7)[:1])
        other = attending.embed_texts(padded_texts(7)) - attending.embed_texts(padded_texts(6))
    for stream in ("web", "sub"):
        torch.testing.assert_close(first.texts[stream], second.texts[stream], atol=close, rtol=0)
    torch.testing.assert_close(first.caption_sum, second.caption_sum, atol=1e-4, rtol=close)
    torch.testing.assert_close(alone, first.texts["web"][:1], atol=close, rtol=0)
    assert other.abs().max() > 3 * close


def test_only_weight_matrices_have_weight_decay(model: ClipsModel) -> None:
    decayed, kept = (group["params"] for group in parameter_groups(model, 0.2))
    names = {id(value): name for name, value in model.named_parameters()}
    assert len(decayed) + len(kept) == sum(value.requires_grad for value in model.parameters())
    assert all(value.ndim >= 2 for value in decayed)
    whole = {names[id(value)] for value in kept if value.ndim >= 2}
    images = {name for name in whole if name.startswith("vision_model")}
    classed = isinstance(model.vision_model, ViTModel)
    assert images == ({"vision_model.embeddings.cls_token"} if classed else set())
    assert whole - images == {
        "captioner.queries",
        "text_model.embeddings.token_embedding.weight",
        "text_model.embeddings.position_embedding.weight",
    }


def test_logit_scale_is_initialized_as_published_and_clamped(model: ClipsModel) -> None:
    assert model(**inputs()).scale.item() == pytest.approx(1 / 0.07, rel=1e-5)
    with torch.no_grad():
        model.logit_scale.fill_(9.0)
    assert model(**inputs()).scale.item() == pytest.approx(MAX_SCALE)


def test_image_embeddings_equal_those_of_the_stock_tower(model: ClipsModel, tmp_path: Path) -> None:
    model.vision_model.save_pretrained(tmp_path)
    stock, info = AutoModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    pixels = inputs()["pixel_values"]
    with torch.no_grad():
        hidden = stock.eval()(pixels, output_hidden_states=True).hidden_states[-1]
        classed = isinstance(stock, ViTModel)
        patches, norm = (hidden[:, 1:], stock.layernorm) if classed else (hidden, stock.post_layernorm)
        pooled = norm(patches.mean(dim=1)) @ model.visual_projection.weight.T
        ours = model.embed_images(pixels)
    torch.testing.assert_close(model.patches(pixels), patches, atol=1e-6, rtol=0)
    torch.testing.assert_close(ours, pooled / pooled.norm(dim=-1, keepdim=True), atol=1e-6, rtol=0)


def test_text_embeddings_equal_those_of_the_stock_tower(model: ClipsModel, tmp_path: Path) -> None:
    model.text_model.save_pretrained(tmp_path)
    stock = SiglipTextModel.from_pretrained(tmp_path).eval()
    ids = inputs()["web_ids"]
    with torch.no_grad():
        pooled = stock(input_ids=ids).pooler_output
        ours = model.embed_texts(ids)
    torch.testing.assert_close(ours, pooled / pooled.norm(dim=-1, keepdim=True), atol=1e-6, rtol=0)
    swapped = ids.clone()
    swapped[:, 0] = (ids[:, 0] + 1) % 50  # bidirectional: the last position attends to the first
    assert (model.embed_texts(swapped) - ours).abs().max() > 1e-5


def test_saved_model_loads_with_equal_outputs(model: ClipsModel, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path)
    loaded, info = ClipsModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    with torch.no_grad():
        first, second = model(**inputs()), loaded.eval()(**inputs())
    for name in ("image", "scale", "caption_sum"):
        assert torch.equal(getattr(first, name), getattr(second, name)), name
    assert all(torch.equal(first.texts[stream], second.texts[stream]) for stream in ("web", "sub"))
    trainable = {name for name, value in model.named_parameters() if value.requires_grad}
    assert {name for name, value in loaded.named_parameters() if value.requires_grad} == trainable


def test_gradient_checkpointing_keeps_gradients(model: ClipsModel) -> None:
    def gradients() -> dict[str, torch.Tensor]:
        model.zero_grad()
        out = model.train()(**inputs())
        (out.image[0] @ out.texts["web"][1] + out.caption_sum / 10).backward()
        return {name: value.grad.clone() for name, value in model.named_parameters() if value.grad is not None}

    plain = gradients()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    for name, value in gradients().items():
        torch.testing.assert_close(value, plain[name], atol=1e-6, rtol=1e-5)


FRESH = """
import json, sys
import torch
from PIL import Image
from transformers import AutoImageProcessor, SiglipVisionModel
model, info = SiglipVisionModel.from_pretrained(sys.argv[1], output_loading_info=True)
pixels = AutoImageProcessor.from_pretrained(sys.argv[1])(images=Image.open(sys.argv[2]), return_tensors="pt")
with torch.no_grad():
    hidden = model(**pixels, output_hidden_states=True).hidden_states[-1]
assert not any(name.split(".")[0] in ("vision_tower", "clips_mllm", "clips_eval") for name in sys.modules)
bad = {kind: sorted(map(str, info[kind])) for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")}
print(json.dumps({"bad": bad, "mean": hidden.mean(dim=1)[0].tolist()}))
"""


def test_saved_tower_loads_without_this_project(encoder_dir: Path, sample_world: Path, tmp_path: Path) -> None:
    import json

    from PIL import Image

    image = sorted((sample_world / "retrieval" / "images").glob("test-*.png"))[0]
    words = [sys.executable, "-c", FRESH, str(encoder_dir / "tower"), str(image)]
    run = subprocess.run(words, capture_output=True, text=True, cwd=tmp_path, env=_without_project(), check=False)
    assert run.returncode == 0, run.stderr
    answer = json.loads(run.stdout)
    assert answer["bad"] == {"missing_keys": [], "unexpected_keys": [], "mismatched_keys": []}
    encoder = load_encoder(encoder_dir, "cpu")
    with torch.no_grad():
        pixels = encoder.processor(images=Image.open(image), return_tensors="pt")["pixel_values"]
        ours = encoder.model.patches(pixels).mean(dim=1)[0]
    torch.testing.assert_close(torch.tensor(answer["mean"]), ours, atol=1e-5, rtol=0)


def _without_project() -> dict[str, str]:
    import os

    return {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}


def test_embeddings_do_not_depend_on_the_batch(encoder_dir: Path, sample_world: Path) -> None:
    from PIL import Image

    encoder: Encoder = load_encoder(encoder_dir, "cpu")
    files = sorted((sample_world / "retrieval" / "images").glob("test-*.png"))[:3]
    photos = [Image.open(file) for file in files]
    texts = ["a dog", "", "a very long caption " * 50]
    images, words = encoder.embed_images(photos), encoder.embed_texts(texts)
    assert images.dtype == words.dtype == torch.float32
    torch.testing.assert_close(torch.cat([images, words]).norm(dim=1), torch.ones(6), atol=1e-5, rtol=0)
    for index in range(3):
        torch.testing.assert_close(encoder.embed_images(photos[index : index + 1])[0], images[index])
        torch.testing.assert_close(encoder.embed_texts(texts[index : index + 1])[0], words[index])


def test_encoder_with_masked_padding_trims_texts(encoder_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    encoder = load_encoder(encoder_dir, "cpu")
    texts, lengths = ["a dog", "", "a dog on a pink background"], []
    words = encoder.model.words
    monkeypatch.setattr(encoder.model, "words", lambda ids: (lengths.append(ids.shape[1]), words(ids))[1])
    encoder.embed_texts(texts)
    encoder.model.config.padding = "masked"
    trimmed = encoder.embed_texts(texts)
    room = encoder.model.config.text_config.max_position_embeddings
    whole = encoder.model.embed_texts(encoder.tokenizer.contrastive(texts, room))
    assert lengths[0] == lengths[2] == room > lengths[1] and encoder.embed_texts(["word " * 500]).isfinite().all()
    torch.testing.assert_close(trimmed, whole, atol=1e-6, rtol=0)


def test_damaged_encoder_is_refused(encoder_dir: Path, tmp_path: Path) -> None:
    import shutil

    from safetensors.torch import load_file, save_file

    with pytest.raises(UserError, match=r"config\.json: "):
        load_encoder(tmp_path)
    folder = tmp_path / "damaged"
    shutil.copytree(encoder_dir, folder)
    weights = load_file(folder / "model.safetensors")
    weights.pop("captioner.queries")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"1 missing key \(first: captioner\.queries\)"):
        load_encoder(folder)
