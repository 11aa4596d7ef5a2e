"""A stage is a table of what trains, one function that applies it, and one line that says it."""

from __future__ import annotations

from typing import Any

from torch import nn
from transformers import LlavaForConditionalGeneration

from clips_mllm.train_recipe import StageRecipe
from vision_tower.errors import UserError
from vision_tower.training import parameter_groups


def parts(model: LlavaForConditionalGeneration) -> dict[str, nn.Module]:
    """The three parts of an MLLM by the names that recipes use."""
    inner = model.model
    return {"tower": inner.vision_tower, "projector": inner.multi_modal_projector, "llm": inner.language_model}


def apply_stage(model: LlavaForConditionalGeneration, stage: StageRecipe) -> str:
    """Freeze and unfreeze; returns the line for the log. Raises UserError where nothing would train."""
    trains = {"tower": stage.tower, "projector": stage.projector, "llm": stage.llm}
    model.requires_grad_(False)
    for name, part in parts(model).items():
        part.requires_grad_(trains[name])
    model.lm_head.requires_grad_(stage.llm)
    counts = {name: sum(p.numel() for p in part.parameters()) for name, part in parts(model).items()}
    if not any(trains.values()):
        raise UserError("stage: nothing trains; set at least one of projector, llm and tower to true")
    return ", ".join(f"{name} {'trains' if trains[name] else 'frozen'} ({counts[name]:,})" for name in counts)


def optimizer_groups(
    model: LlavaForConditionalGeneration, stage: StageRecipe, weight_decay: float
) -> list[dict[str, Any]]:
    """Parameter groups; the projector's have a learning rate of their own where the recipe gives one."""
    groups = parameter_groups(model, weight_decay)
    if stage.projector_learning_rate is None:
        return groups
    own = {id(p) for p in model.model.multi_modal_projector.parameters()}
    split: list[dict[str, Any]] = []
    for group in groups:
        split.append(group | {"params": [p for p in group["params"] if id(p) not in own]})
        mine = [p for p in group["params"] if id(p) in own]
        split.append(group | {"params": mine, "lr": stage.projector_learning_rate})
    return [group for group in split if group["params"]]
