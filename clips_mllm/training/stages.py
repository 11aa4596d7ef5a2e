"""Freeze and unfreeze the parts of an MLLM as a stage says; optimizer groups of the parts that train."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from clips_mllm.model.adapters import add_adapter
from clips_mllm.model.tiles import AnyModel, image_newline_modules
from clips_mllm.training.recipe import StageRecipe
from vision_tower.common.errors import UserError
from vision_tower.training.model_tools import parameter_groups, size


def parts(model: AnyModel) -> dict[str, list[nn.Module]]:
    """Return the modules of tower, projector and LLM; the vocabulary layer belongs to the LLM."""
    inner = model.model
    return {
        "tower": [inner.vision_tower],
        "projector": [inner.multi_modal_projector, *image_newline_modules(model)],
        "llm": [inner.language_model, model.lm_head],
    }


def parameters_of(modules: list[nn.Module]) -> list[nn.Parameter]:
    """Return their parameters, each once, also if embeddings are tied."""
    return list(dict.fromkeys(parameter for module in modules for parameter in module.parameters()))


def apply_stage(model: AnyModel, stage: StageRecipe, *, master_weights: bool = False) -> nn.Module:
    """Freeze and unfreeze the parts, or add adapters; return the module to train.

    Args:
        master_weights: convert trained weights to fp32. Not needed with DeepSpeed, which keeps a copy in fp32.
    Raises:
        UserError: nothing would train.
    """
    stage.check()
    model.requires_grad_(False)
    tower = used_modules(model, stage.tower_from_layer) if stage.tower else []
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
    if master_weights:
        for weights in trained.parameters():
            if weights.requires_grad:
                weights.data = weights.data.float()
    if stage.llm and stage.adapter.kind == "none":
        clone_frozen_weights(model)
    return trained


def clone_frozen_weights(model: AnyModel) -> None:
    """Clone frozen weights so that the memory-mapped checkpoint can be freed.

    The engine copies trained weights, but a small frozen tower would keep the whole file in memory.
    """
    for weights in model.parameters():
        if not weights.requires_grad:
            weights.data = weights.data.clone()


def trained_line(model: AnyModel, stage: StageRecipe) -> str:
    """Return, for the log, how many weights of each part train."""
    found, adapter = [], stage.adapter.kind
    for name, modules in parts(model).items():
        weights = parameters_of(modules)
        trains = sum(size(p) for p in weights if p.requires_grad)
        # An adapter's weights do not count towards the part, nor does the projector's copy that PEFT trains.
        total = sum(size(p) for p in weights if adapter == "none" or not p.requires_grad)
        how = "trains" if name == "projector" or adapter == "none" else adapter
        found.append(f"{name} {how} ({trains:,} of {total:,})" if trains else f"{name} frozen ({total:,})")
    return ", ".join(found)


def used_modules(model: AnyModel, first: int) -> list[nn.Module]:
    """Return the tower's modules that contribute to the projector's features, from block `first` on.

    0 includes the embeddings. The other modules would get no gradient, and weight decay would shrink them.
    """
    tower = model.model.vision_tower
    blocks = next(
        module
        for module in tower.modules()
        if isinstance(module, nn.ModuleList) and isinstance(module[0], GradientCheckpointingLayer)
    )
    layers = model.config.vision_feature_layer
    states = len(blocks) + 1  # hidden_states[0] is the output of the embeddings
    end = max(layer % states for layer in ([layers] if isinstance(layers, int) else layers))
    if not 0 <= first < end:
        raise UserError(
            f"the projector reads the output of block {end - 1}",
            key="stage.tower_from_layer",
            value=first,
            remedy=f"give a block from 0 to {end - 1}",
        )
    chosen: list[nn.Module] = list(blocks[first:end])
    if first == 0:
        chosen += [module for name, module in tower.named_modules() if name.rpartition(".")[2] == "embeddings"]
    return chosen


def linear_names(model: nn.Module, modules: list[nn.Module]) -> list[str]:
    """Return the full names of the linear layers inside `modules`, without the vocabulary layer."""
    inside = {id(inner) for module in modules for inner in module.modules() if inner is not module}
    return [name for name, module in model.named_modules() if isinstance(module, nn.Linear) and id(module) in inside]


def optimizer_groups(model: AnyModel, stage: StageRecipe, weight_decay: float) -> list[dict[str, Any]]:
    """Return the optimizer's parameter groups; a part with a learning rate in the recipe has its own groups."""
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
