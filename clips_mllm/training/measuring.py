"""Measuring inside a run: the loss on held-out conversations, and lmms-eval tasks.

every N steps   loss over all supervised held-out tokens, scores of the tasks --> evaluation.jsonl, the trainer's log

What measures the tasks lives in `clips_eval`, which this package does not import: the recipe names it, as
MODULE:FUNCTION, and it is called with the recipe of the tasks.
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
from clips_mllm.training.stage_recipe import TrainEvaluationRecipe
from vision_tower.common.errors import UserError
from vision_tower.common.randomness import untouched_randomness
from vision_tower.training.run_folder import keep_lines

if TYPE_CHECKING:
    from clips_mllm.training.trainer import MllmTrainer

FILE = "evaluation.jsonl"


class Scorer(Protocol):
    """What measures tasks on a model that is being trained. `names` are those of the scores that it can give."""

    names: Collection[str]

    def evaluate(self, mllm: Mllm, step: int) -> dict[str, float]:
        """Scores by name, of the model as it is. Called on every rank."""
        ...


def load_scorer(recipe: TrainEvaluationRecipe) -> Scorer | None:
    """The recipe's scorer, or None where there are no tasks. Raises UserError where there is no such function."""
    if recipe.tasks is None:
        return None
    if not Path(recipe.tasks).is_file():
        raise UserError("no such recipe (evaluation.tasks)", file=recipe.tasks, remedy="see configs/eval/")
    module, _, name = recipe.scorer.partition(":")
    try:
        build: Callable[[str], Scorer] = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(
            f"cannot be used ({error})", key="evaluation.scorer", value=recipe.scorer, remedy="give MODULE:FUNCTION"
        ) from error
    return build(recipe.tasks)


class Measuring(TrainerCallback):
    """Measures when the trainer asks; as a callback it keeps the file in step with a resumed run.

    Args:
        held: samples that are not trained on, or none.
        collate: samples to a batch.
    """

    def __init__(
        self,
        recipe: TrainEvaluationRecipe,
        folder: Path,
        held: Dataset[dict[str, Any]] | None,
        collate: Callable[[list[dict[str, Any]]], dict[str, torch.Tensor]],
    ) -> None:
        self.recipe = recipe
        self.folder = folder
        self.held = held
        self.collate = collate
        self.scorer = load_scorer(recipe)
        self._require_best(() if self.scorer is None else self.scorer.names)  # before step 1

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Drop the lines that a resumed run will write again."""
        if state.is_world_process_zero:
            keep_lines(self.folder / FILE, state.global_step)

    def measure(self, trainer: MllmTrainer) -> dict[str, float]:
        """All numbers, the same on every rank; what the run draws afterwards does not depend on it."""
        scores: dict[str, float] = {}
        was_training = trainer.model.training
        trainer.model.eval()
        with untouched_randomness(), torch.no_grad():
            if self.held is not None:
                scores["loss"] = held_out_loss(trainer, self.held, self.collate, self.recipe.batch_size)
            if self.scorer is not None:
                scores |= self._task_scores(trainer)
        trainer.model.train(was_training)
        self._require_best(scores)  # a task may come out without a score that it could have given
        if trainer.is_world_process_zero():
            with (self.folder / FILE).open("a") as stream:
                stream.write(json.dumps({"step": trainer.state.global_step, **scores}) + "\n")
        return scores

    def _require_best(self, names: Collection[str]) -> None:
        """Raise UserError where what tells the best is neither the held-out loss nor one of `names`."""
        recipe = self.recipe
        there = dict.fromkeys(["loss", *names] if self.held is not None else names)
        if (recipe.keep_best or recipe.patience) and recipe.best_by not in there:
            raise UserError(
                "not measured", key="evaluation.best_by", value=recipe.best_by, remedy=f"there are {', '.join(there)}"
            )

    def _task_scores(self, trainer: MllmTrainer) -> dict[str, float]:
        """On all ranks in step, as weights that are divided need; rank 0's scores count."""
        assert self.scorer is not None
        processor = copy.deepcopy(trainer.processor)
        processor.tokenizer.padding_side = "left"  # as generation needs
        found: list[dict[str, float] | UserError]
        try:
            # The frozen LLM may be in bf16 and the projector in fp32: as in training, autocast brings them together.
            with trainer.accelerator.autocast():
                found = [self.scorer.evaluate(Mllm(trainer.bare, processor, trainer.args.device), self._step(trainer))]
        except UserError as error:
            found = [error]
        if trainer.args.world_size > 1:
            dist.broadcast_object_list(found)
        if isinstance(found[0], UserError):  # all ranks end with the same line; none is left waiting
            raise found[0]
        return found[0]

    @staticmethod
    def _step(trainer: MllmTrainer) -> int:
        return int(trainer.state.global_step)


def held_out_loss(trainer: MllmTrainer, held: Any, collate: Callable[..., Any], batch_size: int) -> float:
    """Mean cross entropy over every supervised token of `held`, whatever the batches and ranks.

    Every rank makes the same number of forward passes, as ZeRO-3 needs; those beyond the end count nothing.
    """
    ranks, rank = trainer.args.world_size, trainer.args.process_index
    starts = range(0, len(held), batch_size * ranks)
    sums = torch.zeros(2, dtype=torch.float64)
    for start in tqdm(starts, desc="held-out loss", leave=False, disable=not trainer.is_world_process_zero()):
        first = start + rank * batch_size
        batch = collate([held[at % len(held)] for at in range(first, min(first + batch_size, len(held)))] or [held[0]])
        if first >= len(held):
            batch["labels"] = torch.full_like(batch["labels"], IGNORED)
        inputs = trainer._prepare_inputs(batch)
        with trainer.compute_loss_context_manager():
            summed, count = trainer.sum_and_count(trainer.model, inputs)
        sums += torch.stack([summed.double(), count.double()]).cpu()
    if ranks > 1:
        sums = trainer.accelerator.reduce(sums.to(trainer.args.device), reduction="sum").cpu()
    return float(sums[0] / sums[1])
