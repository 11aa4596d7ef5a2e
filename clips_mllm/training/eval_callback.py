"""Evaluation during training: loss on held-out conversations, and lmms-eval tasks.

every N steps --> loss over all supervised held-out tokens, task scores --> evaluation.jsonl, the trainer's log

Tasks are run by `clips_eval`, which this package does not import: `evaluation.scorer` names the function.
"""

from __future__ import annotations

import copy
import importlib
import json
from collections.abc import Callable, Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
import torch.distributed as dist
from torch.utils.data import Dataset
from tqdm import tqdm
from transformers import TrainerCallback

from clips_mllm.model.checkpoint import Mllm
from clips_mllm.prompts.conversation import IGNORED
from clips_mllm.training.recipe import TrainEvaluationRecipe
from vision_tower.common.errors import UserError
from vision_tower.common.randomness import untouched_randomness
from vision_tower.training.run_folder import keep_lines

if TYPE_CHECKING:
    from clips_mllm.training.trainer import MllmTrainer

FILE = "evaluation.jsonl"


class Scorer(Protocol):
    """Runs tasks on a model in training. `names` lists the scores that it can return."""

    names: Collection[str]

    def evaluate(self, mllm: Mllm, step: int) -> dict[str, float]:
        """Return scores by name. Called on every rank."""
        ...


def load_scorer(recipe: TrainEvaluationRecipe) -> Scorer | None:
    """Return the recipe's scorer, or None without tasks. Raise UserError if it cannot be imported."""
    if recipe.tasks is None:
        return None
    if not Path(recipe.tasks).is_file():
        raise UserError("no such file", file=recipe.tasks, key="evaluation.tasks", remedy="see configs/eval/")
    module, _, name = recipe.scorer.partition(":")
    try:
        build: Callable[[str], Scorer] = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(
            f"cannot be imported ({error})", key="evaluation.scorer", value=recipe.scorer, remedy="give MODULE:FUNCTION"
        ) from error
    return build(recipe.tasks)


class EvalCallback(TrainerCallback):
    """Evaluates when the trainer asks for it; on resume removes the lines of later steps from the file.

    Args:
        held_out: samples that are not trained on, or None.
        collate: makes a batch of samples.
    """

    def __init__(
        self,
        recipe: TrainEvaluationRecipe,
        folder: Path,
        held_out: Dataset[dict[str, Any]] | None,
        collate: Callable[[list[dict[str, Any]]], dict[str, torch.Tensor]],
    ) -> None:
        self.recipe = recipe
        self.folder = folder
        self.held_out = held_out
        self.collate = collate
        self.scorer = load_scorer(recipe)
        self._require_best_by(() if self.scorer is None else self.scorer.names)  # before step 1

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Remove the lines that a resumed run will write again."""
        if state.is_world_process_zero:
            keep_lines(self.folder / FILE, state.global_step)

    def evaluate(self, trainer: MllmTrainer) -> dict[str, float]:
        """Return all numbers, the same on every rank, without changing the random state of the run."""
        scores: dict[str, float] = {}
        was_training = trainer.model.training
        trainer.model.eval()
        with untouched_randomness(), torch.no_grad():
            if self.held_out is not None:
                scores["loss"] = held_out_loss(trainer, self.held_out, self.collate, self.recipe.batch_size)
            if self.scorer is not None:
                scores |= self._task_scores(trainer, self.scorer)
        trainer.model.train(was_training)
        self._require_best_by(scores)  # a task can fail to return one of its scores
        if trainer.is_world_process_zero():
            with (self.folder / FILE).open("a") as stream:
                stream.write(json.dumps({"step": trainer.state.global_step, **scores}) + "\n")
        return scores

    def _require_best_by(self, names: Collection[str]) -> None:
        """Raise UserError if `best_by` is needed, but is neither the held-out loss nor one of `names`."""
        recipe = self.recipe
        known = dict.fromkeys(["loss", *names] if self.held_out is not None else names)
        if (recipe.keep_best or recipe.patience) and recipe.best_by not in known:
            raise UserError(
                "no such score", key="evaluation.best_by", value=recipe.best_by, remedy=f"use one of {', '.join(known)}"
            )

    @staticmethod
    def _task_scores(trainer: MllmTrainer, scorer: Scorer) -> dict[str, float]:
        """Score on all ranks together, because weights may be sharded; return rank 0's scores."""
        processor = copy.deepcopy(trainer.processor)
        processor.tokenizer.padding_side = "left"  # required by batched generation
        found: list[dict[str, float] | UserError]
        try:
            # Autocast: the frozen LLM can be in bf16 and the projector in fp32.
            with trainer.accelerator.autocast():
                mllm = Mllm(trainer.bare, processor, trainer.args.device)
                found = [scorer.evaluate(mllm, int(trainer.state.global_step))]
        except UserError as error:
            found = [error]
        if trainer.args.world_size > 1:
            dist.broadcast_object_list(found)
        if isinstance(found[0], UserError):  # raised on all ranks, so that none waits for the others
            raise found[0]
        return found[0]


def held_out_loss(trainer: MllmTrainer, held_out: Any, collate: Callable[..., Any], batch_size: int) -> float:
    """Return the mean cross entropy over all supervised tokens of `held_out`, independent of batches and ranks.

    Every rank makes the same number of forward passes, as ZeRO-3 requires; passes beyond the end are not counted.
    """
    ranks, rank = trainer.args.world_size, trainer.args.process_index
    starts = range(0, len(held_out), batch_size * ranks)
    sums = torch.zeros(2, dtype=torch.float64)
    for start in tqdm(starts, desc="held-out loss", leave=False, disable=not trainer.is_world_process_zero()):
        first = start + rank * batch_size
        rows = [held_out[at] for at in range(first, min(first + batch_size, len(held_out)))]
        batch = collate(rows or [held_out[0]])
        if not rows:
            batch["labels"] = torch.full_like(batch["labels"], IGNORED)
        inputs = trainer._prepare_inputs(batch)
        with trainer.compute_loss_context_manager():
            summed, count = trainer.sum_and_count(trainer.model, inputs)
        sums += torch.stack([summed.double(), count.double()]).cpu()
    if ranks > 1:
        sums = trainer.accelerator.reduce(sums.to(trainer.args.device), reduction="sum").cpu()
    return float(sums[0] / sums[1])
