"""Faster kernels where the device has them, or one clear line. Those of GPUs are untested here."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import torch
from transformers import PreTrainedModel

from clips_mllm.model.recipe import Attention
from vision_tower.common.errors import UserError
from vision_tower.model.attention import choose_attention as fastest_attention


def choose_attention(model: PreTrainedModel, attention: Attention, bf16: bool, device: torch.device) -> None:
    """Let tower and LLM compute attention so. Raises UserError where device, package or precision do not allow it."""
    if attention == "auto":
        fastest_attention(model, device, torch.bfloat16 if bf16 else torch.float32)
        return
    if attention == "flash_attention_2":
        for missing, remedy in (
            (not torch.cuda.is_available(), "it runs on NVIDIA and AMD GPUs; take sdpa"),
            (find_spec("flash_attn") is None, "pip install flash-attn, or take sdpa"),
            (not bf16, "it computes in 16 bits; set training.precision=bf16"),
        ):
            if missing:
                raise UserError(f"{remedy}", key="model.attention", value="flash_attention_2")
    try:
        model.set_attn_implementation(attention)
    except (ImportError, ValueError) as error:
        raise UserError(
            f"{' '.join(str(error).split())[:300]}", key="model.attention", value=attention, remedy="take eager"
        ) from error


def liger_arguments(wanted: bool) -> dict[str, Any]:
    """TrainingArguments for liger-kernel. Raises UserError where it cannot run.

    Its fused loss stays off: ours runs the vocabulary layer at supervised positions only.
    """
    if not wanted:
        return {}
    if not torch.cuda.is_available():
        raise UserError("its Triton kernels need a GPU", key="training.liger", remedy="leave it out")
    if find_spec("liger_kernel") is None:
        raise UserError("not installed", key="training.liger", remedy="pip install liger-kernel")
    own_loss = {"cross_entropy": False, "fused_linear_cross_entropy": False}
    return {"use_liger_kernel": True, "liger_kernel_config": own_loss}
