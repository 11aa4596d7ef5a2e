"""Conversion of original LLaVA checkpoints with random weights, compared with a hand-written LLaVA forward pass."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPTextConfig,
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaNextConfig,
)

from clips_mllm.convert import main
from clips_mllm.model.build import build_mllm
from clips_mllm.model.checkpoint import load_mllm, save_mllm
from clips_mllm.model.processors import set_aspect_ratio
from tests.helpers.errors import raises_user_error
from vision_tower.common.errors import UserError
from vision_tower.common.provenance import read_provenance

SIDE, PATCH, WIDTH = 56, 14, 48
CHATML = ("--template", "chatml")  # that of the tokenizer in these tests
IMAGE = -200  # id of the image in the original code


class Original:
    """Parts of an original checkpoint, and LLaVA's forward pass: encode the image, insert it, and run the LLM."""

    def __init__(self, llm: Path) -> None:
        torch.manual_seed(0)
        self.llm: LlamaForCausalLM = AutoModelForCausalLM.from_pretrained(llm, dtype=torch.float32)
        for value in self.llm.parameters():  # large enough that every part affects the logits
            nn.init.normal_(value, std=0.2)
        vision = CLIPVisionConfig(
            hidden_size=WIDTH,
            intermediate_size=64,
            num_hidden_layers=3,
            num_attention_heads=4,
            image_size=SIDE,
            patch_size=PATCH,
        )
        text = CLIPTextConfig(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
        self.clip = CLIPModel(CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict())).eval()
        for value in self.clip.vision_model.parameters():
            nn.init.normal_(value, std=0.2)
        self.tower = CLIPVisionModel(vision).eval()
        self.tower.load_state_dict(self.clip.vision_model.state_dict())
        hidden = self.llm.config.hidden_size
        self.projector = nn.Sequential(nn.Linear(WIDTH, hidden), nn.GELU(), nn.Linear(hidden, hidden))

    @torch.no_grad()
    def logits(self, ids: list[int], pixels: torch.Tensor) -> torch.Tensor:
        """Return logits (tokens, vocabulary) with the image's features at the position of `IMAGE`."""
        features = self.tower(pixels, output_hidden_states=True).hidden_states[-2][:, 1:]
        index = ids.index(IMAGE)
        embed = self.llm.get_input_embeddings()
        words = [embed(torch.tensor(part)) for part in (ids[:index], ids[index + 1 :])]
        return self.llm(inputs_embeds=torch.cat([words[0], self.projector(features)[0], words[1]])[None]).logits[0]

    def projector_state(self) -> dict[str, torch.Tensor]:
        return {f"model.mm_projector.{name}": value.detach() for name, value in self.projector.state_dict().items()}

    def tower_state(self) -> dict[str, torch.Tensor]:
        prefix = "model.vision_tower.vision_tower.vision_model."
        state = {f"{prefix}{name}": value for name, value in self.tower.state_dict().items()}
        return state | {f"{prefix}embeddings.position_ids": torch.arange(17)[None]}


@pytest.fixture(scope="module")
def original(sample_world: Path) -> Original:
    return Original(sample_world / "llm")


@pytest.fixture(scope="module")
def clip(original: Original, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Both towers of CLIP in one folder, as on the hub."""
    folder = tmp_path_factory.mktemp("clip")
    original.clip.save_pretrained(folder)
    CLIPImageProcessor(size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE}).save_pretrained(folder)
    return folder


def write_config(folder: Path, original: Original, tower: Path, **changes: Any) -> None:
    values = original.llm.config.to_dict() | {
        "architectures": ["LlavaLlamaForCausalLM"],
        "model_type": "llava_llama",
        "mm_hidden_size": WIDTH,
        "mm_vision_tower": str(tower),
        "mm_vision_select_layer": -2,
        "mm_vision_select_feature": "patch",
        "mm_projector_type": "mlp2x_gelu",
        "mm_use_im_start_end": False,
        "mm_use_im_patch_token": False,
        "tune_mm_mlp_adapter": False,
        "image_aspect_ratio": "pad",
        "use_mm_proj": True,
    }
    (folder / "config.json").write_text(json.dumps(values | changes))


@pytest.fixture
def full(original: Original, clip: Path, sample_world: Path, tmp_path: Path) -> Path:
    """LlavaLlamaForCausalLM in two pickled shards with an index, as LLaVA-1.5 was published."""
    folder = tmp_path / "llava"
    folder.mkdir()
    state = {name: value.detach() for name, value in original.llm.state_dict().items()}
    width = original.llm.config.hidden_size // original.llm.config.num_attention_heads
    for layer in range(original.llm.config.num_hidden_layers):
        frequencies = 1e4 ** -(torch.arange(0, width, 2) / width)
        state[f"model.layers.{layer}.self_attn.rotary_emb.inv_freq"] = frequencies.half()
    shards = {"pytorch_model-00001-of-00002.bin": state}
    shards["pytorch_model-00002-of-00002.bin"] = original.projector_state() | original.tower_state()
    for name, weights in shards.items():
        torch.save(weights, folder / name)
    names = {weight: file for file, weights in shards.items() for weight in weights}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": names}))
    write_config(folder, original, clip)
    AutoTokenizer.from_pretrained(sample_world / "llm").save_pretrained(folder)
    return folder


def compare(folder: Path, original: Original) -> None:
    """Assert that the stock checkpoint in `folder` has the logits of the original."""
    mllm = load_mllm(folder, device="cpu", dtype="float32")
    photo = Image.effect_noise((SIDE, SIDE), 90).convert("RGB")
    text = "What is <image> here?"
    batch = mllm.processor(text=text, images=[photo], return_tensors="pt")
    with torch.no_grad():
        found = mllm.model(**batch).logits[0]
    image, patches = mllm.processor.image_token_id, (SIDE // PATCH) ** 2
    ids = batch["input_ids"][0].tolist()
    assert ids.count(image) == patches
    index = ids.index(image)
    wanted = original.logits([*ids[:index], IMAGE, *ids[index + patches :]], batch["pixel_values"])
    assert wanted.std() > 0.1
    torch.testing.assert_close(found[:, : wanted.shape[1]], wanted, rtol=1e-4, atol=1e-4)
    assert "<|im_start|>" in mllm.processor.chat_template
    ends = mllm.model.generation_config.eos_token_id
    end = mllm.tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert end in (ends if isinstance(ends, list) else [ends]), "answers end where the template's do"


def test_template_of_another_tokenizer_is_refused(full: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--template=vicuna_v1"):
        main([str(full), str(tmp_path / "out"), "--to", "llava"])
    assert not (tmp_path / "out").exists()


def test_full_checkpoint(full: Path, original: Original, tmp_path: Path) -> None:
    main([str(full), str(tmp_path / "out"), "--to", "llava", *CHATML])
    compare(tmp_path / "out", original)
    provenance = read_provenance(tmp_path / "out")
    assert provenance["made_by"] == "convert" and provenance["inputs"]["source"]["name"] == str(full)
    assert "model.safetensors" in provenance["outputs"]
    assert json.loads((tmp_path / "out" / "processor_config.json").read_text())["image_processor"]["do_pad"]


def test_full_checkpoint_with_the_tower_in_its_own_folder(full: Path, original: Original, tmp_path: Path) -> None:
    file = full / "pytorch_model-00002-of-00002.bin"
    torch.save(original.projector_state(), file)
    main([str(full), str(tmp_path / "out"), "--to", "llava", *CHATML])
    compare(tmp_path / "out", original)


@pytest.fixture
def lora(original: Original, clip: Path, sample_world: Path, tmp_path: Path) -> tuple[Path, Original]:
    """A LoRA folder of the original code, and the equivalent merged original."""
    from peft import LoraConfig, get_peft_model

    base, folder = tmp_path / "base", tmp_path / "llava-lora"
    original.llm.save_pretrained(base)
    AutoTokenizer.from_pretrained(sample_world / "llm").save_pretrained(base)
    trained = Original(sample_world / "llm")
    trained.llm.load_state_dict(original.llm.state_dict())
    trained.tower, trained.projector = original.tower, nn.Sequential(*map(_another, original.projector))
    names = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    options = LoraConfig(r=4, lora_alpha=8, target_modules=names, lora_dropout=0.05, task_type="CAUSAL_LM")
    adapted = get_peft_model(trained.llm, options)
    for name, value in adapted.named_parameters():
        if "lora_" in name:
            nn.init.normal_(value, std=0.1)
    adapted.save_pretrained(folder, safe_serialization=True)
    settings = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(settings | {"base_model_name_or_path": str(base)}))
    state = {f"base_model.model.{name}": value for name, value in trained.projector_state().items()}
    torch.save(state, folder / "non_lora_trainables.bin")
    write_config(folder, original, clip)
    trained.llm = adapted.merge_and_unload()
    return folder, trained


def _another(layer: nn.Module) -> nn.Module:
    return nn.Linear(layer.in_features, layer.out_features) if isinstance(layer, nn.Linear) else layer


def test_lora_folder(lora: tuple[Path, Original], tmp_path: Path) -> None:
    folder, trained = lora
    main([str(folder), str(tmp_path / "out"), "--to", "llava", *CHATML])
    compare(tmp_path / "out", trained)


def test_projector_converts_both_ways(original: Original, clip: Path, sample_world: Path, tmp_path: Path) -> None:
    given = tmp_path / "stage1"
    given.mkdir()
    torch.save(original.projector_state(), given / "mm_projector.bin")
    original.llm.save_pretrained(tmp_path / "llm")
    AutoTokenizer.from_pretrained(sample_world / "llm").save_pretrained(tmp_path / "llm")
    parts = ["--llm", str(tmp_path / "llm"), "--tower", str(clip)]
    main([str(given / "mm_projector.bin"), str(tmp_path / "stock"), "--to", "llava", *CHATML, *parts])
    compare(tmp_path / "stock", original)
    main([str(tmp_path / "stock"), str(tmp_path / "back"), "--to", "llava_projector", "--tower", str(clip)])
    back = torch.load(tmp_path / "back" / "mm_projector.bin", weights_only=True)
    assert back.keys() == original.projector_state().keys()
    assert all(torch.equal(back[name], value) for name, value in original.projector_state().items())
    main([str(tmp_path / "back"), str(tmp_path / "again"), "--to", "llava", *CHATML, *parts[:2]])
    compare(tmp_path / "again", original)


@pytest.mark.parametrize("image_aspect_ratio", ["pad", "crop"])
def test_image_aspect_ratio_converts_both_ways(
    image_aspect_ratio: Any, original: Original, clip: Path, sample_world: Path, tmp_path: Path
) -> None:
    original.llm.save_pretrained(tmp_path / "llm")
    AutoTokenizer.from_pretrained(sample_world / "llm").save_pretrained(tmp_path / "llm")
    model, processor = build_mllm(
        str(clip), str(tmp_path / "llm"), feature_layer=-2, feature_select="auto", dtype=torch.float32
    )
    set_aspect_ratio(processor, image_aspect_ratio)
    save_mllm(model, processor, tmp_path / "stock")
    main([str(tmp_path / "stock"), str(tmp_path / "out"), "--to", "llava_projector", "--tower", str(clip)])
    main([str(tmp_path / "out"), str(tmp_path / "again"), "--to", "llava", "--llm", str(tmp_path / "llm"), *CHATML])
    again = load_mllm(tmp_path / "again", device="cpu").processor.image_processor
    image = Image.linear_gradient("L").resize((90, 40)).convert("RGB")
    pixels = [one(images=image, return_tensors="pt")["pixel_values"] for one in (again, processor.image_processor)]
    assert torch.equal(*pixels)


# --- refused --------------------------------------------------------------------------------------------------------


def change(folder: Path, rename: dict[str, str] | None = None, **tensors: torch.Tensor) -> None:
    file = folder / "pytorch_model-00002-of-00002.bin"
    state = torch.load(file, weights_only=True) | tensors
    for old, new in (rename or {}).items():
        state[new] = state.pop(old)
    torch.save(state, file)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("mm_projector_type", "linear"),
        ("mm_use_im_start_end", True),
        ("mm_patch_merge_type", "spatial"),
        ("image_aspect_ratio", "anyres"),
        ("mm_hidden_act", "x"),
        ("model_type", "llama"),
    ],
)
def test_config_fields_without_stock_equivalent_are_refused(
    full: Path, original: Original, clip: Path, tmp_path: Path, field: str, value: Any
) -> None:
    write_config(full, original, clip, **{field: value})
    with raises_user_error(file=full / "config.json", key=field, value=value):
        main([str(full), str(tmp_path / "out"), "--to", "llava"])
    assert not list(tmp_path.glob("*out*"))


def test_config_without_vision_tower_needs_the_option(
    full: Path, original: Original, clip: Path, tmp_path: Path
) -> None:
    write_config(full, original, clip, mm_vision_tower=None)
    with raises_user_error(file=full, key="--tower"):
        main([str(full), str(tmp_path / "out"), "--to", "llava"])


def test_every_weight_is_used_or_refused(full: Path, original: Original, tmp_path: Path) -> None:
    def refused(file: Path, key: str | None, contains: str = "") -> None:
        with raises_user_error(file=file, key=key) as caught:
            main([str(full), str(tmp_path / "out"), "--to", "llava"])
        assert contains in caught.value.problem

    shard = full / "pytorch_model-00002-of-00002.bin"
    change(full, **{"model.image_newline": torch.zeros(4)})
    refused(full, "model.image_newline")
    state = original.projector_state() | {"model.norm2.weight": torch.zeros(4)}
    torch.save(state, full / "pytorch_model-00002-of-00002.bin")
    refused(full, None, "model.norm2.weight")
    torch.save(original.tower_state(), full / "pytorch_model-00002-of-00002.bin")
    refused(shard, "projector.linear_1.bias")
    short = original.projector_state()
    short["model.mm_projector.0.weight"] = torch.zeros(64, WIDTH + 1)
    torch.save(short, full / "pytorch_model-00002-of-00002.bin")
    refused(full, "projector.linear_1.weight", "(64, 49)")
    torch.save({"model.mm_projector.4.weight": torch.zeros(1)}, full / "pytorch_model-00002-of-00002.bin")
    refused(shard, "model.mm_projector.4.weight")
    (full / "pytorch_model-00002-of-00002.bin").unlink()
    refused(shard, None, "pytorch_model.bin.index.json")


def test_rotary_frequencies_of_another_model_are_refused(full: Path, original: Original, tmp_path: Path) -> None:
    state = original.projector_state() | {"model.layers.9.self_attn.rotary_emb.inv_freq": torch.ones(8)}
    torch.save(state, full / "pytorch_model-00002-of-00002.bin")
    with raises_user_error(file=full, key="model.layers.9.self_attn.rotary_emb.inv_freq"):
        main([str(full), str(tmp_path / "out"), "--to", "llava"])


def test_incomplete_lora_is_refused(lora: tuple[Path, Original], tmp_path: Path) -> None:
    folder, _ = lora
    with raises_user_error(file=folder / "non_lora_trainables.bin", key="--llm"):
        main([str(folder / "non_lora_trainables.bin"), str(tmp_path / "out"), "--to", "llava"])
    broken = tmp_path / "broken"
    shutil.copytree(folder, broken)
    from safetensors.torch import load_file, save_file

    weights = load_file(folder / "adapter_model.safetensors")
    removed = sorted(weights)[0]
    save_file({name: value for name, value in weights.items() if name != removed}, broken / "adapter_model.safetensors")
    with raises_user_error(file=broken / "adapter_model.safetensors") as caught:
        main([str(broken), str(tmp_path / "out"), "--to", "llava"])
    assert removed in caught.value.problem
    (broken / "non_lora_trainables.bin").unlink()
    with raises_user_error(file=broken / "non_lora_trainables.bin"):
        main([str(broken), str(tmp_path / "out"), "--to", "llava"])


def test_pickle_with_code_is_refused(full: Path, tmp_path: Path) -> None:
    shard = full / "pytorch_model-00002-of-00002.bin"
    torch.save({"model.mm_projector.0.weight": Path("code")}, shard)
    with raises_user_error(file=shard):
        main([str(full), str(tmp_path / "out"), "--to", "llava"])


def test_options_without_effect_are_refused(encoder_dir: Path, full: Path, tmp_path: Path) -> None:
    for words in (["--to", "tower", "--llm", "x"], ["--to", "llava_projector", "--llm", "x"]):
        with raises_user_error(key="--llm", value="x"):
            main([str(encoder_dir), str(tmp_path / "out"), *words])
    with raises_user_error(key="--llm", value="x"):
        main([str(full), str(tmp_path / "out"), "--to", "llava", "--llm", "x"])


def test_projector_of_other_models_is_refused(encoder_dir: Path, tmp_path: Path) -> None:
    main([str(encoder_dir), str(tmp_path / "tower"), "--to", "tower"])
    assert (tmp_path / "tower" / "model.safetensors").is_file()
    with raises_user_error(file=tmp_path / "tower", key="model_type"):
        main([str(tmp_path / "tower"), str(tmp_path / "out"), "--to", "llava_projector"])
    LlavaNextConfig().save_pretrained(tmp_path / "tiles")
    with raises_user_error(file=tmp_path / "tiles", key="model_type", value="llava_next"):
        main([str(tmp_path / "tiles"), str(tmp_path / "out"), "--to", "llava_projector"])
    LlavaConfig(vision_feature_layer=[-2, -5]).save_pretrained(tmp_path / "several")
    with raises_user_error(file=tmp_path / "several", key="vision_feature_layer", value=[-2, -5]):
        main([str(tmp_path / "several"), str(tmp_path / "out"), "--to", "llava_projector"])
