"""A stage is a table of what trains, one function that applies it, and one line that says it."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from clips_mllm.model.adapters import add_adapter
from clips_mllm.model.tiles import AnyModel, row_end
from clips_mllm.training.stage_recipe import StageRecipe
from vision_tower.common.errors import UserError
from vision_tower.training.model_tools import parameter_groups, size


def parts(model: AnyModel) -> dict[str, list[nn.Module]]:
    """The three parts of an MLLM by the names that recipes use; the vocabulary layer belongs to the LLM."""
    inner = model.model
    return {
        "tower": [inner.vision_tower],
        "projector": [inner.multi_modal_projector, *row_end(model)],
        "llm": [inner.language_model, model.lm_head],
    }


def parameters_of(modules: list[nn.Module]) -> list[nn.Parameter]:
    """Their parameters, each once, though embeddings may be tied."""
    return list(dict.fromkeys(parameter for module in modules for parameter in module.parameters()))


def apply_stage(model: AnyModel, stage: StageRecipe) -> tuple[nn.Module, str]:
    """Freeze and unfreeze, or put adapters in; returns what is to be trained, and the line for the log.

    Raises UserError where nothing would train.
    """
    stage.check()
    model.requires_grad_(False)
    tower = reached_modules(model, stage.tower_from_layer) if stage.tower else []
    chosen = {"tower": tower, "projector": parts(model)["projector"], "llm": parts(model)["llm"]}
    trained: nn.Module = model
    if stage.adapter.kind != "none":
        adapted = ("llm", "tower") if stage.llm and stage.tower else ("llm",) if stage.llm else ("tower",)
        targets = linear_names(model, [m for name in adapted for m in chosen[name]])
        trained = add_adapter(model, stage.adapter, targets, projector=stage.projector)
    else:
        for name, modules in chosen.items():
            for module in modules if getattr(stage, name) else ():
                module.requires_grad_(True)
    return trained, _line(model, stage)


def _line(model: AnyModel, stage: StageRecipe) -> str:
    """What trains, by part, in weights."""
    said, adapter = [], stage.adapter.kind
    for name, modules in parts(model).items():
        weights = parameters_of(modules)
        trains = sum(size(p) for p in weights if p.requires_grad)
        # What an adapter brings is not counted as the part's own, nor the copy of the projector that trains with it.
        total = sum(size(p) for p in weights if adapter == "none" or not p.requires_grad)
        how = "trains" if name == "projector" or adapter == "none" else adapter
        said.append(f"{name} {how} ({trains:,} of {total:,})" if trains else f"{name} frozen ({total:,})")
    return ", ".join(said)


def reached_modules(model: AnyModel, first: int) -> list[nn.Module]:
    """The tower's modules that the projector's features pass, from block `first` on; 0 takes what comes before, too.

    The others would get no gradient, and decay would shrink them.
    """
    tower = model.model.vision_tower
    blocks = next(
        module
        for module in tower.modules()
        if isinstance(module, nn.ModuleList) and isinstance(module[0], GradientCheckpointingLayer)
    )
    layers = model.config.vision_feature_layer
    states = len(blocks) + 1  # hidden_states[0] are the embeddings
    reach = max(layer % states for layer in ([layers] if isinstance(layers, int) else layers))
    if not 0 <= first < reach:
        raise UserError(
            f"the projector reads what block {reach - 1} gives",
            key="stage.tower_from_layer",
            value=first,
            remedy=f"from 0 to {reach - 1}",
        )
    chosen: list[nn.Module] = list(blocks[first:reach])
    if first == 0:
        chosen += [module for name, module in tower.named_modules() if name.rpartition(".")[2] == "embeddings"]
    return chosen


def linear_names(model: nn.Module, modules: list[nn.Module]) -> list[str]:
    """Full names of the linear layers inside `modules`, but for the vocabulary layer."""
    inside = {id(inner) for module in modules for inner in module.modules() if inner is not module}
    return [name for name, module in model.named_modules() if isinstance(module, nn.Linear) and id(module) in inside]


def optimizer_groups(model: AnyModel, stage: StageRecipe, weight_decay: float) -> list[dict[str, Any]]:
    """Parameter groups; a part has a learning rate of its own where the recipe gives one."""
    rates = {
        "tower": stage.tower_learning_rate,
        "projector": stage.projector_learning_rate,
        "llm": stage.llm_learning_rate,
    }
    rate = {id(p): rates[name] for name, modules in parts(model).items() for p in parameters_of(modules)}
    split: list[dict[str, Any]] = []
    for group in parameter_groups(model, weight_decay):
        for own in dict.fromkeys(rate[id(p)] for p in group["params"]):
            mine = {"params": [p for p in group["params"] if rate[id(p)] == own]}
            split.append(group | mine | ({} if own is None else {"lr": own}))
    return split
