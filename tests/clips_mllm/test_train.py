"""`clips-mllm train`: the loss, trainable parts of a stage, run folder, compilation."""

from __future__ import annotations

import functools
import gc
import re
import sys
from pathlib import Path

import pytest
import torch
from torch.nn.functional import cross_entropy

from clips_mllm.data.collator import InstructionCollator
from clips_mllm.data.dataset import InstructionDataset
from clips_mllm.data.recipe import InstructionRecipe
from clips_mllm.model.checkpoint import load_mllm
from clips_mllm.model.recipe import AdapterRecipe
from clips_mllm.prompts.conversation import IGNORED
from clips_mllm.train import main
from clips_mllm.training import stages as stages_module
from clips_mllm.training.recipe import StageRecipe
from clips_mllm.training.stages import apply_stage, optimizer_groups, trained_line
from clips_mllm.training.trainer import supervised_loss
from tests.helpers.errors import raises_user_error
from tests.helpers.train_runs import losses, weights, words


def part(name: str) -> str:
    for key, found in (("vision_tower", "tower"), ("multi_modal_projector", "projector")):
        if key in name:
            return found
    return "llm"


# --- the loss ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def batch(sample_world: Path, mllm_dir: Path) -> dict[str, torch.Tensor]:
    """Multi-turn, two images and text-only in one batch."""
    recipe = InstructionRecipe(
        file=str(sample_world / "llava" / "stage2.json"),
        images=str(sample_world / "llava" / "images"),
        template="chatml",
    )
    processor = load_mllm(mllm_dir, device="cpu", dtype="float32").processor
    processor.tokenizer.padding_side = "right"
    dataset = InstructionDataset(recipe, processor)
    by_images: dict[int, int] = {len(example.images): at for at, example in enumerate(dataset.examples)}
    assert set(by_images) == {0, 1, 2}
    return InstructionCollator(processor)([dataset[at] for at in by_images.values()])


def test_loss_equals_the_stock_loss(mllm_dir: Path, batch: dict[str, torch.Tensor]) -> None:
    model = load_mllm(mllm_dir, device="cpu", dtype="float32").model
    stock = model(**batch).loss
    stock.backward()
    wanted = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    seen: list[torch.Size] = []
    watcher = model.lm_head.register_forward_hook(lambda _, inputs, __: seen.append(inputs[0].shape))
    summed, count = supervised_loss(model, model, batch)
    watcher.remove()
    (summed / count).backward()
    assert count == (batch["labels"][:, 1:] != IGNORED).sum()
    assert seen == [torch.Size([1, int(count), model.config.text_config.hidden_size])]
    assert (summed / count - stock).abs() < 1e-6
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert set(found) == set(wanted)
    assert max((found[name] - wanted[name]).abs().max() for name in wanted) < 1e-5
    assert model(**batch).logits.shape[:2] == batch["input_ids"].shape, "logits at all positions again"


def test_loss_by_hand(mllm_dir: Path, batch: dict[str, torch.Tensor]) -> None:
    """The logits at position t predict token t + 1."""
    model = load_mllm(mllm_dir, device="cpu", dtype="float32").model
    labels = batch["labels"]
    with torch.no_grad():
        summed, _ = supervised_loss(model, model, batch)
        logits = model(**{name: value for name, value in batch.items() if name != "labels"}).logits
        by_hand = torch.zeros(())
        for row, places in enumerate(labels):
            for at in range(1, len(places)):
                if places[at] != IGNORED:
                    by_hand += cross_entropy(logits[row, at - 1], places[at])
    torch.testing.assert_close(summed, by_hand)


# --- stages -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("own", [None, 1e-5])
def test_every_trainable_parameter_is_in_one_group(mllm_dir: Path, own: float | None) -> None:
    model = load_mllm(mllm_dir, device="cpu", dtype="float32").model
    stage = StageRecipe(llm=True, projector_learning_rate=own)
    apply_stage(model, stage)
    groups = optimizer_groups(model, stage, weight_decay=0.1)
    placed = [id(p) for group in groups for p in group["params"]]
    trainable = {id(p) for p in model.parameters() if p.requires_grad}
    assert sorted(placed) == sorted(trainable), "tied weights once, the frozen tower never"
    names = {id(p): name for name, p in model.named_parameters()}
    for group in groups:
        for parameter in group["params"]:
            name = names[id(parameter)]
            assert group.get("lr") == (own if part(name) == "projector" else None), name
            norm_or_bias = parameter.ndim == 1
            assert not (norm_or_bias and group["weight_decay"]), name


@pytest.mark.skipif(sys.platform != "linux", reason="/proc")
def test_frozen_weights_do_not_keep_the_checkpoint_mapped(mllm_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The engine copies trained weights (here: clone); frozen ones alone would keep the whole file mapped."""

    def mapped() -> bool:
        return str(mllm_dir.resolve() / "model.safetensors") in Path("/proc/self/maps").read_text()

    clone_frozen_weights = stages_module.clone_frozen_weights
    monkeypatch.setattr(stages_module, "clone_frozen_weights", lambda _: None)
    model = load_mllm(mllm_dir, device="cpu").model
    apply_stage(model, StageRecipe(llm=True))
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.clone()
    gc.collect()
    assert mapped()
    clone_frozen_weights(model)
    gc.collect()
    assert not mapped()


@pytest.mark.parametrize(
    ("stage", "key"),
    [
        (StageRecipe(projector=False), "stage"),
        (StageRecipe(tower_from_layer=1), "stage.tower_from_layer"),
        (StageRecipe(llm_learning_rate=1e-5), "stage.llm_learning_rate"),
        (StageRecipe(projector_learning_rate=-1.0), "stage.projector_learning_rate"),
        (StageRecipe(llm=True, adapter=AdapterRecipe(rank=4)), "stage.adapter.rank"),
        (StageRecipe(adapter=AdapterRecipe(kind="lora")), "stage.adapter.kind"),
        (StageRecipe(tower=True, adapter=AdapterRecipe(kind="qlora")), "stage.adapter.kind"),
        (StageRecipe(llm=True, adapter=AdapterRecipe(kind="lora", rank=0)), "stage.adapter.rank"),
    ],
)
def test_invalid_stages_are_refused(stage: StageRecipe, key: str) -> None:
    with raises_user_error(key=key):
        stage.check()


@pytest.mark.parametrize(("layer", "first", "expected"), [(-2, 0, {"embeddings", "0"}), (-1, 1, {"1"}), (2, 1, {"1"})])
def test_tower_trains_up_to_the_layer_of_the_projector(
    mllm_dir: Path, batch: dict[str, torch.Tensor], layer: int, first: int, expected: set[str]
) -> None:
    """Trainable weights get a gradient; later blocks stay frozen."""
    model = load_mllm(mllm_dir, device="cpu", dtype="float32").model
    model.config.vision_feature_layer = layer
    stage = StageRecipe(tower=True, tower_from_layer=first, tower_learning_rate=1e-6)
    assert apply_stage(model, stage) is model
    line = trained_line(model, stage)
    assert "llm frozen" in line and "tower trains" in line
    tower = model.model.vision_tower
    names = [name for name, weights in tower.named_parameters() if weights.requires_grad]
    blocks = [re.search(r"layers\.(\d+)\.", name) for name in names]
    assert {"embeddings" if block is None else block[1] for block in blocks} == expected
    summed, _ = supervised_loss(model, model, batch)
    summed.backward()
    assert all(weights.grad is not None for weights in model.parameters() if weights.requires_grad)
    own = [group for group in optimizer_groups(model, stage, 0.1) if group.get("lr") == 1e-6]
    placed = {id(weights) for group in own for weights in group["params"]}
    assert placed == {id(weights) for weights in tower.parameters() if weights.requires_grad}


@pytest.fixture(scope="module")
def stages(sample_world: Path, encoder_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Both stages by the command: align from tower and LLM, finetune from the checkpoint of align."""
    folder = tmp_path_factory.mktemp("stages")
    main(
        words(
            folder / "align",
            sample_world,
            **{
                "data.file": sample_world / "llava" / "stage1.json",
                "data.template": "plain",
                "model.tower": encoder_dir / "tower",
                "model.llm": sample_world / "llm",
                "training.gradient_checkpointing": "true",
            },
        )
    )
    main(words(folder / "finetune", sample_world, **{"model.checkpoint": folder / "align", "stage.llm": "true"}))
    return folder / "align", folder / "finetune"


def test_stage_1_changes_only_the_projector(stages: tuple[Path, Path], sample_world: Path, encoder_dir: Path) -> None:
    from transformers import AutoModel, AutoModelForCausalLM

    model = load_mllm(stages[0], device="cpu", dtype="float32").model
    llm = AutoModelForCausalLM.from_pretrained(sample_world / "llm", dtype=torch.float32)
    rows = llm.get_input_embeddings().num_embeddings
    trained = model.model.language_model.state_dict()
    for name, value in llm.model.state_dict().items():
        same = trained[name][:rows] if name == "embed_tokens.weight" else trained[name]
        assert torch.equal(same, value), name
    tower = AutoModel.from_pretrained(encoder_dir / "tower", dtype=torch.float32).state_dict()
    found = model.model.vision_tower.state_dict()
    assert set(found) == set(tower)
    assert all(torch.equal(found[name], value) for name, value in tower.items())
    assert len(set(losses(stages[0]))) == 3, "the projector trains"


def test_stage_2_changes_llm_and_projector(stages: tuple[Path, Path]) -> None:
    before, after = (weights(folder) for folder in stages)
    changed = {name: not torch.equal(before[name], after[name]) for name in before}
    assert set(before) == set(after)
    assert not any(moved for name, moved in changed.items() if part(name) == "tower")
    assert all(moved for name, moved in changed.items() if part(name) == "projector")
    assert all(moved for name, moved in changed.items() if part(name) == "llm")


def test_tied_embeddings_stay_tied(stages: tuple[Path, Path]) -> None:
    from safetensors import safe_open

    for folder in stages:
        model = load_mllm(folder, device="cpu").model
        assert model.lm_head.weight is model.model.language_model.embed_tokens.weight
        with safe_open(folder / "model.safetensors", "pt") as file:
            assert sum("embed_tokens" in name or "lm_head" in name for name in file.keys()) == 1  # noqa: SIM118


def test_run_folder_is_complete(stages: tuple[Path, Path]) -> None:
    """The checkpoint has the stage's template, recipe.yaml reproduces the recipe, temporary files are removed."""
    from clips_mllm.prompts.render import load_template
    from clips_mllm.training.recipe import TrainRecipe
    from vision_tower.common.recipe import dump_recipe, parse_recipe

    for folder, template in zip(stages, ("plain", "chatml"), strict=True):
        assert load_mllm(folder).processor.chat_template == load_template(template)  # type: ignore[arg-type]
        recipe = parse_recipe(TrainRecipe, ["--config", str(folder / "recipe.yaml")], command="train")
        assert dump_recipe(recipe) == (folder / "recipe.yaml").read_text()
        assert {"provenance.json", "metrics.jsonl"} <= {path.name for path in folder.iterdir()}
        assert not list(folder.glob("partial*"))


def test_gradient_checkpointing_changes_nothing(stages: tuple[Path, Path], sample_world: Path, tmp_path: Path) -> None:
    main(
        words(
            tmp_path / "run",
            sample_world,
            **{"model.checkpoint": stages[0], "stage.llm": "true", "training.gradient_checkpointing": "true"},
        )
    )
    assert losses(tmp_path / "run") == pytest.approx(losses(stages[1]), abs=1e-5)


def test_compiled_blocks_give_the_same_losses(
    mllm_dir: Path, sample_world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Traced and differentiated by the compiler; generating machine code would take half a minute."""
    from torch._dynamo.utils import counters

    quick = functools.partialmethod(torch.nn.Module.compile, backend="aot_eager")
    monkeypatch.setattr(torch.nn.Module, "compile", quick)
    monkeypatch.setattr("vision_tower.training.model_tools.check_cpp", lambda: None)
    given = {"model.checkpoint": mllm_dir, "stage.llm": "true"}
    main(words(tmp_path / "plain", sample_world, **given))
    counters.clear()
    main(words(tmp_path / "compiled", sample_world, **given, **{"training.compile": "true"}))
    assert counters["stats"]["unique_graphs"] > 0
    assert losses(tmp_path / "compiled") == pytest.approx(losses(tmp_path / "plain"), abs=1e-3)
    before, after = weights(tmp_path / "plain"), weights(tmp_path / "compiled")
    assert set(before) == set(after), "names do not change by compilation"


@pytest.mark.slow
def test_blocks_compiled_to_machine_code_give_the_same_losses(
    mllm_dir: Path, sample_world: Path, tmp_path: Path
) -> None:
    torch._dynamo.reset()
    given = {"model.checkpoint": mllm_dir, "stage.llm": "true"}
    main(words(tmp_path / "plain", sample_world, **given))
    main(words(tmp_path / "compiled", sample_world, **given, **{"training.compile": "true"}))
    assert losses(tmp_path / "compiled") == pytest.approx(losses(tmp_path / "plain"), abs=1e-3)


@pytest.mark.skipif(torch.cuda.is_available(), reason="on GPUs the compiler is Triton")
def test_missing_compiler_is_reported_before_step_1(
    mllm_dir: Path, sample_world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    with raises_user_error(key="training.compile"):
        main(words(tmp_path / "out", sample_world, **{"model.checkpoint": mllm_dir, "training.compile": "true"}))
