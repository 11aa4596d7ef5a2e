"""LoRA, DoRA and QLoRA through the command: adapters are complete, load, answer, merge and resume."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from transformers import AutoProcessor, LlavaForConditionalGeneration

from clips_mllm.chat import main as chat
from clips_mllm.convert import main as convert
from clips_mllm.inspect_folder import main as inspect
from clips_mllm.merge import main as merge
from clips_mllm.model.checkpoint import load_mllm
from clips_mllm.train import main
from tests.helpers.errors import ANY, raises_user_error
from tests.helpers.train_runs import losses, weights, words

KINDS = ("lora", "dora", "qlora")
ADAPTER = {"stage.llm": "true", "stage.adapter.rank": 4, "stage.adapter.alpha": 8, "stage.adapter.dropout": 0.1}


@pytest.fixture(scope="module", params=KINDS)
def run(request: pytest.FixtureRequest, mllm_dir: Path, sample_world: Path, tmp_path_factory: Any) -> Path:
    """A short run with an adapter on the LLM, and the projector; QLoRA also on the tower."""
    folder = tmp_path_factory.mktemp("adapters") / request.param
    values = ADAPTER | {
        "model.checkpoint": mllm_dir,
        "stage.adapter.kind": request.param,
        "stage.tower": str(request.param == "qlora").lower(),
        "stage.projector_learning_rate": 1e-3,
        "training.learning_rate": 2e-2,
        "training.max_steps": 6,
        "training.save_every": 3,
        "training.keep_checkpoints": 2,
    }
    main(words(folder, sample_world, **values))
    return folder


def answer(model: Any, processor: Any, image: Path) -> list[int]:
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is this?"}]}]
    text = processor.apply_chat_template(messages, add_generation_prompt=True)
    inputs = processor(text=text, images=[Image.open(image).convert("RGB")], return_tensors="pt")
    with torch.inference_mode():
        out = model.eval().generate(**inputs, max_new_tokens=12, min_new_tokens=12, do_sample=False)
    return out[0, inputs["input_ids"].shape[1] :].tolist()


def test_loss_falls_and_base_is_not_written(run: Path, mllm_dir: Path) -> None:
    found = losses(run)
    assert len(found) == 6 and found[-1] < found[0]
    names = {path.name for path in run.iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors", "chat_template.jinja", "tokenizer.json"} <= names
    assert {"processor_config.json", "generation_config.json"} <= names
    assert not names & {"config.json", "model.safetensors", "partial", ".preflight"}
    assert ("quantization.json" in names) == (run.name == "qlora")
    saved = json.loads((run / "adapter_config.json").read_text())
    assert saved["base_model_name_or_path"] == str(mllm_dir) and saved["use_dora"] == (run.name == "dora")


def test_base_with_relative_path_is_found_from_other_directories(
    mllm_dir: Path, sample_world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(mllm_dir.parent)
    values = ADAPTER | {"model.checkpoint": mllm_dir.name, "stage.adapter.kind": "lora", "training.max_steps": 1}
    main(words(tmp_path / "run", sample_world, **values))
    monkeypatch.chdir(tmp_path)
    assert json.loads((tmp_path / "run" / "adapter_config.json").read_text())["base_model_name_or_path"] == str(
        mllm_dir
    )
    load_mllm(tmp_path / "run", device="cpu")


def test_projector_and_tower_are_in_the_adapter(run: Path) -> None:
    with safe_open(run / "adapter_model.safetensors", "pt") as file:
        keys = list(file.keys())
    assert sum("multi_modal_projector" in key for key in keys) == 4
    assert any("language_model" in key and "lora_B" in key for key in keys)
    assert any("vision_tower" in key for key in keys) == (run.name == "qlora")
    assert not any("lm_head" in key or "embed_tokens" in key for key in keys)


@pytest.mark.parametrize("checkpoint", ["", "checkpoint-3"])
def test_merged_checkpoint_answers_as_the_adapter(
    run: Path, mllm_dir: Path, sample_world: Path, tmp_path: Path, checkpoint: str
) -> None:
    """Compare the merged checkpoint in stock classes with PEFT's unmerged adapter on its base."""
    from peft import PeftModel
    from transformers import BitsAndBytesConfig

    adapter = run / checkpoint
    options: dict[str, Any] = {"dtype": torch.float32}
    if run.name == "qlora":
        saved = json.loads((adapter / "quantization.json").read_text())
        assert saved["bnb_4bit_quant_type"] == "nf4" and saved["bnb_4bit_use_double_quant"]
        options["quantization_config"] = BitsAndBytesConfig.from_dict(saved)
    base = LlavaForConditionalGeneration.from_pretrained(mllm_dir, **options)
    unmerged = PeftModel.from_pretrained(base, adapter)
    merge([str(adapter), str(tmp_path / "merged")])
    stock, info = LlavaForConditionalGeneration.from_pretrained(tmp_path / "merged", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert "quantization_config" not in json.loads((tmp_path / "merged" / "config.json").read_text())
    processor = AutoProcessor.from_pretrained(tmp_path / "merged")
    images = sorted((sample_world / "llava" / "images").rglob("*.*g"))[:4]
    ours = load_mllm(adapter, device="cpu")
    untrained = LlavaForConditionalGeneration.from_pretrained(mllm_dir)
    answers = [answer(unmerged, processor, image) for image in images]
    assert [answer(stock, processor, image) for image in images] == answers
    assert [answer(ours.model, ours.processor, image) for image in images] == answers
    assert [answer(untrained, processor, image) for image in images] != answers
    state, loaded = stock.state_dict(), ours.model.state_dict()
    assert set(state) == set(loaded) and all(torch.equal(state[name], loaded[name]) for name in state)


def test_projector_converts_to_the_original_format(run: Path, tmp_path: Path) -> None:
    convert([str(run), str(tmp_path / "out"), "--to", "llava_projector"])
    found = torch.load(tmp_path / "out" / "mm_projector.bin", weights_only=True)
    with safe_open(run / "adapter_model.safetensors", "pt") as file:
        wanted = file.get_tensor("base_model.model.model.multi_modal_projector.linear_1.weight")
    assert len(found) == 4 and torch.equal(found["model.mm_projector.0.weight"], wanted)


def test_inspect_names_the_kind_of_adapter(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    inspect([str(run)])
    assert {"lora": "LORA", "dora": "DoRA", "qlora": "QLoRA"}[
        run.name
    ] + " adapter of rank 4" in capsys.readouterr().out


def test_adapter_and_merged_checkpoint_chat_alike(
    run: Path, chat_mllm: Path, sample_world: Path, tmp_path: Path
) -> None:
    """On a base with larger weights than the one it was trained on, so that answers differ by prompt."""
    if run.name == "dora":
        pytest.skip("DoRA's magnitudes fit its own base only, whose answers are blank")
    adapter, merged, kept = tmp_path / "adapter", tmp_path / "merged", tmp_path / "answers.json"
    shutil.copytree(run, adapter, ignore=shutil.ignore_patterns("checkpoint-*"))
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": str(chat_mllm)}))
    merge([str(adapter), str(merged)])
    answers = {}
    for place in (adapter, merged, chat_mllm):
        words = [str(place), "--device", "cpu", "--max_new_tokens", "12"]
        chat([*words, "--examples", str(sample_world / "examples.json"), "--output", str(kept)])
        answers[place] = [row["answer"] for row in json.loads(kept.read_text())]
    assert answers[adapter] == answers[merged] and len(set(answers[adapter])) > 1
    assert answers[adapter] != answers[chat_mllm]


def test_adapter_from_the_hub(run: Path, hub: Callable[[Path], str]) -> None:
    found, expected = load_mllm(hub(run), device="cpu"), weights(run)
    state = found.model.state_dict()
    assert set(state) == set(expected) and all(torch.equal(state[name], expected[name]) for name in state)


def test_only_projector_and_adapted_layers_change(run: Path, mllm_dir: Path) -> None:
    if run.name == "qlora":
        pytest.skip("its base is another: 4-bit weights")
    before, after = weights(mllm_dir), weights(run)
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert all("proj" in name for name in moved), "linear layers of the LLM, and the projector"
    assert {name for name in before if "multi_modal_projector" in name} <= moved


@pytest.mark.parametrize("quantize", ["4bit", "8bit"])
def test_adapter_on_a_quantized_base(mllm_dir: Path, run: Path, sample_world: Path, quantize: Any) -> None:
    image = next((sample_world / "llava" / "images").rglob("*.*g"))
    if (run.name, quantize) == ("dora", "8bit"):
        with raises_user_error(file=run):
            load_mllm(run, device="cpu", quantize=quantize)
        return
    for folder in (mllm_dir, run):
        mllm = load_mllm(folder, device="cpu", quantize=quantize)
        layer = mllm.model.model.language_model.layers[0].self_attn.q_proj
        kind = type(layer.base_layer if folder == run else layer).__name__
        assert kind == {"4bit": "Linear4bit", "8bit": "Linear8bitLt"}[quantize]
        assert type(mllm.model.lm_head) is torch.nn.Linear
        assert len(answer(mllm.model, mllm.processor, image)) == 12


@pytest.mark.parametrize("kind", ["lora", "qlora"])
def test_bf16_keeps_trained_weights_in_fp32(mllm_dir: Path, sample_world: Path, tmp_path: Path, kind: str) -> None:
    """The frozen base in bf16, activations recomputed: near the fp32 curve, and no step of the adapter is rounded."""
    values = ADAPTER | {"model.checkpoint": mllm_dir, "stage.adapter.kind": kind, "stage.adapter.dropout": 0}
    main(words(tmp_path / "fp32", sample_world, **values))
    half = {"training.precision": "bf16", "training.gradient_checkpointing": "true"}
    main(words(tmp_path / "bf16", sample_world, **values, **half))
    assert losses(tmp_path / "bf16") == pytest.approx(losses(tmp_path / "fp32"), rel=0.03)
    with safe_open(tmp_path / "bf16" / "adapter_model.safetensors", "pt") as file:
        assert {file.get_tensor(key).dtype for key in file.keys()} == {torch.float32}  # noqa: SIM118


def test_stage_1_in_bf16_keeps_the_projector_in_fp32(mllm_dir: Path, sample_world: Path, tmp_path: Path) -> None:
    """The frozen LLM in bf16: near the fp32 curve; no step of the projector is rounded, also not on resume."""
    values = {"model.checkpoint": mllm_dir, "training.save_every": 2, "training.keep_checkpoints": 2}
    main(words(tmp_path / "fp32", sample_world, **values))
    half = words(tmp_path / "bf16", sample_world, **values, **{"training.precision": "bf16"})
    main(half)
    uninterrupted = losses(tmp_path / "bf16")
    assert uninterrupted == pytest.approx(losses(tmp_path / "fp32"), rel=0.03)
    with safe_open(tmp_path / "bf16" / "model.safetensors", "pt") as file:
        kinds = {key.partition(".")[0]: file.get_tensor(key).dtype for key in file.keys()}  # noqa: SIM118
        first = {key: file.get_tensor(key) for key in file.keys() if "projector" in key}  # noqa: SIM118
    assert kinds == {
        "multi_modal_projector": torch.float32,
        "language_model": torch.bfloat16,
        "vision_tower": torch.bfloat16,
    }
    shutil.rmtree(tmp_path / "bf16" / "checkpoint-3")
    main(half)
    assert losses(tmp_path / "bf16") == uninterrupted
    with safe_open(tmp_path / "bf16" / "model.safetensors", "pt") as file:
        assert all(torch.equal(file.get_tensor(key), value) for key, value in first.items())


def test_incomplete_adapter_is_refused(run: Path, tmp_path: Path) -> None:
    """The projector is missing, as often in LLaVA's own adapters."""
    from safetensors.torch import load_file, save_file

    broken = tmp_path / "broken"
    shutil.copytree(run, broken, ignore=shutil.ignore_patterns("checkpoint-*"))
    state = load_file(run / "adapter_model.safetensors")
    kept = {name: value for name, value in state.items() if "multi_modal_projector" not in name}
    save_file(kept, broken / "adapter_model.safetensors")
    with raises_user_error(file=broken):
        load_mllm(broken, device="cpu")
    file = broken / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"base_model_name_or_path": str(tmp_path / "gone")}))
    with raises_user_error(file=file, key="base_model_name_or_path"):
        load_mllm(broken, device="cpu")


@pytest.mark.parametrize(
    ("values", "key", "value"),
    [
        ({"stage.adapter.kind": "lora", "stage.llm": "false"}, "stage.adapter.kind", "lora"),
        ({"stage.adapter.rank": 0}, "stage.adapter.rank", 0),
        ({"model.checkpoint": "RUN"}, "model.checkpoint", ANY),
        ({"stage.tower": "true", "stage.tower_from_layer": 7}, "stage.tower_from_layer", 7),
        ({"stage.tower_from_layer": 1}, "stage.tower_from_layer", 1),
        ({"model.attention": "flash_attention_2"}, "model.attention", "flash_attention_2"),
        (
            {"stage.adapter.kind": "qlora", "training.deepspeed": "configs/deepspeed/zero3.json"},
            "training.deepspeed",
            ANY,
        ),
        ({"training.liger": "true"}, "training.liger", ANY),
    ],
)
def test_bad_recipes_are_refused(
    mllm_dir: Path, sample_world: Path, tmp_path: Path, values: dict[str, Any], key: str, value: Any
) -> None:
    if values.get("model.checkpoint") == "RUN":
        (tmp_path / "adapter").mkdir()
        (tmp_path / "adapter" / "adapter_config.json").write_text("{}")
        values = values | {"model.checkpoint": tmp_path / "adapter"}
    given = ADAPTER | {"model.checkpoint": mllm_dir, "stage.adapter.kind": "lora"} | values
    with raises_user_error(key=key, value=value) as caught:
        main(words(tmp_path / "run", sample_world, **given))
    assert "\n" not in str(caught.value)
