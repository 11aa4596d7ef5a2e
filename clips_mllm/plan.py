"""`clips-mllm plan --config RECIPE`: parameters, memory by component, batch, time; `--table`: what fits on which GPUs.

recipe of `train` --shapes, lengths--> Setup --plan_memory--> Memory
                                          \\--plan_time-----> seconds
"""

from __future__ import annotations

import dataclasses
import json
import math
import sys

from clips_mllm.model.recipe import check_feature_layer
from clips_mllm.planning.lengths import Lengths, read_lengths
from clips_mllm.planning.memory import Memory, Setup, estimate
from clips_mllm.planning.recipe import GB, PlanRecipe
from clips_mllm.planning.setup import setup_of
from clips_mllm.planning.shapes import read_shape
from clips_mllm.planning.timing import run_seconds
from vision_tower.common.errors import run_command
from vision_tower.common.recipe import parse_recipe
from vision_tower.training.precision import cpu_computes_bf16, settle_precision

MOMENTS = {
    "backward": "in the backward pass",
    "step": "at the optimiser's step",
    "both": "backward pass and step together",
}


def main(argv: list[str]) -> None:
    """Print the plan.

    Raises:
        UserError: a recipe, config or file that cannot be read, or numbers that do not divide.
    """
    recipe = parse_recipe(PlanRecipe, argv, command="plan")
    if recipe.table:
        from clips_mllm.planning.table import table

        print(table())
        return
    recipe.check_plan()
    recipe.check()
    bf16 = cpu_computes_bf16 if recipe.device == "cpu" else lambda: True
    recipe = dataclasses.replace(recipe, training=settle_precision(recipe.training, bf16))
    assert recipe.data is not None, "PlanRecipe.check_plan has run"
    shape = read_shape(tower=recipe.model.tower, llm=recipe.model.llm, checkpoint=recipe.model.checkpoint)
    if recipe.model.checkpoint is None:
        check_feature_layer(recipe.model.feature_layer, shape.tower.layers)
    lengths = read_lengths(recipe.data, recipe.model, shape.tower.patches)
    if recipe.tokens:
        lengths = dataclasses.replace(lengths, longest=recipe.tokens)
    plan = make_plan(recipe, setup_of(recipe, shape, lengths, devices=recipe.devices, kind=recipe.device), lengths)
    print(json.dumps(plan.as_dict(), indent=1) if recipe.json else plan.as_text())


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """All that the command tells."""

    setup: Setup
    memory: Memory
    available: float
    accumulation: int
    global_batch: int
    largest_batch: int
    lengths: Lengths
    steps: int
    seconds: float

    @property
    def fits(self) -> bool:
        """Whether the peak is within the device's memory."""
        return self.memory.total <= self.available

    def as_dict(self) -> dict[str, object]:
        """For `--json`; bytes and seconds."""
        shape = self.setup.shape
        counts = {"tower": shape.tower.parameters, "projector": shape.projector, "llm": shape.llm.parameters}
        return {
            "parameters": counts | {"trainable": self.setup.trainable},
            "memory": dataclasses.asdict(self.memory) | {"total": self.memory.total, "available": self.available},
            "fits": self.fits,
            "batch": {
                "device": self.setup.batch,
                "devices": self.setup.devices,
                "accumulation": self.accumulation,
                "global": self.global_batch,
                "largest_device": self.largest_batch,
            },
            "lengths": dataclasses.asdict(self.lengths),
            "steps": self.steps,
            "seconds": self.seconds,
        }

    def as_text(self) -> str:
        """For people."""
        setup, memory, shape = self.setup, self.memory, self.setup.shape
        parts = {"tower": shape.tower.parameters, "projector": shape.projector, "LLM": shape.llm.parameters}
        lines = [
            "parameters   " + ", ".join(f"{name} {count / 1e6:,.1f} M" for name, count in parts.items()),
            f"             of which {setup.trainable / 1e6:,.1f} M train"
            + ("" if setup.adapter == "none" else f" ({setup.adapter}, rank {setup.rank})"),
            f"samples      {self.lengths.samples or 'unknown number'}, longest {self.lengths.longest} tokens, mean "
            f"{self.lengths.mean:.0f} ({'from the data' if self.lengths.measured else 'assumed: no JSON to look at'})",
            f"batch        {self.global_batch} = {setup.batch} x {setup.devices} {setup.kind} x {self.accumulation} "
            "accumulation",
            f"memory       of one {setup.kind}, at its peak ({MOMENTS[memory.moment]}); GB are 10^9 bytes",
        ]
        for field in dataclasses.fields(Memory):
            value = getattr(memory, field.name)
            if field.name not in ("moment", "host"):
                lines.append(f"  {field.name:<12}{value / GB:8.2f} GB")
        verdict = "fits" if self.fits else "does NOT fit"
        lines.append(f"  {'total':<12}{memory.total / GB:8.2f} GB: {verdict} into {self.available / GB:.0f} GB")
        if memory.host:
            lines.append(f"  host        {memory.host / GB:8.2f} GB for each of its ranks, in its own memory")
        largest = f"{self.largest_batch}" if self.largest_batch else "none; take a higher ZeRO stage or offload"
        lines.append(f"             largest device batch that fits and divides: {largest}")
        if self.steps:
            lines.append(f"time         {self.steps:,} steps, about {_duration(self.seconds)}")
        return "\n".join(lines)


def make_plan(recipe: PlanRecipe, setup: Setup, lengths: Lengths) -> Plan:
    """Everything about a recipe on its devices. Raises UserError where the global batch does not divide."""
    available, training = recipe.available, recipe.training
    epoch = math.ceil(lengths.samples / training.global_batch_size)  # the last step of an epoch may be a smaller one
    steps = training.max_steps or math.ceil(training.epochs * epoch)
    sizes = [
        size
        for size in range(1, training.global_batch_size + 1)
        if training.global_batch_size % (size * setup.devices) == 0
        and estimate(dataclasses.replace(setup, batch=size)).total <= available
    ]
    seconds = run_seconds(
        setup,
        samples=steps * training.global_batch_size,
        mean_tokens=lengths.mean,
        flops=recipe.flops,
    )
    return Plan(
        setup=setup,
        memory=estimate(setup),
        available=available,
        accumulation=training.accumulation(setup.devices),
        global_batch=training.global_batch_size,
        largest_batch=max(sizes, default=0),
        lengths=lengths,
        steps=steps,
        seconds=seconds,
    )


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} minutes" if seconds < 7200 else f"{seconds / 3600:.1f} hours"


if __name__ == "__main__":
    sys.exit(run_command(main))
