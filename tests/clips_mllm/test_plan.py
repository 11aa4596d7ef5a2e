"""`clips-mllm plan`: sizes against real models, components by hand, the shipped recipes, errors."""

from __future__ import annotations

import dataclasses
import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import psutil
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, SiglipVisionConfig, SiglipVisionModel

from clips_mllm.model.checkpoint import load_mllm
from clips_mllm.model.recipe import MllmRecipe
from clips_mllm.plan import main
from clips_mllm.planning.catalog import default_device
from clips_mllm.planning.estimate import (
    block_bytes,
    logit_bytes,
    optimizer_bytes,
    peak_memory,
    sample_flops,
    weight_bytes,
)
from clips_mllm.planning.lengths import read_lengths
from clips_mllm.planning.memory_check import memory_line
from clips_mllm.planning.models import catalog_llm, catalog_tower, read_shape, resolve_model
from clips_mllm.planning.recipe import PlanRecipe
from clips_mllm.planning.setup import Setup
from clips_mllm.planning.shapes import Shape, llm_shape, tower_shape
from tests.helpers.errors import raises_user_error
from vision_tower.common.recipe import parse_recipe
from vision_tower.training.model_tools import compile_blocks

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "configs"
ALIGN = ["--config", "configs/mllm/vicuna_7b_align.yaml"]
QLORA = ["--config", "configs/mllm/vicuna_7b_finetune_qlora.yaml"]
VICUNA_7B = catalog_llm("lmsys/vicuna-7b-v1.5")
CLIP_L336 = catalog_tower("openai/clip-vit-large-patch14-336")
SHAPE = Shape(tower=CLIP_L336, llm=VICUNA_7B)


def shape_of(recipes: Path = CONFIGS, **model: Any) -> Shape:
    return read_shape(resolve_model(MllmRecipe(**model), recipes), recipes)


def planned(capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, Any]:
    main([*words, "--json"])
    return dict(json.loads(capsys.readouterr().out))


def test_sizes_equal_those_of_real_models(mllm_dir: Path) -> None:
    model = load_mllm(mllm_dir, device="cpu", dtype="float32").model
    shape = shape_of(checkpoint=str(mllm_dir))
    assert shape.parameters == pytest.approx(sum(value.numel() for value in model.parameters()), rel=0.001)
    assert shape.projector_parameters == sum(value.numel() for value in model.model.multi_modal_projector.parameters())
    config = LlamaConfig(
        hidden_size=96,
        intermediate_size=160,
        num_hidden_layers=3,
        num_attention_heads=6,
        num_key_value_heads=2,
        vocab_size=500,
        tie_word_embeddings=False,
    )
    llm = LlamaForCausalLM(config)
    assert llm_shape(config.to_dict(), "here").parameters == sum(value.numel() for value in llm.parameters())
    vision = SiglipVisionConfig(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=48,
        patch_size=16,
        vision_use_head=False,
    )
    tower = SiglipVisionModel(vision)
    found = tower_shape(vision.to_dict(), "here")
    assert found.parameters == pytest.approx(sum(value.numel() for value in tower.parameters()), rel=0.001)
    assert (found.patches, found.class_token) == (9, False)


def test_sizes_of_the_published_models() -> None:
    """Parameter counts of the model cards: 6.74 B, 8.03 B, 303 M; LLaVA's projector for CLIP-L has 21 M."""
    assert VICUNA_7B.parameters == 6_738_415_616
    assert catalog_llm("meta-llama/Meta-Llama-3-8B-Instruct").parameters == 8_030_261_248
    assert CLIP_L336.parameters == pytest.approx(303.5e6, rel=0.002)
    assert SHAPE.projector_parameters == 1025 * 4096 + 4097 * 4096


def test_lora_counts_as_peft_does() -> None:
    from peft import LoraConfig, get_peft_model

    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=99,
    )
    names = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    model = get_peft_model(LlamaForCausalLM(config), LoraConfig(r=8, target_modules=names))
    trained = sum(value.numel() for value in model.parameters() if value.requires_grad)
    assert llm_shape(config.to_dict(), "here").lora_parameters(8) == trained


@pytest.mark.parametrize(("zero", "weights", "optimizer"), [(0, 6.0, 8.0), (2, 2.0, 3.0), (3, 0.5, 3.0)])
def test_zero_stages_shard_weights_and_optimizer(zero: int, weights: float, optimizer: float) -> None:
    """Bytes per parameter on four devices (arXiv 1910.02054: 2 + 2 + 12); without DeepSpeed fp32 and a bf16 copy."""
    setup = Setup(shape=SHAPE, train_llm=True, train_tower=True, zero=zero, devices=4)
    assert setup.trainable == SHAPE.parameters
    assert weight_bytes(setup) == pytest.approx(weights * SHAPE.parameters)
    assert optimizer_bytes(setup) == pytest.approx(optimizer * SHAPE.parameters)
    # In fp32 training ZeRO keeps fp32 master weights too.
    assert optimizer_bytes(dataclasses.replace(setup, mixed=False)) == optimizer_bytes(setup)


@pytest.mark.parametrize("adapter", ["none", "lora"])
def test_frozen_llm_without_deepspeed_is_in_bf16(adapter: Literal["none", "lora"]) -> None:
    """Frozen parameters take 2 bytes, including PEFT's original projector; trainable ones 4, and 2 for autocast."""
    setup = Setup(shape=SHAPE, train_llm=adapter == "lora", adapter=adapter, rank=8, zero=0)
    frozen = VICUNA_7B.parameters + SHAPE.tower.parameters + SHAPE.projector_parameters * (adapter == "lora")
    assert weight_bytes(setup) == pytest.approx(2 * frozen + 6 * setup.trainable)


def test_qlora_weights_take_four_bits() -> None:
    setup = Setup(shape=SHAPE, train_llm=True, adapter="qlora", rank=64, zero=2)
    rest = (
        VICUNA_7B.parameters
        - VICUNA_7B.linear_parameters
        + SHAPE.tower.parameters
        + SHAPE.projector_parameters
        + setup.trainable
    )
    assert weight_bytes(setup) == pytest.approx(VICUNA_7B.linear_parameters * 0.515875 + 2 * rest)
    assert weight_bytes(setup) < 0.4 * weight_bytes(dataclasses.replace(setup, adapter="lora"))


def test_logits_are_counted_at_supervised_positions() -> None:
    setup = Setup(shape=SHAPE, batch=4, tokens=700, supervised=30)
    assert logit_bytes(setup) == 4 * 30 * 32000 * 14
    assert logit_bytes(dataclasses.replace(setup, tokens=2000)) == logit_bytes(setup)


@pytest.mark.parametrize(("attention", "compiled"), [("sdpa", False), ("eager", False), ("sdpa", True)])
@pytest.mark.parametrize("trains", [True, False])
def test_block_activations_match_autograd(trains: bool, attention: str, compiled: bool) -> None:
    """Compare with the tensors that a block of transformers' LLaMA saves for its backward pass, in bf16."""
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=192,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=64,
        attn_implementation=attention,
    )
    model = LlamaForCausalLM(config).bfloat16().requires_grad_(trains)
    weights = {value.data_ptr() for value in model.parameters()}
    if compiled:
        compile_blocks(model)

    def kept(layers: int) -> int:
        seen: dict[int, int] = {}

        def pack(value: torch.Tensor) -> torch.Tensor:
            if value.untyped_storage().data_ptr() not in weights:
                seen[value.untyped_storage().data_ptr()] = value.untyped_storage().nbytes()
            held.append(value)  # keeps it alive, so that no address is reused
            return value

        held: list[torch.Tensor] = []
        states = torch.randn(2, 50, 64, dtype=torch.bfloat16, requires_grad=True)
        angles = model.model.rotary_emb(states, torch.arange(50)[None])
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda value: value):
            for block in model.model.layers[:layers]:
                states = block(states, position_embeddings=angles)
        return sum(seen.values())

    shape = Shape(tower=CLIP_L336, llm=llm_shape(config.to_dict(), "here"))
    measured = (kept(4) - kept(2)) / 2 / 100
    setup = Setup(shape=shape, train_llm=trains, tokens=50, eager=attention == "eager", compiled=compiled)
    assert block_bytes(setup) == pytest.approx(measured, rel=0.1)


def test_checkpointing_zero_and_offload_save_memory() -> None:
    setup = Setup(shape=SHAPE, train_llm=True, zero=2, devices=8, batch=8)
    plain = peak_memory(setup)
    assert peak_memory(dataclasses.replace(setup, checkpointing=True)).activations < 0.1 * plain.activations
    assert peak_memory(dataclasses.replace(setup, zero=3)).weights == pytest.approx(plain.weights / 8)
    offloaded = peak_memory(dataclasses.replace(setup, zero=3, offload_optimizer=True, offload_weights=True))
    assert offloaded.weights == offloaded.optimizer == 0 and offloaded.host > 12 * setup.trainable / 8
    on_cpu = dataclasses.replace(setup, device=default_device("cpu"), offload_optimizer=True)
    # On a CPU, offloading moves nothing.
    assert peak_memory(on_cpu) == peak_memory(dataclasses.replace(on_cpu, offload_optimizer=False))
    assert plain.total == pytest.approx(
        sum(value for name, value in vars(plain).items() if name not in ("host", "moment"))
    )


QUICKSTART_ALIGN = {"batch": 8, "tokens": 81, "supervised": 28, "images": 1.0}
QUICKSTART_FINETUNE = {"train_llm": True, "batch": 4, "tokens": 333, "supervised": 15, "images": 0.81}
FP32 = {"mixed": False, "eager": False}


@pytest.mark.parametrize(
    ("measured", "stage", "changed"),
    [
        (2.38e9, QUICKSTART_ALIGN, {}),
        (2.95e9, QUICKSTART_ALIGN, FP32),
        (6.70e9, QUICKSTART_FINETUNE, {}),
        (6.85e9, QUICKSTART_FINETUNE, FP32),
        (8.62e9, QUICKSTART_FINETUNE, {"batch": 8}),
        (5.86e9, QUICKSTART_FINETUNE, {"zero": 0}),
        (4.93e9, QUICKSTART_FINETUNE, {"checkpointing": True}),
        (4.66e9, QUICKSTART_FINETUNE, {"adapter": "lora", "rank": 16}),
    ],
)
def test_quickstart_plan_is_within_10_percent_of_measured_memory(
    measured: float, stage: dict[str, Any], changed: dict[str, Any]
) -> None:
    """Peak memory of the training process, with the commands in docs/log.md."""
    shape = shape_of(checkpoint="runs/quickstart/align")
    values = {"zero": 2, "bucket": 5e7, "eager": True, "device": default_device("cpu")} | stage | changed
    assert peak_memory(Setup(shape=shape, **values)).total == pytest.approx(measured, rel=0.1)


def test_flops_of_a_sample() -> None:
    """6 N per token of a dense model that trains, 4 N if it is frozen, 2 N more with checkpointing."""
    small = dataclasses.replace(CLIP_L336, layers=0, width=1)
    setup = Setup(shape=Shape(tower=small, llm=VICUNA_7B), train_llm=True, supervised=0, images=0)
    attention = 12 * 10**2 * VICUNA_7B.q_width * 32
    assert sample_flops(setup, 10) == 6 * VICUNA_7B.linear_parameters * 10 + attention
    frozen = dataclasses.replace(setup, train_llm=False)
    assert sample_flops(frozen, 10) == 4 * VICUNA_7B.linear_parameters * 10 + attention
    again = dataclasses.replace(setup, checkpointing=True)
    assert sample_flops(again, 10) == 8 * VICUNA_7B.linear_parameters * 10 + attention * 4 / 3


# --- the command ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("file", sorted((ROOT / "configs" / "mllm").glob("*.yaml")), ids=lambda file: file.stem)
def test_shipped_recipes_are_planned_before_any_run(
    file: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    plan = planned(capsys, "--config", str(file))
    parts = plan["memory"]
    named = ("process", "weights", "gradients", "optimizer", "activations", "logits", "buffers", "slack")
    assert parts["total"] == pytest.approx(sum(parts[name] for name in named))
    batch = plan["batch"]
    assert batch["device"] * batch["devices"] * batch["accumulation"] == batch["global"]


def test_future_checkpoint_has_the_sizes_of_the_recipes_that_make_it(tmp_path: Path) -> None:
    """Pretraining makes the tower, stage 1 the checkpoint, and an adapter run continues it."""
    recipes = {
        "vision.yaml": "output_dir: out/encoder\n"
        "model: {image: {width: 64, layers: 2, mlp: 128, heads: 2}, image_size: 32, patch_size: 8}\n",
        "nested/align.yaml": "output_dir: out/align\n"
        "model: {tower: out/encoder/tower, llm: lmsys/vicuna-13b-v1.5, image_size: 64}\n",
        "lora.yaml": "output_dir: out/lora\nmodel: {checkpoint: out/align}\n",
        "circle.yaml": "output_dir: out/circle\nmodel: {checkpoint: out/circle}\n",
        "tiled.yaml": "output_dir: out/tiled\nmodel: {tower: out/encoder/tower, llm: tiny, tiles: 4}\n",
        "broken.yaml": "output_dir: [",
    }
    for name, text in recipes.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    tower = shape_of(tmp_path, tower="out/encoder", llm="lmsys/vicuna-7b-v1.5").tower
    assert (tower.width, tower.layers, tower.patches, tower.class_token) == (64, 2, 16, False)
    for checkpoint in ("out/align", "out/lora"):
        shape = shape_of(tmp_path, checkpoint=checkpoint)
        assert shape.llm == catalog_llm("lmsys/vicuna-13b-v1.5")
        assert shape.tower == dataclasses.replace(tower, image_size=64)
    for checkpoint, key in (("out/circle", "model.checkpoint"), ("out/tiled", "model.tiles")):
        with raises_user_error(key=key):
            shape_of(tmp_path, checkpoint=checkpoint)


def test_catalog_has_the_sizes_of_the_sample_llm(sample_world: Path) -> None:
    config = json.loads((sample_world / "llm" / "config.json").read_text())
    shape = llm_shape(config, "here")
    known = catalog_llm("tiny")
    assert shape.vocab_size <= known.vocab_size, "a small sample world has fewer word pieces"
    assert dataclasses.replace(shape, vocab_size=known.vocab_size, head_dim=known.head_dim) == known


@pytest.fixture
def words(mllm_dir: Path, sample_world: Path) -> list[str]:
    """Options for stage 2 on the sample world."""
    world = sample_world / "llava"
    values = {"model.checkpoint": mllm_dir, "data.file": world / "stage2.json", "data.images": world / "images"}
    return [f"--{name}={value}" for name, value in (values | {"data.template": "chatml"}).items()]


def open_dataset(words: list[str], checkpoint: Path) -> Any:
    from clips_mllm.data.dataset import InstructionDataset

    recipe = parse_recipe(PlanRecipe, words, command="plan")
    assert recipe.data is not None
    return InstructionDataset(recipe.data, load_mllm(checkpoint, device="cpu").processor)


@pytest.mark.parametrize("template", ["chatml", "plain"])
def test_lengths_equal_those_of_training(
    template: str, words: list[str], mllm_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [*words, f"--data.template={template}"]
    plan = planned(capsys, *words, "--training.global_batch_size", "8", "--training.device_batch_size", "4")
    dataset = open_dataset(words, mllm_dir)
    rendered = [dataset.load(index)[1] for index in range(len(dataset))]
    lengths = [len(one.ids) for one in rendered]
    supervised = [sum(label != -100 for label in one.labels) for one in rendered]
    found = plan["lengths"]
    assert (found["samples"], found["longest"], found["assumed"]) == (len(dataset), max(lengths), "")
    assert found["mean"] == pytest.approx(sum(lengths) / len(lengths))
    assert found["supervised"] == pytest.approx(sum(supervised) / len(supervised))
    assert plan["steps"] == len(dataset) // 8
    smaller = planned(capsys, *words, "--training.global_batch_size", "36", "--training.device_batch_size", "4")
    assert smaller["steps"] == -(-len(dataset) // 36), "an epoch can end with a smaller step"


def test_rows_are_sampled_evenly(
    words: list[str], mllm_dir: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    exact = planned(capsys, *words)["lengths"]
    monkeypatch.setattr("clips_mllm.planning.lengths.MAX_RENDERED", 10)
    sampled = planned(capsys, *words)["lengths"]
    assert sampled["samples"] == exact["samples"]
    assert sampled["mean"] == pytest.approx(exact["mean"], rel=0.3) and sampled["mean"] != exact["mean"]


def test_lengths_of_a_table(words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import datasets

    file = next(word for word in words if word.startswith("--data.file=")).partition("=")[2]
    rows = [{"conversations": row["conversations"]} for row in json.loads(Path(file).read_text()) if "image" not in row]
    datasets.Dataset.from_list(rows).to_parquet(str(tmp_path / "rows.parquet"))
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    found = [planned(capsys, *words, f"--data.file={tmp_path / name}") for name in ("rows.parquet", "rows.json")]
    assert found[0]["lengths"] == found[1]["lengths"] and found[0]["lengths"]["samples"] == len(rows) > 0


def test_lengths_are_assumed_without_data_or_tokenizer(
    words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["--data.max_length=400", "--text_tokens=50", "--samples=70", "--training.max_steps=0"]
    no_data = planned(capsys, *words, "--data.file=gone.json", *given)
    found = no_data["lengths"]
    assert (found["samples"], found["longest"], found["supervised"]) == (70, 400, 50) and "gone.json" in found[
        "assumed"
    ]
    assert planned(capsys, *words, "--data.file=gone.json", *given, "--tokens=99")["lengths"]["longest"] == 99
    recipe = parse_recipe(PlanRecipe, words, command="plan")
    assert recipe.data is not None
    lengths = read_lengths(
        recipe.data, MllmRecipe(tower="someone/tower", llm="someone/llm"), 9, text_tokens=50, samples=0
    )
    assert lengths.samples > 0 and lengths.mean == 59 and "someone/llm" in lengths.assumed
    (tmp_path / "empty.json").write_text("[{}]")
    with raises_user_error(file=tmp_path / "empty.json"):
        planned(capsys, *words, f"--data.file={tmp_path / 'empty.json'}")


def test_adapter_has_the_sizes_of_its_base(
    words: list[str], mllm_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(mllm_dir)}))
    adapter = planned(capsys, *words, f"--model.checkpoint={tmp_path}")
    assert adapter["parameters"] == planned(capsys, *words)["parameters"]


def test_every_row_format_is_read(words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A row that training drops, here without a placeholder for its image, is skipped."""
    turns = [{"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": "a red square"}]
    messages = [{"role": "user", "content": turns[0]["value"]}, {"role": "assistant", "content": turns[1]["value"]}]
    forms: list[dict[str, Any]] = [
        {"image": "a.png", "conversations": turns},
        {"image": "a.png", "conversations": json.dumps(turns)},
        {"images": ["a.png"], "messages": messages},
        {"images": ["a.png"], "texts": [{"user": "What is it?", "assistant": "a red square"}]},
    ]
    found = []
    for rows in ([form] for form in forms):
        (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [*rows, {"image": "a.png"}]))
        found.append(planned(capsys, *words, f"--data.file={tmp_path / 'rows.jsonl'}")["lengths"])
    assert all(one == found[0] for one in found[1:]) and found[0]["images"] == 1


def test_mixture_has_the_samples_of_training(
    words: list[str], sample_world: Path, mllm_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    world = sample_world / "llava"
    mixture = [
        {"file": str(world / "stage2.json"), "images": str(world / "images"), "weight": 1.5, "cap": 9},
        {"file": str(world / "stage1.json"), "images": str(world / "images"), "weight": 0.25},
    ]
    checkpoint = next(word for word in words if word.startswith("--model.checkpoint="))
    words = [checkpoint, f"--data.mixture={json.dumps(mixture)}", "--data.template=chatml"]
    found = planned(capsys, *words)["lengths"]
    dataset = open_dataset(words, mllm_dir)
    lengths = [len(dataset.load(index)[1].ids) for index in range(len(dataset))]
    assert (found["samples"], found["longest"]) == (len(dataset), max(lengths))
    assert found["mean"] == pytest.approx(sum(lengths) / len(lengths))


def test_cpu_ranks_share_cores_and_memory_of_this_machine(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    words = ["--config", "configs/mllm/quickstart_finetune.yaml", "--training.precision", "fp32", "--device", "cpu"]
    words += ["--training.device_batch_size", "2"]
    monkeypatch.setattr("os.cpu_count", lambda: 4)
    default, slower = planned(capsys, *words), planned(capsys, *words, "--tflops", "0.17", "--utilization", "0.3")
    assert default["memory"]["available"] == pytest.approx(psutil.virtual_memory().total)
    assert slower["seconds"] == pytest.approx(4 * default["seconds"])
    two = planned(capsys, *words, "--devices", "2")
    assert two["memory"]["available"] == pytest.approx(psutil.virtual_memory().total / 2)
    assert two["seconds"] == pytest.approx(default["seconds"])


def test_device_constants_can_be_replaced(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    memory = planned(capsys, *ALIGN, "--process_gb", "2.5", "--slack", "0", "--memory_gb", "24")["memory"]
    assert (memory["process"], memory["slack"], memory["available"]) == (2.5e9, 0, 24e9)


def test_text_has_parameters_batch_and_verdict(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    main(["--config", "configs/mllm/vicuna_7b_finetune.yaml", "--devices", "8"])
    text = capsys.readouterr().out
    assert all(part in text for part in ("6,738.4 M", "128 = 16 x 8 gpu x 1", "80 GB")) and "NOT" not in text
    main(["--config", "configs/mllm/vicuna_7b_finetune.yaml", "--devices", "1", "--memory_gb", "24"])
    assert "NOT" in capsys.readouterr().out


def test_table(capsys: pytest.CaptureFixture[str]) -> None:
    main(["--table"])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines[0].split("|")) == 2 + 2 + 9
    cells = {tuple(line.split(" | ")[:2]): line.split(" | ")[2:] for line in lines[2:14]}
    seven = cells["| Vicuna 7B", "finetune"]
    assert seven[0].startswith("Z3 opt") and seven[8].startswith("Z2"), (
        "one small GPU offloads, eight large ones do not"
    )
    assert all("Z3" not in cell for cell in cells["| Vicuna 7B", "qlora"])


def test_memory_check_before_step_1(
    words: list[str], mllm_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that does not fit is refused on a GPU, and warned about on a CPU or if the estimate is uncertain."""
    from transformers import TrainingArguments

    from clips_mllm.data.dataset import InstructionDataset
    from vision_tower.training.arguments import training_arguments

    recipe = parse_recipe(
        PlanRecipe, [*words, "--training.device_batch_size", "4", "--training.precision", "bf16"], command="plan"
    )
    assert recipe.data is not None
    mllm = load_mllm(mllm_dir, device="cpu")
    dataset, config = InstructionDataset(recipe.data, mllm.processor), mllm.model.config
    cuda: Any = SimpleNamespace(device=torch.device("cuda"), world_size=1)
    arguments = TrainingArguments(**training_arguments(recipe.training, tmp_path))

    def line_if_available(available: float, arguments: Any, **training: Any) -> str:
        monkeypatch.setattr("clips_mllm.planning.memory_check.available_bytes", lambda _: available)
        changed = dataclasses.replace(recipe, training=dataclasses.replace(recipe.training, **training))
        return memory_line(changed, config, dataset, arguments)

    remedy = "zero3_offload.json"
    fits = memory_line(recipe, config, dataset, arguments)
    assert remedy not in fits and remedy not in line_if_available(1e12, cuda)
    assert remedy in line_if_available(5e8, arguments)
    with raises_user_error(key="training.device_batch_size", value=4) as refused:
        line_if_available(5e8, cuda)
    assert remedy in str(refused.value.remedy)
    peak = float(refused.value.problem.split(" GB")[0].split()[-1]) * 1e9
    assert remedy in line_if_available(0.95 * peak, cuda), "within the tolerance"
    assert remedy in line_if_available(1e6, cuda, extra={"optim": "adafactor"}), "the optimizer is not AdamW"


@pytest.mark.parametrize(
    ("words", "fields"),
    [
        ([], {"key": "--config"}),
        ([*ALIGN, "--devices", "3"], {}),
        ([*ALIGN, "--devices", "0"], {"key": "devices", "value": 0}),
        ([*ALIGN, "--slack", "-1"], {"key": "slack", "value": -1}),
        ([*ALIGN, "--model.llm", "runs/nowhere"], {"file": "runs/nowhere", "key": "model.llm"}),
        ([*ALIGN, "--model.feature_layer", "25"], {"key": "model.feature_layer", "value": 25}),
        (
            [*QLORA, "--training.deepspeed", "configs/deepspeed/zero3.json"],
            {"key": "training.deepspeed", "value": "configs/deepspeed/zero3.json"},
        ),
    ],
)
def test_bad_input_is_refused(words: list[str], fields: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    with raises_user_error(**fields):
        main(words)


def test_plan_without_data_needs_no_torch(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "configs", tmp_path / "configs")
    code = (
        "import sys; sys.modules['torch'] = sys.modules['transformers'] = None\n"
        "from clips_mllm.plan import main; main(['--config', 'configs/mllm/llama3_8b_finetune.yaml', '--devices', '8'])"
    )
    environment = {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "LLM 8,030.3 M" in done.stdout
