"""What the three training stages share: the optimisation recipe, the run folder, the metrics file.

`transformers.Trainer` is the engine. `TrainingRecipe` holds the values that differ between a laptop and a cluster;
the *global* batch is stated, and accumulation follows from it.
"""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from vision_tower.errors import UserError
from vision_tower.recipe import dump_recipe

if TYPE_CHECKING:
    from torch import nn
    from transformers import Trainer, TrainingArguments

PACKAGES = ("torch", "transformers", "accelerate", "deepspeed", "peft", "datasets", "tokenizers", "lmms-eval")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainingRecipe:
    """How to optimise.

    Args:
        global_batch_size: samples in one optimiser step, over all devices and accumulation steps.
        device_batch_size: samples in one forward pass of one device.
        learning_rate: peak learning rate.
        schedule: shape after the warm-up.
        warmup_steps: linear warm-up, as a number of optimiser steps.
        warmup_ratio: linear warm-up, as a share of all steps; used where `warmup_steps` is 0.
        max_steps: optimiser steps; 0 means that `epochs` decides.
        epochs: passes over the data where `max_steps` is 0.
        weight_decay: on weight matrices only.
        beta1: of AdamW.
        beta2: of AdamW.
        clip_norm: largest gradient norm; 0 switches clipping off.
        precision: bf16 activations with fp32 master weights, or fp32 throughout.
        gradient_checkpointing: trade a second forward pass for memory.
        deepspeed: a DeepSpeed JSON (configs/deepspeed/), or none for plain data parallelism.
        save_every: optimiser steps between checkpoints; 0 saves at the end only.
        keep_checkpoints: how many of the newest checkpoints stay.
        log_every: optimiser steps between lines of metrics.jsonl.
        workers: loader processes per device.
        report_to: logging back-ends of transformers, such as tensorboard or wandb.
        seed: of initialisation, data order and augmentation.
        extra: any other field of transformers.TrainingArguments.
    """

    global_batch_size: int = 128
    device_batch_size: int = 16
    learning_rate: float = 1e-3
    schedule: Literal["cosine", "linear", "constant_with_warmup"] = "cosine"
    warmup_steps: int = 0
    warmup_ratio: float = 0.0
    max_steps: int = 0
    epochs: float = 1.0
    weight_decay: float = 0.0
    beta1: float = 0.9
    beta2: float = 0.999
    clip_norm: float = 1.0
    precision: Literal["bf16", "fp32"] = "bf16"
    gradient_checkpointing: bool = False
    deepspeed: str | None = None
    save_every: int = 0
    keep_checkpoints: int = 1
    log_every: int = 10
    workers: int = 1
    report_to: tuple[str, ...] = ()
    seed: int = 0
    extra: dict[str, Any] = dataclasses.field(default_factory=dict)

    def accumulation(self, world: int) -> int:
        """Forward passes per optimiser step. Raises UserError where the numbers do not divide."""
        together = self.device_batch_size * world
        if self.global_batch_size % together:
            raise UserError(
                f"training.global_batch_size={self.global_batch_size} is not a multiple of device_batch_size="
                f"{self.device_batch_size} x {world} devices; change one of the three"
            )
        return self.global_batch_size // together


def training_arguments(recipe: TrainingRecipe, output_dir: Path) -> TrainingArguments:
    """The recipe in transformers' words. Unknown names in `extra` and a missing DeepSpeed file are UserErrors."""
    import torch
    from transformers import TrainingArguments

    _check_extra(recipe, {field.name for field in dataclasses.fields(TrainingArguments)})
    if recipe.deepspeed is not None and not Path(recipe.deepspeed).is_file():
        raise UserError(f"{recipe.deepspeed}: no such DeepSpeed configuration; see configs/deepspeed/")
    values: dict[str, Any] = {
        "output_dir": str(output_dir),
        "per_device_train_batch_size": recipe.device_batch_size,
        "gradient_accumulation_steps": recipe.accumulation(int(os.environ.get("WORLD_SIZE", "1"))),
        "learning_rate": recipe.learning_rate,
        "lr_scheduler_type": recipe.schedule,
        "warmup_steps": recipe.warmup_steps or recipe.warmup_ratio,  # below 1 transformers reads it as a share
        "max_steps": recipe.max_steps or -1,
        "num_train_epochs": recipe.epochs,
        "weight_decay": recipe.weight_decay,
        "adam_beta1": recipe.beta1,
        "adam_beta2": recipe.beta2,
        "max_grad_norm": recipe.clip_norm,
        "bf16": recipe.precision == "bf16",
        "gradient_checkpointing": recipe.gradient_checkpointing,
        "deepspeed": recipe.deepspeed,
        "save_strategy": "steps" if recipe.save_every else "no",
        "save_steps": recipe.save_every or 500,
        "save_total_limit": recipe.keep_checkpoints,
        "logging_steps": recipe.log_every,
        "dataloader_num_workers": recipe.workers,
        "report_to": list(recipe.report_to),
        "seed": recipe.seed,
        "remove_unused_columns": False,
        "use_cpu": not torch.cuda.is_available(),
    }
    return TrainingArguments(**(values | recipe.extra))


def _check_extra(recipe: TrainingRecipe, known: set[str]) -> None:
    import difflib

    for name in recipe.extra:
        if name not in known:
            near = difflib.get_close_matches(name, sorted(known), n=1)
            remedy = f"did you mean '{near[0]}'?" if near else "see transformers.TrainingArguments"
            raise UserError(f"training.extra.{name}: not a field of TrainingArguments; {remedy}")


def is_main_process() -> bool:
    """Whether this is rank 0 of the launch; known before any process group exists."""
    return os.environ.get("RANK", "0") == "0"


def start_run_folder(folder: Path, recipe: Any) -> None:
    """Leave the resolved recipe and what it ran on, before anything is trained."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "recipe.yaml").write_text(dump_recipe(recipe))
    environment = {
        "command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpus": os.cpu_count(),
        "git": _git_revision(),
        "packages": {name: _version(name) for name in PACKAGES},
    }
    (folder / "environment.json").write_text(json.dumps(environment, indent=1))


def _git_revision() -> str | None:
    answer = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    return answer.stdout.strip() or None


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def latest_checkpoint(folder: Path) -> str | None:
    """The newest complete checkpoint below `folder`: transformers writes `trainer_state.json` last."""
    found = [path.parent for path in folder.glob("checkpoint-*/trainer_state.json")]
    return str(max(found, key=lambda path: int(path.name.rpartition("-")[2]))) if found else None


def add_metrics_file(trainer: Trainer, file: Path) -> None:
    """Append every log line of the trainer to `file`; a resumed run first drops the lines it will repeat."""
    from transformers import TrainerCallback

    class MetricsFile(TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.is_world_process_zero:
                lines = file.read_text().splitlines() if file.exists() else []
                kept = [line for line in lines if json.loads(line)["step"] <= state.global_step]
                file.write_text("".join(f"{line}\n" for line in kept))

        def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any) -> None:
            if state.is_world_process_zero and logs and "loss" in logs:
                with file.open("a") as stream:
                    stream.write(json.dumps({"step": state.global_step, **logs}) + "\n")

    trainer.add_callback(MetricsFile())


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Decay on weight matrices only: not on biases, norms, embeddings, learnable queries or the temperature."""
    from torch import nn

    matrices: set[int] = set()
    for module in model.modules():
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            matrices.add(id(module.weight))
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return [
        {"params": [p for p in trainable if id(p) in matrices], "weight_decay": weight_decay},
        {"params": [p for p in trainable if id(p) not in matrices], "weight_decay": 0.0},
    ]
