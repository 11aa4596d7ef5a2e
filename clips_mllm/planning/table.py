"""LLaVA-1.5's stages for 7B, 8B and 13B on 1, 4 and 8 GPUs of 24, 40 and 80 GB: the way that fits. No torch."""

from __future__ import annotations

import dataclasses

from clips_mllm.planning.memory import Adapter, Setup, estimate
from clips_mllm.planning.shapes import CLIP_L336, LLAMA_3_8B, VICUNA_7B, VICUNA_13B, LlmShape, Shape

SIZES = {"Vicuna 7B": VICUNA_7B, "LLaMA-3 8B": LLAMA_3_8B, "Vicuna 13B": VICUNA_13B}
DEVICES = (1, 4, 8)
MEMORIES = (24, 40, 80)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stage:
    """A stage of LLaVA-1.5: what trains, its global batch, and the longest sample."""

    name: str
    train_llm: bool
    adapter: Adapter
    global_batch: int
    tokens: int
    supervised: int


STAGES = (
    Stage(name="align", train_llm=False, adapter="none", global_batch=256, tokens=768, supervised=128),
    Stage(name="finetune", train_llm=True, adapter="none", global_batch=128, tokens=2048, supervised=1024),
    Stage(name="lora", train_llm=True, adapter="lora", global_batch=128, tokens=2048, supervised=1024),
    Stage(name="qlora", train_llm=True, adapter="qlora", global_batch=128, tokens=2048, supervised=1024),
)
# From the fastest to the smallest: ZeRO stage, optimiser offloaded, weights offloaded.
WAYS = {
    "Z2": (2, False, False),
    "Z3": (3, False, False),
    "Z3 opt": (3, True, False),
    "Z3 all": (3, True, True),
}
LEGEND = """
Cells: DeepSpeed way, then device batch x accumulation for the global batch (256 in align, 128 else). Z2, Z3: ZeRO
stage; opt: optimiser in the host's memory; all: weights too; -: does not fit at batch 1. Tower CLIP-L/14 at 336 pixels,
bf16, gradient checkpointing, 768 tokens in align and 2,048 else, rank 128. Estimates, not measured.
""".strip()


def table() -> str:
    """A Markdown table; cells say how, and batch x accumulation."""
    heads = [f"{devices} x {memory} GB" for devices in DEVICES for memory in MEMORIES]
    lines = ["| LLM | stage | " + " | ".join(heads) + " |", "|---|---|" + "---|" * len(heads)]
    for name, llm in SIZES.items():
        for stage in STAGES:
            cells = [best_way(llm, stage, devices, memory) for devices in DEVICES for memory in MEMORIES]
            lines.append(f"| {name} | {stage.name} | " + " | ".join(cells) + " |")
    return "\n".join([*lines, "", LEGEND])


def best_way(llm: LlmShape, stage: Stage, devices: int, memory: int) -> str:
    """The first way that fits, with its largest batch."""
    for name, (zero, optimiser, weights) in WAYS.items():
        if stage.adapter == "qlora" and zero == 3:
            continue  # ZeRO-3 cannot divide weights in 4 bits
        setup = Setup(
            shape=Shape(tower=CLIP_L336, llm=llm),
            train_llm=stage.train_llm,
            adapter=stage.adapter,
            rank=128,
            zero=zero,
            offload_optimizer=optimiser,
            offload_weights=weights,
            bucket=5e7 if zero == 2 else llm.width**2,
            checkpointing=True,
            devices=devices,
            tokens=stage.tokens,
            supervised=stage.supervised,
        )
        fitting = [
            size
            for size in (1, 2, 4, 8, 16, 32)
            if stage.global_batch % (size * devices) == 0
            and estimate(dataclasses.replace(setup, batch=size)).total <= memory * 1e9
        ]
        if fitting:
            return f"{name} {max(fitting)}x{stage.global_batch // (max(fitting) * devices)}"
    return "-"
