"""Initial weights of the projector: default, standardized, from a file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from clips_mllm.data.recipe import InstructionRecipe
from clips_mllm.formats.original_weights import write_projector
from clips_mllm.model.checkpoint import load_parts
from clips_mllm.model.recipe import MllmRecipe
from clips_mllm.training.projector import default_weights, initialize_projector, read_features, read_weights
from clips_mllm.training.recipe import MllmTraining, TrainRecipe
from tests.helpers.errors import raises_user_error
from tests.helpers.train_runs import ROOT, deepspeed_launcher, launch_several, weights, words

PROJECTOR = "model.multi_modal_projector."


def initialize(model: Any, images: Any = None, **recipe: Any) -> None:
    initialize_projector(
        model,
        MllmRecipe(tower="t", llm="l", **recipe),
        seed=3,
        device=torch.device("cpu"),
        images=lambda: {"pixel_values": images},
    )


def test_default_is_torchs_initialization_of_linear_layers(mllm_dir: Path) -> None:
    model, _ = load_parts(mllm_dir, dtype=torch.float32)
    projector = model.model.multi_modal_projector
    torch.manual_seed(3)
    wanted = {
        f"{name}.{part}": value
        for name, layer in (("linear_1", projector.linear_1), ("linear_2", projector.linear_2))
        for part, value in nn.Linear(layer.in_features, layer.out_features).state_dict().items()
    }
    torch.manual_seed(0)
    initialize(model)
    after = torch.rand(1)
    state = projector.state_dict()
    assert set(state) == set(wanted) and all(torch.equal(state[name], wanted[name]) for name in wanted)
    torch.manual_seed(0)
    assert torch.equal(after, torch.rand(1)), "the run's random state is untouched"


@pytest.mark.slow
def test_default_is_the_same_under_every_zero_stage(sample_world: Path, encoder_dir: Path, tmp_path: Path) -> None:
    """Two ranks, one step with a learning rate of 0; the tiled model adds image_newline to the projector."""
    values = {
        "model.tower": encoder_dir / "tower",
        "model.llm": sample_world / "llm",
        "model.tiles": 2,
        "data.file": sample_world / "llava" / "stage1.json",
        "training.max_steps": 1,
        "training.learning_rate": 0,
        "training.device_batch_size": 4,
    }
    folders = {stage: tmp_path / f"zero{stage}" for stage in range(4)}
    runs = [
        words(folder, sample_world, **values, **{"training.deepspeed": ROOT / f"configs/deepspeed/{folder.name}.json"})
        for folder in folders.values()
    ]
    launch_several(deepspeed_launcher(), tmp_path / "runs.json", *runs)
    model, _ = load_parts(folders[0], dtype=torch.float32)
    wanted = {PROJECTOR + name: value for name, value in default_weights(model, seed=0).items()}
    wanted["model.image_newline"] = wanted.pop(PROJECTOR + "image_newline")
    for folder in folders.values():
        trained = weights(folder)
        assert all(torch.equal(trained[name], value) for name, value in wanted.items()), folder.name


def test_standardized_normalizes_inputs_and_scales_outputs_to_word_embeddings(mllm_dir: Path) -> None:
    model, _ = load_parts(mllm_dir, dtype=torch.float32)
    torch.manual_seed(0)
    pixels = torch.randn(12, 3, 96, 96) * 3 + 2
    initialize(model, pixels, projector_init="standardized")
    features = read_features(model, pixels)
    projector = model.model.multi_modal_projector
    hidden = projector.linear_1(features)
    assert hidden.mean(dim=0).abs().max() < 1e-4
    assert 0.5 < hidden.std() < 2
    norm = model.get_input_embeddings().weight.norm(dim=1).mean()
    torch.testing.assert_close(projector(features).norm(dim=1).mean(), norm)


def test_features_are_the_inputs_of_the_projector(mllm_dir: Path) -> None:
    model, _ = load_parts(mllm_dir, dtype=torch.float32)
    pixels = torch.randn(2, 3, 96, 96)
    states = model.model.vision_tower(pixels, output_hidden_states=True).hidden_states
    torch.testing.assert_close(read_features(model, pixels), states[-2].flatten(0, 1))


@pytest.mark.parametrize("prefix", ["", "multi_modal_projector.", PROJECTOR])
def test_file_with_stock_names_is_read(prefix: str, mllm_dir: Path, tmp_path: Path) -> None:
    model, _ = load_parts(mllm_dir, dtype=torch.float32)
    wanted = {name: torch.randn_like(value) for name, value in model.model.multi_modal_projector.state_dict().items()}
    file = tmp_path / "projector.safetensors"
    save_file({prefix + name: value for name, value in wanted.items()}, file)
    initialize(model, projector=str(file))
    state = model.model.multi_modal_projector.state_dict()
    assert all(torch.equal(state[name], value) for name, value in wanted.items())


def test_mm_projector_bin_of_llava_is_read(mllm_dir: Path, tmp_path: Path) -> None:
    model, _ = load_parts(mllm_dir, dtype=torch.float32)
    write_projector(mllm_dir, tmp_path, "some/tower")
    found = read_weights(tmp_path / "mm_projector.bin", model)
    state = model.model.multi_modal_projector.state_dict()
    assert set(found) == set(state)
    assert all(torch.equal(found[name], value) for name, value in state.items())


def test_file_of_another_model_is_refused(mllm_dir: Path, tmp_path: Path) -> None:
    model, _ = load_parts(mllm_dir, dtype=torch.float32)
    state = model.model.multi_modal_projector.state_dict()
    for number, wrong in enumerate(({}, {"linear_1.weight": torch.zeros(3, 3)}, {"linear_3.weight": torch.zeros(1)})):
        file = tmp_path / f"{number}.safetensors"
        values = {"linear_1.bias": state["linear_1.bias"]} if not wrong else state | wrong
        save_file({name: value.clone() for name, value in values.items()}, file)
        with raises_user_error(file=file, key="model.projector"):
            read_weights(file, model)


@pytest.mark.parametrize(
    ("values", "key"),
    [
        ({"checkpoint": "x", "projector": "p"}, "model.projector"),
        ({"checkpoint": "x", "projector_init": "standardized"}, "model.projector_init"),
        ({"tower": "t", "llm": "l", "projector": "p", "projector_init": "standardized"}, "model.projector_init"),
    ],
)
def test_options_without_effect_are_refused(values: dict[str, Any], key: str) -> None:
    with raises_user_error(key=key):
        MllmRecipe(**values).check()


def test_standardized_is_refused_under_zero_3() -> None:
    recipe = TrainRecipe(
        output_dir="o",
        model=MllmRecipe(tower="t", llm="l", projector_init="standardized"),
        data=InstructionRecipe(file="f", template="plain"),
        training=MllmTraining(deepspeed=str(ROOT / "configs/deepspeed/zero3.json")),
    )
    with raises_user_error(key="model.projector_init", value="standardized"):
        recipe.check()
