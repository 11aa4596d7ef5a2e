"""`clips-mllm plan`: estimate parameters, memory by component, batch size and time of a training recipe.

clips-mllm plan --config configs/mllm/vicuna_7b_finetune.yaml --devices 8
clips-mllm plan --table

recipe --shapes, lengths, device--> Setup --peak_memory--> Memory
                                          \\--run_seconds--> seconds
"""

from __future__ import annotations

import dataclasses
import json
import math
import sys
from pathlib import Path

from clips_mllm.model.recipe import check_feature_layer
from clips_mllm.planning.catalog import GB
from clips_mllm.planning.estimate import Memory, peak_memory, run_seconds
from clips_mllm.planning.lengths import Lengths, read_lengths
from clips_mllm.planning.models import read_shape, resolve_model
from clips_mllm.planning.recipe import PlanRecipe
from clips_mllm.planning.setup import Setup, setup_of
from vision_tower.common.errors import run_command
from vision_tower.common.recipe import parse_recipe
from vision_tower.training.precision import cpu_computes_bf16, settle_precision

MOMENTS = {
    "backward": "in the backward pass",
    "step": "in the optimizer step",
    "both": "backward pass plus optimizer step",
}


def main(argv: list[str]) -> None:
    """Print the plan, or the table.

    Raises:
        UserError: a recipe, config or data file cannot be read, or the batch does not divide.
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
    plan = make_plan(recipe)
    print(json.dumps(plan.as_dict(), indent=1) if recipe.json else plan.as_text())


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """Estimates of one recipe on its devices; `available` is in bytes."""

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
        """True if the peak is within the device's memory."""
        return self.memory.total <= self.available

    def as_dict(self) -> dict[str, object]:
        """Return the plan for `--json`, in bytes and seconds."""
        shape = self.setup.shape
        return {
            "parameters": {
                "tower": shape.tower.parameters,
                "projector": shape.projector_parameters,
                "llm": shape.llm.parameters,
                "trainable": self.setup.trainable,
            },
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
        """Return the plan for the terminal."""
        setup, memory, shape, lengths = self.setup, self.memory, self.setup.shape, self.lengths
        counts = {"tower": shape.tower.parameters, "projector": shape.projector_parameters, "LLM": shape.llm.parameters}
        kind = setup.device.kind
        lines = [
            "parameters   " + ", ".join(f"{name} {count / 1e6:,.1f} M" for name, count in counts.items()),
            f"             {setup.trainable / 1e6:,.1f} M are trainable"
            + ("" if setup.adapter == "none" else f" ({setup.adapter}, rank {setup.rank})"),
            f"samples      {lengths.samples or 'unknown number'}, longest {lengths.longest} tokens, mean "
            f"{lengths.mean:.0f} ({f'assumed: {lengths.assumed}' if lengths.assumed else 'measured'})",
            f"batch        {self.global_batch} = {setup.batch} x {setup.devices} {kind} x {self.accumulation} "
            "accumulation",
            f"memory       peak of one {kind} ({MOMENTS[memory.moment]}), in 10^9 bytes",
        ]
        for field in dataclasses.fields(Memory):
            value = getattr(memory, field.name)
            if field.name not in ("moment", "host"):
                lines.append(f"  {field.name:<12}{value / GB:8.2f} GB")
        verdict = "fits" if self.fits else "does NOT fit"
        lines.append(f"  {'total':<12}{memory.total / GB:8.2f} GB: {verdict} into {self.available / GB:.0f} GB")
        if memory.host:
            lines.append(f"  {'host':<12}{memory.host / GB:8.2f} GB of host memory for each rank")
        largest = self.largest_batch or "none; use a higher ZeRO stage or offload"
        lines.append(f"             largest device batch that fits and divides: {largest}")
        if self.steps:
            lines.append(f"time         {self.steps:,} steps, about {_duration(self.seconds)}")
        return "\n".join(lines)


def make_plan(recipe: PlanRecipe) -> Plan:
    """Estimate a recipe whose precision is settled. Raises UserError as `main` does."""
    assert recipe.data is not None, "PlanRecipe.check_plan has run"
    training, device, recipes = recipe.training, recipe.hardware, Path(recipe.recipes)
    model = resolve_model(recipe.model, recipes)
    shape = read_shape(model, recipes)
    if recipe.model.checkpoint is None:
        check_feature_layer(recipe.model.feature_layer, shape.tower.layers)
    lengths = read_lengths(
        recipe.data, model, shape.tower.patches, text_tokens=recipe.text_tokens, samples=recipe.samples
    )
    if recipe.tokens:
        lengths = dataclasses.replace(lengths, longest=recipe.tokens)
    setup = setup_of(recipe, shape, lengths, devices=recipe.devices, device=device)
    available = device.memory_gb * GB
    epoch = math.ceil(lengths.samples / training.global_batch_size)  # the last step of an epoch can be smaller
    steps = training.max_steps or math.ceil(training.epochs * epoch)
    batches = [
        batch
        for batch in range(1, training.global_batch_size + 1)
        if training.global_batch_size % (batch * setup.devices) == 0
        and peak_memory(dataclasses.replace(setup, batch=batch)).total <= available
    ]
    return Plan(
        setup=setup,
        memory=peak_memory(setup),
        available=available,
        accumulation=training.accumulation(setup.devices),
        global_batch=training.global_batch_size,
        largest_batch=max(batches, default=0),
        lengths=lengths,
        steps=steps,
        seconds=run_seconds(setup, samples=steps * training.global_batch_size, mean_tokens=lengths.mean),
    )


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} minutes" if seconds < 7200 else f"{seconds / 3600:.1f} hours"


if __name__ == "__main__":
    sys.exit(run_command(main))
