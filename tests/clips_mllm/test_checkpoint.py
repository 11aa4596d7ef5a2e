"""Checkpoints: saved and loaded completely, readable by stock transformers, refused if broken."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from clips_mllm.model.build import build_mllm
from clips_mllm.model.checkpoint import load_mllm, save_mllm
from clips_mllm.model.stock import is_complete
from clips_mllm.train import main
from tests.helpers.errors import raises_user_error

ROOT = Path(__file__).parents[2]
STOCK = """
import json, sys
import torch
from PIL import Image
from transformers import AutoProcessor, LlavaForConditionalGeneration

folder, image, question = sys.argv[1:]
model, info = LlavaForConditionalGeneration.from_pretrained(folder, output_loading_info=True)
processor = AutoProcessor.from_pretrained(folder)
content = [{"type": "image"}, {"type": "text", "text": question}]
text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
inputs = processor(text=text, images=[Image.open(image).convert("RGB")], return_tensors="pt")
with torch.inference_mode():
    out = model.eval().generate(**inputs.to(model.dtype), max_new_tokens=12, do_sample=False)
print(json.dumps({
    "missing": sorted(map(str, info["missing_keys"])),
    "unexpected": sorted(map(str, info["unexpected_keys"])),
    "mismatched": sorted(map(str, info["mismatched_keys"])),
    "answer": processor.decode(out[0, inputs["input_ids"].shape[1]:], skip_special_tokens=True),
    "ours": [name for name in sys.modules if name.split(".")[0] in ("clips_mllm", "vision_tower", "clips_eval")],
}))
"""


@pytest.fixture(scope="module")
def trained(mllm_dir: Path, sample_world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A short stage 2 by the command, in bf16, on captions, so that the model generates several words."""
    folder = tmp_path_factory.mktemp("trained")
    values = {
        "output_dir": folder,
        "model.checkpoint": mllm_dir,
        "data.file": sample_world / "llava" / "stage1.json",
        "data.images": sample_world / "llava" / "images",
        "data.template": "chatml",
        "stage.llm": "true",
        "training.global_batch_size": 8,
        "training.device_batch_size": 8,
        "training.max_steps": 25,
        "training.learning_rate": 5e-3,
        "training.workers": 0,
    }
    main([word for name, value in values.items() for word in (f"--{name}", str(value))])
    return folder


def answer_in_a_process(command: list[str], paths: list[Path], folder: Path) -> str:
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(map(str, paths)),
        "OMP_NUM_THREADS": str(torch.get_num_threads()),
        "HF_HUB_OFFLINE": "1",
    }
    done = subprocess.run(
        command, capture_output=True, text=True, env=environment, cwd=folder, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_stock_process_answers_like_chat(trained: Path, sample_world: Path, tmp_path: Path) -> None:
    image = next((sample_world / "retrieval" / "images").glob("test-*.png"))
    question = "What color is the background?"
    out = answer_in_a_process([sys.executable, "-c", STOCK, str(trained), str(image), question], [], tmp_path)
    stock = json.loads(out.splitlines()[-1])
    assert stock["ours"] == []
    assert (stock["missing"], stock["unexpected"], stock["mismatched"]) == ([], [], [])
    assert stock["answer"].strip()
    chat = [sys.executable, "-m", "clips_mllm.cli", "chat", str(trained), "--image", str(image)]
    answer = answer_in_a_process(
        [*chat, "--question", question, "--max_new_tokens", "12"], [ROOT, ROOT / "eval"], tmp_path
    )
    assert answer == stock["answer"] + "\n"


def logits(folder: Path) -> torch.Tensor:
    mllm = load_mllm(folder, device="cpu", dtype="float32")
    text = "<|im_start|>user\n<image>\nWhat?<|im_end|>\n"
    inputs = mllm.processor(text=text, images=[Image.new("RGB", (50, 40), "green")], return_tensors="pt")
    with torch.inference_mode():
        return mllm.model(**inputs).logits


def test_save_and_load_give_the_same_logits(sample_world: Path, encoder_dir: Path, tmp_path: Path) -> None:
    """Also after a second save. The logits depend on the image."""
    model, processor = build_mllm(
        str(encoder_dir / "tower"),
        str(sample_world / "llm"),
        feature_layer=-2,
        feature_select="full",
        dtype=torch.float32,
    )
    text = "<|im_start|>user\n<image>\nWhat?<|im_end|>\n"
    green, red = (
        processor(text=text, images=[Image.new("RGB", (50, 40), color)], return_tensors="pt")
        for color in ("green", "red")
    )
    with torch.inference_mode():
        before = model.eval()(**green).logits
        assert not torch.equal(before, model(**red).logits)
    save_mllm(model, processor, tmp_path / "once")
    assert torch.equal(logits(tmp_path / "once"), before)
    again = load_mllm(tmp_path / "once", device="cpu")
    save_mllm(again.model, again.processor, tmp_path / "twice")
    assert torch.equal(logits(tmp_path / "twice"), before)
    assert is_complete(tmp_path / "twice")
    assert not list(tmp_path.rglob("partial"))


def test_pickled_towers_and_llms_load(sample_world: Path, encoder_dir: Path, tmp_path: Path) -> None:
    """As Vicuna 1.5 and CLIP L/14 at 336 pixels are published. A pickle that contains code is refused."""
    built = []
    for folder in (encoder_dir / "tower", sample_world / "llm"):
        copy = tmp_path / folder.name
        shutil.copytree(folder, copy, ignore=shutil.ignore_patterns("*.safetensors"))
        torch.save(load_file(folder / "model.safetensors"), copy / "pytorch_model.bin")
        built.append((str(folder), str(copy)))
    options: dict[str, Any] = {"feature_layer": -2, "feature_select": "full", "dtype": torch.float32}
    states = []
    for tower, llm in zip(*built, strict=True):
        torch.manual_seed(0)
        states.append(build_mllm(tower, llm, **options)[0].state_dict())
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())
    torch.save({"weight": Path}, tmp_path / "llm" / "pytorch_model.bin")
    with raises_user_error(file=tmp_path / "llm"):
        build_mllm(built[0][1], built[1][1], **options)


def test_processor_is_ready_for_batched_generation(mllm_dir: Path) -> None:
    """Two prompts of different lengths give the same answers in a batch and alone: padding is left and masked."""
    mllm = load_mllm(mllm_dir, device="cpu", dtype="float32")
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in mllm.model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.2)
    images = [Image.new("RGB", (50, 40), color) for color in ("green", "red")]
    talks = [[{"role": "user", "content": f"<image>\n{text}"}] for text in ("What?", "How many objects are there?")]
    texts = [mllm.processor.apply_chat_template(talk, add_generation_prompt=True) for talk in talks]

    def generate(chosen: list[int]) -> list[list[int]]:
        inputs = mllm.processor(
            text=[texts[at] for at in chosen],
            images=[images[at] for at in chosen],
            return_tensors="pt",
            padding=True,
        )
        out = mllm.model.generate(**inputs, max_new_tokens=6, min_new_tokens=6, do_sample=False)
        return out[:, inputs["input_ids"].shape[1] :].tolist()

    assert generate([0, 1]) == generate([0]) + generate([1])


def test_failed_save_leaves_no_files(mllm_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mllm = load_mllm(mllm_dir, device="cpu")

    def fail(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(type(mllm.processor), "save_pretrained", fail)
    with pytest.raises(KeyboardInterrupt):
        save_mllm(mllm.model, mllm.processor, tmp_path)
    assert not list(tmp_path.iterdir())


# --- broken checkpoints -----------------------------------------------------------------------------------------------


def edit_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    from safetensors.torch import load_file, save_file

    state = load_file(folder / "model.safetensors")
    change(state)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


def drop_projector(folder: Path) -> None:
    edit_weights(
        folder, lambda state: [state.pop(name) for name in list(state) if "multi_modal_projector.linear_1.bias" in name]
    )


def add_stranger(folder: Path) -> None:
    edit_weights(folder, lambda state: state.update({"stranger.weight": torch.zeros(2)}))


def cut_weights(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:5000])


def break_config(folder: Path) -> None:
    (folder / "config.json").write_text('{"model_type": "llava"')


def remove_image_token(folder: Path) -> None:
    tree = json.loads((folder / "tokenizer.json").read_text())
    tree["added_tokens"] = [token for token in tree["added_tokens"] if token["content"] != "<image>"]
    (folder / "tokenizer.json").write_text(json.dumps(tree))
    config = json.loads((folder / "tokenizer_config.json").read_text())
    for key in ("extra_special_tokens", "additional_special_tokens", "added_tokens_decoder", "image_token"):
        config.pop(key, None)
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    "damage",
    [
        drop_projector,
        add_stranger,
        cut_weights,
        break_config,
        remove_image_token,
        lambda folder: (folder / "model.safetensors").unlink(),
        lambda folder: (folder / "processor_config.json").unlink(),
    ],
)
def test_broken_checkpoints_are_refused(damage: Callable[[Path], object], mllm_dir: Path, tmp_path: Path) -> None:
    folder = tmp_path / "broken"
    shutil.copytree(mllm_dir, folder)
    damage(folder)
    with raises_user_error(file=folder):
        load_mllm(folder, device="cpu")


def test_pickled_weights_are_refused(mllm_dir: Path, hub: Callable[[Path], str], tmp_path: Path) -> None:
    """Valid weights in a pickle, in a folder and on the hub."""
    from safetensors.torch import load_file

    pickled = tmp_path / "pickled"
    shutil.copytree(mllm_dir, pickled)
    torch.save(load_file(pickled / "model.safetensors"), pickled / "pytorch_model.bin")
    assert load_mllm(hub(pickled), device="cpu"), "ignored if there are safetensors"
    alone = pickled.rename(tmp_path / "alone")
    (alone / "model.safetensors").unlink()
    for place in (str(alone), hub(alone)):
        with raises_user_error(file=place) as caught:
            load_mllm(place, device="cpu")
        assert "\n" not in str(caught.value)


def test_other_folders_are_refused(sample_world: Path, tmp_path: Path) -> None:
    with raises_user_error(file=sample_world / "llm", key="model_type", value="llama"):
        load_mllm(sample_world / "llm")
    with raises_user_error(file=tmp_path / "gone"):
        load_mllm(tmp_path / "gone")
    with raises_user_error(file=tmp_path):
        load_mllm(tmp_path)


def test_tower_without_image_processor_is_refused(sample_world: Path, encoder_dir: Path, tmp_path: Path) -> None:
    tower = tmp_path / "tower"
    shutil.copytree(encoder_dir / "tower", tower)
    (tower / "preprocessor_config.json").unlink()
    with raises_user_error(file=tower):
        build_mllm(str(tower), str(sample_world / "llm"), feature_layer=-2, feature_select="full", dtype=torch.float32)


@pytest.mark.parametrize("layer", [99, -99, [0, 99]])
def test_missing_feature_layer_is_refused(layer: int | list[int], sample_world: Path, encoder_dir: Path) -> None:
    tower, llm = encoder_dir / "tower", sample_world / "llm"
    with raises_user_error(key="model.feature_layer", value=layer if isinstance(layer, int) else 99):
        build_mllm(str(tower), str(llm), feature_layer=layer, feature_select="full", dtype=torch.float32)


def test_llm_without_pad_token(sample_world: Path, encoder_dir: Path, tmp_path: Path) -> None:
    """As LLaMA-3: EOS is used for padding, also in the saved checkpoint."""
    llm = tmp_path / "llm"
    shutil.copytree(sample_world / "llm", llm)
    config = json.loads((llm / "tokenizer_config.json").read_text())
    config.pop("pad_token")
    (llm / "tokenizer_config.json").write_text(json.dumps(config))
    model, processor = build_mllm(
        str(encoder_dir / "tower"), str(llm), feature_layer=-2, feature_select="full", dtype=torch.float32
    )
    save_mllm(model, processor, tmp_path / "mllm")
    loaded = load_mllm(tmp_path / "mllm", device="cpu")
    assert loaded.tokenizer.pad_token == loaded.tokenizer.eos_token == "<|im_end|>"
    assert loaded.model.generation_config.pad_token_id == loaded.tokenizer.pad_token_id


def test_unsuitable_tower_is_refused(encoder_dir: Path, sample_world: Path) -> None:
    llm = str(sample_world / "llm")
    options = {"feature_layer": -2, "dtype": torch.float32}
    with raises_user_error(key="model.feature_select", value="default"):
        build_mllm(str(encoder_dir / "tower"), llm, feature_select="default", **options)
    with raises_user_error(file=llm):
        build_mllm(llm, llm, feature_select="full", **options)
