"""Quantization of the LLM to 4 or 8 bits with bitsandbytes, for QLoRA and for inference with less memory.

Tower, projector and output layer are not quantized: they are small, and errors in them cost the most accuracy.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Literal

from vision_tower.common.errors import UserError
from vision_tower.common.files import read_object

if TYPE_CHECKING:
    import torch
    from transformers import BitsAndBytesConfig

Quantize = Literal["none", "4bit", "8bit"]
QUANTIZATION_FILE = "quantization.json"
KEPT = ["lm_head", "model.vision_tower", "model.multi_modal_projector"]


def quantization(kind: Quantize, compute: torch.dtype) -> BitsAndBytesConfig:
    """Return nf4 with double quantization (arXiv 2305.14314) for 4bit, LLM.int8() (arXiv 2208.07339) for 8bit.

    Args:
        compute: dtype of matrix products with 4-bit weights.
    """
    from transformers import BitsAndBytesConfig

    if kind == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=KEPT)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute,
        llm_int8_skip_modules=KEPT,
    )


def read_quantization(folder: Path) -> BitsAndBytesConfig | None:
    """Return the quantization under which the adapter in `folder` was trained, or None."""
    from transformers import BitsAndBytesConfig

    file = folder / QUANTIZATION_FILE
    if not file.is_file():
        return None
    try:
        return BitsAndBytesConfig.from_dict(read_object(file))
    except (TypeError, ValueError) as error:
        raise UserError(f"not a bitsandbytes configuration ({error})", file=file, remedy="save it again") from error
