"""Load and save MLLM checkpoints in stock classes."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from clips_mllm.model.adapters import CONFIG, find_adapter, is_adapter, load_adapter, save_adapter
from clips_mllm.model.quantize import Quantize
from clips_mllm.model.stock import _existing, load_stock
from clips_mllm.model.tiles import AnyModel, AnyProcessor
from vision_tower.checkpoints.encoder import choose_device, filled_together

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast


@dataclasses.dataclass
class Mllm:
    """A model with its processor, which pads on the left for generation."""

    model: AnyModel
    processor: AnyProcessor
    device: torch.device

    @property
    def tokenizer(self) -> PreTrainedTokenizerFast:
        """The processor's tokenizer."""
        return self.processor.tokenizer


def load_mllm(folder: str | Path, *, device: str = "auto", dtype: str = "auto", quantize: Quantize = "none") -> Mllm:
    """Load a stock LLaVA or LLaVA-NeXT checkpoint, or an adapter with its base, for use.

    Args:
        folder: folder or hub id.
        device: auto, cpu, cuda or mps.
        dtype: auto (the checkpoint's), float32, bfloat16 or float16.
        quantize: none, or load the LLM in 4bit (nf4) or 8bit.
    Raises:
        UserError: no checkpoint, another kind of model, missing or unexpected weights, no `<image>` token, or an
            adapter without its base.
    """
    chosen = choose_device(device)
    model, processor = load_parts(folder, dtype=dtype, quantize=quantize, device=chosen)
    processor.tokenizer.padding_side = "left"  # not saved with the tokenizer
    return Mllm(model.to(chosen).eval(), processor, chosen)


def load_parts(
    folder: str | Path, *, dtype: str | torch.dtype, quantize: Quantize = "none", device: torch.device | None = None
) -> tuple[AnyModel, AnyProcessor]:
    """Load model and processor, for training or inference. An adapter is merged into its base (`adapters.py`).

    Args:
        device: device for 4- and 8-bit weights; by default the current GPU, if there is one.
    """
    name = str(folder) if is_adapter(folder) else _existing(str(folder), "model")
    if (adapter := find_adapter(name)) is not None:
        return load_adapter(adapter, dtype=dtype, quantize=quantize, device=device)
    return load_stock(folder, dtype=dtype, quantize=quantize, device=device)


def save_mllm(model: Any, processor: AnyProcessor, folder: Path, state: Any = None) -> None:
    """Write a complete stock checkpoint, or a complete adapter if `model` is a PeftModel.

    `config.json` or `adapter_config.json`, by which readers recognize the folder, is written last.
    """
    from peft import PeftModel

    with filled_together(folder, last=("config.json", CONFIG)) as work:
        if isinstance(model, PeftModel):
            save_adapter(model, processor, work, state)
        else:
            model.save_pretrained(work, state_dict=None if state is None else _tied(model, state))
            processor.save_pretrained(work)


def _tied(model: Any, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Restore tied weights in a gathered state: accelerate clones them, and both copies would be saved."""
    first: dict[int, str] = {}
    for name, weights in model.named_parameters(remove_duplicate=False):
        if name in state:
            state[name] = state[first.setdefault(id(weights), name)]
    return state
