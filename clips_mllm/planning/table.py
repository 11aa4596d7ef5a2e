"""Table for `clips-mllm plan --table`: LLaVA-1.5's stages for 7B, 8B and 13B on 1, 4 and 8 GPUs. No torch."""

from __future__ import annotations

import dataclasses

from clips_mllm.planning.catalog import GB
from clips_mllm.planning.estimate import peak_memory
from clips_mllm.planning.models import catalog_llm, catalog_tower
from clips_mllm.planning.setup import Adapter, Setup
from clips_mllm.planning.shapes import Shape

LLMS = {
    "Vicuna 7B": "lmsys/vicuna-7b-v1.5",
    "LLaMA-3 8B": "meta-llama/Meta-Llama-3-8B-Instruct",
    "Vicuna 13B": "lmsys/vicuna-13b-v1.5",
}
TOWER = "openai/clip-vit-large-patch14-336"
DEVICES = (1, 4, 8)
MEMORIES = (24, 40, 80)  # GB
BATCHES = (32, 16, 8, 4, 2, 1)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Stage:
    """A stage of LLaVA-1.5; `tokens` is the length of its longest samples."""

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
# From the fastest to the one that needs the least memory: (ZeRO stage, optimizer offloaded, weights offloaded).
METHODS = {
    "Z2": (2, False, False),
    "Z3": (3, False, False),
    "Z3 opt": (3, True, False),
    "Z3 all": (3, True, True),
}
LEGEND = """
Cells: DeepSpeed method, then device batch x accumulation for the global batch (256 in align, 128 otherwise).
Z2, Z3: ZeRO stage. opt: optimizer in host memory. all: weights too. -: does not fit at batch 1.
Assumes the tower CLIP-L/14 at 336 pixels, bf16, gradient checkpointing, 768 tokens in align and 2,048 otherwise, and
rank 128. These are estimates, not measurements.
""".strip()


def table() -> str:
    """Return the table as Markdown."""
    heads = [f"{devices} x {memory} GB" for devices in DEVICES for memory in MEMORIES]
    lines = ["| LLM | stage | " + " | ".join(heads) + " |", "|---|---|" + "---|" * len(heads)]
    for title, llm in LLMS.items():
        shape = Shape(tower=catalog_tower(TOWER), llm=catalog_llm(llm))
        for stage in STAGES:
            cells = [best_method(shape, stage, devices, memory) for devices in DEVICES for memory in MEMORIES]
            lines.append(f"| {title} | {stage.name} | " + " | ".join(cells) + " |")
    return "\n".join([*lines, "", LEGEND])


def best_method(shape: Shape, stage: Stage, devices: int, memory: int) -> str:
    """Return the first method that fits, with its largest batch; "-" if none does."""
    for name, (zero, optimizer, weights) in METHODS.items():
        if stage.adapter == "qlora" and zero == 3:
            continue  # ZeRO-3 cannot shard 4-bit weights
        setup = Setup(
            shape=shape,
            train_llm=stage.train_llm,
            adapter=stage.adapter,
            rank=128,
            zero=zero,
            offload_optimizer=optimizer,
            offload_weights=weights,
            bucket=5e7 if zero == 2 else shape.llm.width**2,
            checkpointing=True,
            devices=devices,
            tokens=stage.tokens,
            supervised=stage.supervised,
        )
        for batch in BATCHES:
            divides = stage.global_batch % (batch * devices) == 0
            if divides and peak_memory(dataclasses.replace(setup, batch=batch)).total <= memory * GB:
                return f"{name} {batch}x{stage.global_batch // (batch * devices)}"
    return "-"
