"""Strict recipes: what is wrong is named with file, key and remedy; what is right reads back equal."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import pytest
import yaml

from clips_eval.experiments.ablate_grid import AblateRecipe
from clips_eval.experiments.compare_recipe import CompareRecipe
from clips_eval.lmms.recipe import EvaluateRecipe, check_specs
from clips_mllm.sample.build import SampleRecipe
from clips_mllm.training.recipe import TrainRecipe
from tests.helpers.errors import raises_user_error
from vision_tower.common.recipe import dump_recipe, parse_recipe
from vision_tower.pretraining.recipe import PretrainRecipe
from vision_tower.text.objectives import choose_objective
from vision_tower.training.recipe import TrainingRecipe

CONFIGS = Path(__file__).parents[2] / "configs"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Part:
    """A part.

    Args:
        name: what it is called.
        weights: how heavy.
    """

    name: str
    weights: tuple[float, ...] = (1.0, 2.5)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Whole:
    """The whole thing.

    Args:
        file: where from.
        part: the part.
        parts: more of them.
        rate: how fast.
        steps: how far.
        kind: which way.
        note: anything.
        extra: more.
        embed_dim: how wide.
    """

    file: Path
    part: Part
    parts: list[Part] = dataclasses.field(default_factory=list)
    rate: float = 1e-5
    steps: int = 3
    kind: Literal["a", "b"] = "a"
    note: str | None = None
    extra: dict[str, Any] = dataclasses.field(default_factory=dict)
    embed_dim: int = 8


def parse(*words: str) -> Whole:
    return parse_recipe(Whole, list(words), command="try")


@pytest.fixture
def write(tmp_path: Path) -> Callable[[str], str]:
    def write(text: str) -> str:
        file = tmp_path / "recipe.yaml"
        file.write_text(text)
        return str(file)

    return write


@pytest.mark.parametrize(
    ("text", "key", "suggestion"),
    [
        ("stepz: 3", "stepz", "steps"),
        ("part: {name: a, wieghts: [1]}", "part.wieghts", "part.weights"),
        ("parts: [{name: a}, {nam: b}]", "parts[1].nam", "parts[1].name"),
        ("qqqqqqq: 3", "qqqqqqq", "extra, file, kind"),  # nothing near: the known keys
        ("joint: 3", "joint", "embed_dim"),  # a renamed key
    ],
)
def test_unknown_key_in_a_file(write: Callable[[str], str], text: str, key: str, suggestion: str) -> None:
    file = write(text)
    with raises_user_error(file=file, key=key) as caught:
        parse("--config", file)
    assert suggestion in (caught.value.remedy or "")


@pytest.mark.parametrize(
    "text",
    [
        "{file: f, part: {name: a}, steps: many}",
        "{file: f, part: {name: a}, steps: 1.5}",
        "{file: f, part: {name: a}, kind: c}",
        "{file: f, part: {name: a}, note: [1]}",
        "{file: f, part: {name: [1]}}",
        "{part: {name: a}, steps: many}",  # a wrong value is found although a required one is missing
        "a: [1",
        "a:\n\t- b",
        "- a",
        "",
    ],
)
def test_unusable_file(write: Callable[[str], str], text: str) -> None:
    file = write(text)
    with raises_user_error(file=file):
        parse("--config", file)


@pytest.mark.parametrize(
    "text",
    [
        "{file: f, part: 3}",
        "{file: f, part: }",
        "part: {name: a}",
        "file: f",
        "{file: f, part: {name: a}, parts: [{}]}",
    ],
)
def test_missing_value(write: Callable[[str], str], text: str) -> None:
    with raises_user_error():
        parse("--config", write(text))


def test_file_that_is_not_text(tmp_path: Path) -> None:
    (tmp_path / "recipe.yaml").write_bytes(b"\xff\xfe\x00\x81")
    for file in (tmp_path / "recipe.yaml", tmp_path / "none.yaml", tmp_path):
        with raises_user_error(file=file):
            parse(f"--config={file}")


@pytest.mark.parametrize(
    ("words", "key", "suggestion"),
    [
        (["--stepz", "4"], "--stepz", "--steps"),
        (["--step", "4"], "--step", "--steps"),
        (["--part.weigths=4"], "--part.weigths", "--part.weights"),
        (["--joint", "4"], "--joint", "--embed_dim"),
    ],
)
def test_unknown_option(words: list[str], key: str, suggestion: str) -> None:
    with raises_user_error(file=None, key=key) as caught:
        parse("--file", "f", "--part.name", "n", *words)
    assert f"'{suggestion}'" in (caught.value.remedy or "")


@pytest.mark.parametrize(
    "words",
    [
        ['--parts=[{"nam": "b"}]'],
        ['--parts=[{"name": "b", "weights": ["c"]}]'],
        ['--parts=[{"weights": [1]}]'],
        ["--part.weights=[c]"],
        ["--part=3"],
        ["--steps", "x"],
        ["--rate", "fast"],
        ["--config"],
        ["stray"],
    ],
)
def test_unusable_value_on_the_command_line(words: list[str], write: Callable[[str], str]) -> None:
    """Not blamed on a file that is correct."""
    with raises_user_error(file=None):
        parse("--config", write("{file: f, part: {name: n}}"), *words)


def test_precedence_is_command_line_then_file_then_defaults(write: Callable[[str], str]) -> None:
    file = write("{file: a.txt, part: {name: given}, rate: 1e-3, steps: 7}")
    recipe = parse("--config", file, "--steps", "9", "--part.weights", "[3]", "--extra", '{"k": [1, {"l": null}]}')
    part = Part(name="given", weights=(3.0,))
    expected = Whole(file=Path("a.txt"), part=part, rate=1e-3, steps=9, extra={"k": [1, {"l": None}]})
    assert recipe == expected
    assert type(recipe.part.weights) is tuple and type(recipe.rate) is float


@dataclasses.dataclass(frozen=True)
class Named:
    """Files.

    Args:
        files: some.
        name: one.
    """

    files: list[str] = dataclasses.field(default_factory=list)
    name: str = ""


@pytest.mark.parametrize(
    ("words", "files"),
    [
        ([], []),
        (["--files", "a.png"], ["a.png"]),
        (["--files", "a b.png", "--name", "n", "--files=c.png"], ["a b.png", "c.png"]),
        (["--files", '["a.png", "b.png"]'], ["a.png", "b.png"]),
    ],
)
def test_list_option_is_repeatable(words: list[str], files: list[str]) -> None:
    assert parse_recipe(Named, words, command="try").files == files


def test_list_option_needs_a_value() -> None:
    with raises_user_error():
        parse_recipe(Named, ["--files", "--name", "n"], command="try")


def test_dict_field_accepts_any_key() -> None:
    words = ["runs/x", "--tasks", "[{task: mme}]", "--data.my-task", "a-b.parquet"]
    recipe = parse_recipe(EvaluateRecipe, words, command="evaluate", positional=("checkpoint",))
    assert recipe.data == {"my-task": "a-b.parquet"}


def test_home_is_expanded_in_paths(write: Callable[[str], str]) -> None:
    text = "output_dir: ~/run\nmodel: {checkpoint: a~/b}\ndata: {template: plain, mixture: [{file: ~/rows.json}]}"
    recipe = parse_recipe(TrainRecipe, ["--config", write(text)], command="train")
    assert recipe.output_dir == f"{Path.home()}/run" and recipe.model.checkpoint == "a~/b"
    assert recipe.data.mixture[0].file == f"{Path.home()}/rows.json"


def test_dump_reads_back_equal(write: Callable[[str], str]) -> None:
    recipe = Whole(
        file=Path("/a b/c.txt"),
        part=Part(name="1.0", weights=()),
        parts=[Part(name="yes"), Part(name="ünï: #")],
        rate=1.234e-7,
        note="3",
        extra={"nested": {"x": 1e-9, "on": True}},
    )
    assert parse("--config", write(dump_recipe(recipe))) == recipe


KINDS: dict[str, type] = {
    "vision": PretrainRecipe,
    "ablate": AblateRecipe,
    "mllm": TrainRecipe,
    "eval": EvaluateRecipe,
    "compare": CompareRecipe,
    "data": SampleRecipe,
}
BY_PLACE = {EvaluateRecipe: {"checkpoint": "runs/model"}, CompareRecipe: {"runs": "runs/a"}}
FILES = sorted(CONFIGS.rglob("*.yaml"))


@pytest.mark.parametrize("file", FILES, ids=lambda file: f"{file.parent.name}/{file.stem}")
def test_shipped_recipe_is_valid_and_round_trips(file: Path, tmp_path: Path) -> None:
    kind = KINDS[file.parent.name]
    given = BY_PLACE.get(kind, {})
    recipe = parse_recipe(kind, ["--config", str(file), *given.values()], command="try", positional=tuple(given))
    match recipe:
        case PretrainRecipe():
            recipe.check()
        case AblateRecipe():
            run = parse_recipe(PretrainRecipe, ["--config", str(CONFIGS.parent / recipe.pretrain)], command="try")
            recipe.check(run.model.text_room)
        case TrainRecipe():
            recipe.model.check()
        case SampleRecipe():
            recipe.check()
        case CompareRecipe():
            for part in (recipe.align, recipe.finetune, recipe.evaluate, *(spec.config for spec in recipe.pretrain)):
                assert (CONFIGS.parent / part).is_file()
        case EvaluateRecipe():
            names = [spec.task for spec in recipe.tasks]
            assert names and len(set(names)) == len(names)
    training = getattr(recipe, "training", None)
    if training is not None:
        assert training.accumulation(1) >= 1
        assert training.deepspeed is None or (CONFIGS.parent / training.deepspeed).is_file()
    again = tmp_path / "again.yaml"
    again.write_text(dump_recipe(recipe))
    if kind not in BY_PLACE:
        assert parse_recipe(kind, ["--config", str(again)], command="try") == recipe


def test_configs_has_every_kind_of_recipe() -> None:
    assert {file.parent.name for file in FILES} == set(KINDS)
    for folder in KINDS:
        assert {"quickstart", "smoke"} <= {file.stem.partition("_")[0] for file in (CONFIGS / folder).glob("*.yaml")}


@pytest.mark.parametrize("file", sorted((CONFIGS / "deepspeed").glob("*.json")), ids=lambda file: file.stem)
def test_deepspeed_files_set_no_value_of_the_recipe(file: Path) -> None:
    """A number here would contradict the recipe's: batch, accumulation and clipping must come from there."""
    tree = json.loads(file.read_text())
    assert tree["zero_optimization"]["stage"] in (0, 1, 2, 3)
    for key in ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps"):
        assert tree[key] == "auto"
    assert tree["gradient_clipping"] == "auto" and "scheduler" not in tree
    if tree["zero_optimization"]["stage"] == 3:  # otherwise the final save is empty shards
        assert tree["zero_optimization"]["stage3_gather_16bit_weights_on_model_save"] is True


def test_recipes_have_the_papers_batch_sizes_and_loss_weights() -> None:
    """LLaVA-1.5's global batches at eight devices, and CLIPS's loss weights."""
    for stage, batch in (("align", 256), ("finetune", 128)):
        for model in ("vicuna_7b", "llama3_8b"):
            file = CONFIGS / "mllm" / f"{model}_{stage}.yaml"
            recipe = parse_recipe(TrainRecipe, ["--config", str(file)], command="train")
            assert recipe.training.global_batch_size == batch and recipe.training.accumulation(8) >= 1
    for file in (CONFIGS / "vision").glob("*.yaml"):
        recipe = parse_recipe(PretrainRecipe, ["--config", str(file)], command="pretrain")
        weights = choose_objective(recipe.objective, recipe.loss).weights
        assert weights == {"web": 0.5, "sub": 0.5, "caption": 2.0}


def test_accumulation() -> None:
    recipe = TrainingRecipe(global_batch_size=96, device_batch_size=8)
    assert [recipe.accumulation(world) for world in (1, 2, 4)] == [12, 6, 3]
    with raises_user_error():
        recipe.accumulation(5)


def test_wandb_without_login_is_refused_before_loading(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import wandb

    from vision_tower.training.arguments import training_arguments

    for name in ("WANDB_MODE", "WANDB_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    recipe = TrainingRecipe(max_steps=1, precision="fp32", report_to=("wandb",))
    with raises_user_error(key="training.report_to", value="wandb"):
        training_arguments(recipe, tmp_path)
    wandb.teardown()  # else it does not look at the environment again
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert training_arguments(recipe, tmp_path)["report_to"] == ["wandb"]
    wandb.teardown()
    monkeypatch.delenv("WANDB_MODE")
    (tmp_path / "wandb").mkdir()
    (tmp_path / "wandb" / "settings").write_text("[default]\nmode = offline\n")  # `wandb offline`
    monkeypatch.chdir(tmp_path)
    assert training_arguments(recipe, tmp_path)["report_to"] == ["wandb"]
    wandb.teardown()
    (tmp_path / "wandb" / "settings").unlink()
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    assert training_arguments(recipe, tmp_path)["report_to"] == ["wandb"]


def test_extra_training_arguments_are_checked_by_name(tmp_path: Path) -> None:
    from transformers import TrainingArguments

    from vision_tower.training.arguments import training_arguments

    recipe = TrainingRecipe(max_steps=1, extra={"adam_epsilon": 1e-6}, warmup_ratio=0.1, precision="fp32")
    arguments = TrainingArguments(**training_arguments(recipe, tmp_path))
    assert arguments.adam_epsilon == 1e-6 and arguments.get_warmup_steps(200) == 20
    with raises_user_error(key="training.extra.adam_epsilom") as caught:
        training_arguments(TrainingRecipe(precision="fp32", extra={"adam_epsilom": 1.0}), tmp_path)
    assert "adam_epsilon" in str(caught.value.remedy)
    with raises_user_error(key="training.extra.gradient_accumulation_steps") as caught:
        training_arguments(TrainingRecipe(precision="fp32", extra={"gradient_accumulation_steps": 4}), tmp_path)
    assert "training.global_batch_size" in str(caught.value.remedy)
    with raises_user_error(file="none.json", key="training.deepspeed"):
        training_arguments(TrainingRecipe(precision="fp32", deepspeed="none.json"), tmp_path)


def test_empty_task_list_is_refused() -> None:
    with raises_user_error():
        check_specs([])


def test_yaml_floats_without_a_dot_are_numbers(write: Callable[[str], str]) -> None:
    """YAML 1.1 reads 1e-3 as a string; people write it all the same."""
    assert yaml.safe_load("1e-3") == "1e-3"
    assert parse("--config", write("{file: f, part: {name: n}, rate: 1e-3}")).rate == 1e-3


def test_auto_precision_is_bf16_if_the_device_supports_it(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    from vision_tower.training.precision import computes_bf16, settle_precision

    def never() -> bool:
        raise AssertionError("the recipe says which")

    assert settle_precision(TrainingRecipe(precision="fp32"), never).precision == "fp32"
    assert settle_precision(TrainingRecipe(precision="bf16"), never).precision == "bf16"
    assert settle_precision(TrainingRecipe(), lambda: True).precision == "bf16"
    assert settle_precision(TrainingRecipe(), lambda: False).precision == "fp32"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for known, expected in (
        ({"avx512_bf16": True}, True),
        ({"avx512_bf16": False, "amx_bf16": True}, True),
        ({"avx512_bf16": False, "amx_bf16": False, "avx512_f": True, "cpu_name": "bf16"}, False),
        ({"bf16": True, "neon": True}, True),
    ):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda known=known: known, raising=False)
        assert computes_bf16() is expected
    monkeypatch.delattr(torch.cpu, "get_capabilities")
    assert not computes_bf16(), "a PyTorch that cannot tell"


def test_ranks_with_different_precision_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """A cluster of several kinds of machine: half a group in bf16 and half in fp32 would hang or drift."""
    import torch.distributed as dist

    from vision_tower.training.process import check_same_precision

    check_same_precision("bf16")  # alone
    others = ["bf16", "bf16", "fp32"]

    def gather(found: list[Any], own: str) -> None:
        found[:] = [own, *others]

    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda: 4)
    monkeypatch.setattr(dist, "all_gather_object", gather)
    with raises_user_error(key="training.precision"):
        check_same_precision("bf16")
    others[:] = ["bf16"] * 3
    check_same_precision("bf16")
