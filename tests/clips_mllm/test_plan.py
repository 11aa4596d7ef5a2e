"""`clips-mllm plan`: sizes against real models, components by hand, the recipes as they are, errors."""

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
from clips_mllm.plan import main
from clips_mllm.planning.memory import Setup, block_bytes, estimate, logit_bytes, optimiser_bytes, weight_bytes
from clips_mllm.planning.memory_check import memory_line
from clips_mllm.planning.recipe import PlanRecipe
from clips_mllm.planning.shapes import (
    CLIP_L336,
    CLIPS_L84,
    LLAMA_3_8B,
    VICUNA_7B,
    Shape,
    llm_shape,
    read_shape,
    tower_shape,
)
from clips_mllm.planning.timing import sample_flops
from vision_tower.common.errors import UserError
from vision_tower.common.recipe import parse_recipe
from vision_tower.training.model_tools import compile_blocks

ROOT = Path(__file__).parents[2]
QLORA = ["--config", "configs/mllm/vicuna_7b_finetune_qlora.yaml"]
SHAPE = Shape(tower=CLIP_L336, llm=VICUNA_7B)


def planned(capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, Any]:
    main([*words, "--json"])
    return dict(json.loads(capsys.readouterr().out))


def test_sizes_equal_those_of_real_models(mllm_dir: Path) -> None:
    model = load_mllm(mllm_dir, device="cpu", dtype="float32").model
    shape = read_shape(tower=None, llm=None, checkpoint=str(mllm_dir))
    assert shape.parameters == pytest.approx(sum(value.numel() for value in model.parameters()), rel=0.001)
    assert shape.projector == sum(value.numel() for value in model.model.multi_modal_projector.parameters())
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
    """Their model cards: 6.74 B, 8.03 B, 303 M; LLaVA's projector for CLIP-L has 21 M."""
    assert VICUNA_7B.parameters == 6_738_415_616
    assert LLAMA_3_8B.parameters == 8_030_261_248
    assert CLIP_L336.parameters == pytest.approx(303.5e6, rel=0.002)
    assert SHAPE.projector == 1025 * 4096 + 4097 * 4096


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
    assert llm_shape(config.to_dict(), "here").lora(8) == trained


@pytest.mark.parametrize(("zero", "weights", "optimiser"), [(0, 6.0, 8.0), (2, 2.0, 3.0), (3, 0.5, 3.0)])
def test_what_zero_divides(zero: int, weights: float, optimiser: float) -> None:
    """Bytes a parameter over four devices, of arXiv 1910.02054's 2 + 2 + 12; without DeepSpeed fp32 and a bf16 copy."""
    setup = Setup(shape=SHAPE, train_llm=True, train_tower=True, zero=zero, devices=4)
    assert setup.trainable == SHAPE.parameters
    assert weight_bytes(setup) == pytest.approx(weights * SHAPE.parameters)
    assert optimiser_bytes(setup) == pytest.approx(optimiser * SHAPE.parameters)
    assert optimiser_bytes(dataclasses.replace(setup, mixed=False)) == optimiser_bytes(setup), (
        "ZeRO has masters of fp32"
    )


@pytest.mark.parametrize("adapter", ["none", "lora"])
def test_a_frozen_llm_without_deepspeed_is_in_bf16(adapter: Literal["none", "lora"]) -> None:
    """Two bytes of what is frozen, as PEFT's original of the projector; what trains has four, autocast's copy two."""
    setup = Setup(shape=SHAPE, train_llm=adapter == "lora", adapter=adapter, rank=8, zero=0)
    frozen = VICUNA_7B.parameters + SHAPE.tower.parameters + SHAPE.projector * (adapter == "lora")
    assert weight_bytes(setup) == pytest.approx(2 * frozen + 6 * setup.trainable)


def test_four_bits() -> None:
    setup = Setup(shape=SHAPE, train_llm=True, adapter="qlora", rank=64, zero=2)
    rest = VICUNA_7B.parameters - VICUNA_7B.matrices + SHAPE.tower.parameters + SHAPE.projector + setup.trainable
    assert weight_bytes(setup) == pytest.approx(VICUNA_7B.matrices * 0.515875 + 2 * rest)
    assert weight_bytes(setup) < 0.4 * weight_bytes(dataclasses.replace(setup, adapter="lora"))


def test_logits_are_paid_for_where_there_is_supervision() -> None:
    setup = Setup(shape=SHAPE, batch=4, tokens=700, supervised=30)
    assert logit_bytes(setup) == 4 * 30 * 32000 * 14
    assert logit_bytes(dataclasses.replace(setup, tokens=2000)) == logit_bytes(setup)


@pytest.mark.parametrize(("attention", "compiled"), [("sdpa", False), ("eager", False), ("sdpa", True)])
@pytest.mark.parametrize("trains", [True, False])
def test_kept_activations_equal_those_that_autograd_keeps(trains: bool, attention: str, compiled: bool) -> None:
    """Every tensor that a block of transformers' LLaMA saves for its backward pass, counted once, in bf16."""
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
            held.append(value)  # so that no address is used twice
            return value

        held: list[torch.Tensor] = []
        states = torch.randn(2, 50, 64, dtype=torch.bfloat16, requires_grad=True)
        angles = model.model.rotary_emb(states, torch.arange(50)[None])
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda value: value):
            for block in model.model.layers[:layers]:
                states = block(states, position_embeddings=angles)
        return sum(seen.values())

    shape = Shape(tower=CLIPS_L84, llm=llm_shape(config.to_dict(), "here"))
    measured = (kept(4) - kept(2)) / 2 / 100
    setup = Setup(shape=shape, train_llm=trains, tokens=50, eager=attention == "eager", compiled=compiled)
    assert block_bytes(setup) == pytest.approx(measured, rel=0.1)


def test_checkpointing_zero_and_offload_save_memory() -> None:
    setup = Setup(shape=SHAPE, train_llm=True, zero=2, devices=8, batch=8)
    plain = estimate(setup)
    assert estimate(dataclasses.replace(setup, checkpointing=True)).activations < 0.1 * plain.activations
    assert estimate(dataclasses.replace(setup, zero=3)).weights == pytest.approx(plain.weights / 8)
    away = estimate(dataclasses.replace(setup, zero=3, offload_optimizer=True, offload_weights=True))
    assert away.weights == away.optimiser == 0 and away.host > 12 * setup.trainable / 8
    here = dataclasses.replace(setup, kind="cpu", offload_optimizer=True)
    assert estimate(here) == estimate(dataclasses.replace(here, offload_optimizer=False)), "the host is the device"
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
def test_the_plan_of_the_quickstart_agrees_with_what_was_measured(
    measured: float, stage: dict[str, Any], changed: dict[str, Any]
) -> None:
    """The largest memory that the training process held, of docs/log.md; the commands stand there."""
    shape = read_shape(tower=None, llm=None, checkpoint="runs/quickstart/align")
    values = {"zero": 2, "bucket": 5e7, "eager": True, "kind": "cpu"} | stage | changed
    assert estimate(Setup(shape=shape, **values)).total == pytest.approx(measured, rel=0.1)


def test_operations_of_a_sample() -> None:
    """6 N for each token of a dense model that trains, 4 N where it is frozen, 2 N more with checkpointing."""
    small = dataclasses.replace(CLIPS_L84, layers=0, width=1)
    setup = Setup(shape=Shape(tower=small, llm=VICUNA_7B), train_llm=True, supervised=0, images=0)
    attention = 12 * 10**2 * VICUNA_7B.query * 32
    assert sample_flops(setup, 10) == 6 * VICUNA_7B.matrices * 10 + attention
    frozen = dataclasses.replace(setup, train_llm=False)
    assert sample_flops(frozen, 10) == 4 * VICUNA_7B.matrices * 10 + attention
    again = dataclasses.replace(setup, checkpointing=True)
    assert sample_flops(again, 10) == 8 * VICUNA_7B.matrices * 10 + attention * 4 / 3


# --- the command ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("file", sorted((ROOT / "configs" / "mllm").glob("*.yaml")), ids=lambda file: file.stem)
def test_every_recipe_can_be_planned_without_its_files(
    file: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    plan = planned(capsys, "--config", str(file))
    parts = plan["memory"]
    named = ("process", "weights", "gradients", "optimiser", "activations", "logits", "buffers", "slack")
    assert parts["total"] == pytest.approx(sum(parts[name] for name in named))
    batch = plan["batch"]
    assert batch["device"] * batch["devices"] * batch["accumulation"] == batch["global"]


@pytest.fixture
def words(mllm_dir: Path, sample_world: Path) -> list[str]:
    """Stage 2 on the sample world."""
    world = sample_world / "llava"
    values = {"model.checkpoint": mllm_dir, "data.file": world / "stage2.json", "data.images": world / "images"}
    return [f"--{name}={value}" for name, value in (values | {"data.template": "chatml"}).items()]


def test_lengths_come_from_the_data(words: list[str], mllm_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from clips_mllm.data.dataset import InstructionDataset

    plan = planned(capsys, *words, "--training.global_batch_size", "8", "--training.device_batch_size", "4")
    recipe = parse_recipe(PlanRecipe, words, command="plan")
    assert recipe.data is not None
    dataset = InstructionDataset(recipe.data, load_mllm(mllm_dir, device="cpu").processor)
    rendered = [dataset.load(at)[1] for at in range(len(dataset))]
    found = plan["lengths"]
    assert found["samples"] == len(dataset) and found["measured"]
    assert found["longest"] == pytest.approx(max(len(one.ids) for one in rendered), rel=0.1)
    learnt = [sum(label != -100 for label in one.labels) for one in rendered]
    assert found["supervised"] == pytest.approx(sum(learnt) / len(learnt), rel=0.15)
    assert plan["steps"] == len(dataset) // 8
    smaller = planned(capsys, *words, "--training.global_batch_size", "36", "--training.device_batch_size", "4")
    assert smaller["steps"] == -(-len(dataset) // 36), "an epoch ends with a smaller step, as the engine counts"


def test_an_adapter_has_the_sizes_of_its_base(
    words: list[str], mllm_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(mllm_dir)}))
    adapter = planned(capsys, *words, f"--model.checkpoint={tmp_path}")
    assert adapter["parameters"] == planned(capsys, *words)["parameters"]


def test_every_form_of_a_row_is_read(words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A row that training leaves out, for want of its image's placeholder, does not stand in the way."""
    said = [{"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": "a red square"}]
    spoken = [{"role": "user", "content": said[0]["value"]}, {"role": "assistant", "content": said[1]["value"]}]
    forms: list[dict[str, Any]] = [
        {"image": "a.png", "conversations": said},
        {"image": "a.png", "conversations": json.dumps(said)},
        {"images": ["a.png"], "messages": spoken},
        {"images": ["a.png"], "texts": [{"user": "What is it?", "assistant": "a red square"}]},
    ]
    found = []
    for rows in ([form] for form in forms):
        (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [*rows, {"image": "a.png"}]))
        found.append(planned(capsys, *words, f"--data.file={tmp_path / 'rows.jsonl'}")["lengths"])
    assert all(one == found[0] for one in found[1:]) and found[0]["images"] == 1


def test_plain_writes_no_question(words: list[str], mllm_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from clips_mllm.data.dataset import InstructionDataset

    words = [*words, "--data.template=plain"]
    found = planned(capsys, *words)["lengths"]
    recipe = parse_recipe(PlanRecipe, words, command="plan")
    assert recipe.data is not None
    dataset = InstructionDataset(recipe.data, load_mllm(mllm_dir, device="cpu").processor)
    lengths = [len(dataset.load(at)[1].ids) for at in range(len(dataset))]
    assert found["longest"] == pytest.approx(max(lengths), rel=0.1)
    assert found["mean"] == pytest.approx(sum(lengths) / len(lengths), rel=0.1)


def test_weights_and_caps_of_a_mixture_are_counted(
    words: list[str], sample_world: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As the run will choose: its own dataset says how many samples and which is the longest."""
    from clips_mllm.data.dataset import InstructionDataset

    world = sample_world / "llava"
    mixture = [
        {"file": str(world / "stage2.json"), "images": str(world / "images"), "weight": 1.5, "cap": 9},
        {"file": str(world / "stage1.json"), "images": str(world / "images"), "weight": 0.25},
    ]
    checkpoint = next(word for word in words if word.startswith("--model.checkpoint="))
    asked = [checkpoint, f"--data.mixture={json.dumps(mixture)}", "--data.template=chatml"]
    found = planned(capsys, *asked)["lengths"]
    recipe = parse_recipe(PlanRecipe, asked, command="plan")
    assert recipe.data is not None
    dataset = InstructionDataset(recipe.data, load_mllm(checkpoint.partition("=")[2], device="cpu").processor)
    assert found["samples"] == len(dataset)
    longest = max(len(dataset.load(at)[1].ids) for at in range(len(dataset)))
    assert found["longest"] == pytest.approx(longest, rel=0.1)


def test_cpus_are_those_of_this_machine(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    words = ["--config", "configs/mllm/quickstart_finetune.yaml", "--training.precision", "fp32", "--device", "cpu"]
    words += ["--training.device_batch_size", "2"]
    monkeypatch.setattr("os.cpu_count", lambda: 4)
    own, said = planned(capsys, *words), planned(capsys, *words, "--tflops", "0.17", "--utilisation", "0.3")
    assert own["memory"]["available"] == psutil.virtual_memory().total
    assert said["seconds"] == pytest.approx(4 * own["seconds"])
    two = planned(capsys, *words, "--devices", "2")
    assert two["memory"]["available"] == psutil.virtual_memory().total / 2, "ranks share the memory"
    assert two["seconds"] == pytest.approx(own["seconds"]), "and the cores"


def test_the_report_for_people(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    main(["--config", "configs/mllm/vicuna_7b_finetune.yaml", "--devices", "8"])
    text = capsys.readouterr().out
    assert "LLM 6,738.4 M" in text and "128 = 16 x 8 gpu x 1 accumulation" in text and "fits into 80 GB" in text
    main(["--config", "configs/mllm/vicuna_7b_finetune.yaml", "--devices", "1", "--memory_gb", "24"])
    assert "does NOT fit into 24 GB" in capsys.readouterr().out


def test_the_table(capsys: pytest.CaptureFixture[str]) -> None:
    main(["--table"])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines[0].split("|")) == 2 + 2 + 9
    cells = {tuple(line.split(" | ")[:2]): line.split(" | ")[2:] for line in lines[2:14]}
    seven = cells["| Vicuna 7B", "finetune"]
    assert seven[0].startswith("Z3 opt") and seven[8].startswith("Z2"), "one GPU needs offload, eight of 80 GB do not"
    assert all("Z3" not in cell for cell in cells["| Vicuna 7B", "qlora"])


def test_before_step_1(words: list[str], mllm_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU that is too small ends the run before it begins; a CPU whose memory is taken now is told of."""
    from transformers import TrainingArguments

    from clips_mllm.data.dataset import InstructionDataset
    from vision_tower.training.arguments import training_arguments

    recipe = parse_recipe(
        PlanRecipe, [*words, "--training.device_batch_size", "4", "--training.precision", "bf16"], command="plan"
    )
    assert recipe.data is not None
    mllm = load_mllm(mllm_dir, device="cpu")
    dataset = InstructionDataset(recipe.data, mllm.processor)
    arguments = TrainingArguments(**training_arguments(recipe.training, tmp_path))
    line = memory_line(recipe, mllm.model.config, dataset, arguments)
    assert line.startswith("memory estimate: ") and line.endswith("GB on each cpu at the peak")
    monkeypatch.setattr("clips_mllm.planning.memory_check.available_bytes", lambda _: 5e8)
    assert "which is not free now; take a smaller" in memory_line(recipe, mllm.model.config, dataset, arguments)
    cuda = SimpleNamespace(device=torch.device("cuda"), world_size=1)
    with pytest.raises(UserError, match=r"training.device_batch_size=4: memory estimate: .* take a smaller") as refused:
        memory_line(recipe, mllm.model.config, dataset, cuda)  # type: ignore[arg-type]
    peak = float(str(refused.value).split("estimate: ")[1].split()[0]) * 1e9
    monkeypatch.setattr("clips_mllm.planning.memory_check.available_bytes", lambda _: 0.95 * peak)
    nearly = memory_line(recipe, mllm.model.config, dataset, cuda)  # type: ignore[arg-type]
    assert "which may not do; take a smaller" in nearly
    monkeypatch.setattr("clips_mllm.planning.memory_check.available_bytes", lambda _: 1e6)
    lean = dataclasses.replace(recipe, training=dataclasses.replace(recipe.training, extra={"optim": "adafactor"}))
    assert "which may not do" in memory_line(lean, mllm.model.config, dataset, cuda)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "no recipe; give --config configs/mllm/NAME.yaml, or --table"),
        (["--config", "configs/mllm/vicuna_7b_align.yaml", "--devices", "3"], "is not a multiple of device_batch_size"),
        (["--config", "configs/mllm/vicuna_7b_align.yaml", "--devices", "0"], "devices=0: must be above 0"),
        (["--config", "configs/mllm/vicuna_7b_align.yaml", "--model.llm", "runs/nowhere"], "no config.json there"),
        (
            ["--config", "configs/mllm/vicuna_7b_align.yaml", "--model.feature_layer", "25"],
            "model.feature_layer=25: the tower has hidden states 0 to 24",
        ),
        (
            [*QLORA, "--training.deepspeed", "configs/deepspeed/zero3.json"],
            "training.deepspeed=configs/deepspeed/zero3.json: ZeRO-3 cannot divide 4-bit weights",
        ),
    ],
)
def test_errors(words: list[str], message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    with pytest.raises(UserError, match=message):
        main(words)


def test_no_torch_is_needed(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "configs", tmp_path / "configs")
    code = (
        "import sys; sys.modules['torch'] = sys.modules['transformers'] = None\n"
        "from clips_mllm.plan import main; main(['--config', 'configs/mllm/llama3_8b_finetune.yaml', '--devices', '8'])"
    )
    environment = {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "LLM 8,030.3 M" in done.stdout
