"""Evaluation during a pretraining run, and its best weights.

every N steps    scores of the weights (of their average, if the run keeps one) --> evaluation.jsonl and the log
new best score   best/: a complete encoder, with its step and scores in evaluation.json
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from transformers import TrainerCallback

from vision_tower.checkpoints.encoder import save_encoder
from vision_tower.common.errors import NotFinite, UserError, disk_is_full
from vision_tower.common.files import read_object, write_text
from vision_tower.common.randomness import untouched_randomness
from vision_tower.data.image_folder import load_task
from vision_tower.data.karpathy import load_pairs
from vision_tower.evaluation.evaluate import evaluate_retrieval, evaluate_zeroshot
from vision_tower.pretraining.recipe import EvaluationRecipe
from vision_tower.pretraining.trainer import PretrainTrainer
from vision_tower.text.tokenizer import ClipsTokenizer
from vision_tower.training.ema import is_sharded
from vision_tower.training.run_folder import keep_lines

FILE = "evaluation.jsonl"
BEST = "best"
logger = logging.getLogger(__name__)


class EvalCallback(TrainerCallback):
    """Evaluates the run that it is added to. The constructor raises UserError if the evaluation data is unusable."""

    def __init__(self, recipe: EvaluationRecipe, trainer: PretrainTrainer, tokenizer: ClipsTokenizer) -> None:
        self.recipe = recipe
        self.trainer = trainer
        self.tokenizer = tokenizer
        self.folder = Path(trainer.args.output_dir)
        self.pairs = self.task = None
        if recipe.retrieval is not None:
            data = Path(recipe.retrieval)
            self.pairs = load_pairs(data, Path(recipe.images or data.parent), recipe.split)
        if recipe.zeroshot is not None:
            templates, classes = (None if file is None else Path(file) for file in (recipe.templates, recipe.classes))
            self.task = load_task(Path(recipe.zeroshot), templates, classes)
        self._best: float | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """On resume, delete the lines that will be repeated and read the best score; otherwise, remove old results."""
        scores = self.folder / BEST / "evaluation.json"
        if state.global_step and scores.is_file():
            self._best = read_object(scores).get(self.recipe.best_by)  # None if best_by has changed since
        if state.is_world_process_zero:
            keep_lines(self.folder / FILE, state.global_step)
            if not state.global_step:
                shutil.rmtree(self.folder / BEST, ignore_errors=True)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Evaluate every N steps and after the last step."""
        if state.global_step % self.recipe.every and state.global_step != state.max_steps:
            return
        scores = self._evaluate_on_all_ranks()
        entry = {"step": state.global_step, **scores}
        if state.is_world_process_zero:
            with (self.folder / FILE).open("a") as stream:
                stream.write(json.dumps(entry) + "\n")
        should_log = control.should_log  # trainer.log resets it, but the step's own entry is still to come
        self.trainer.log({f"eval_{name}": score for name, score in scores.items()})
        control.should_log = should_log
        if self.recipe.best_by != "none" and (self._best is None or scores[self.recipe.best_by] > self._best):
            self._best = scores[self.recipe.best_by]
            self._save_best(entry)

    def _evaluate_on_all_ranks(self) -> dict[str, float]:
        """Return the scores on all ranks. Rank 0 computes them; under ZeRO-3 (sharded weights) all ranks do."""
        model, average = self.trainer.model, self.trainer.average
        bf16 = torch.autocast(model.device.type, torch.bfloat16, enabled=model.dtype == torch.bfloat16)
        result: list[dict[str, float] | UserError] = [{}]
        with untouched_randomness(), bf16, nullcontext() if average is None else average.applied(model):
            if is_sharded(model) or self.trainer.is_world_process_zero():
                result = [self._scores_or_error()]
        if self.trainer.args.world_size > 1:
            dist.broadcast_object_list(result)
        if isinstance(result[0], UserError):  # raised on all ranks, so that none waits for the others
            raise result[0]
        return result[0]

    def _scores_or_error(self) -> dict[str, float] | UserError:
        try:
            return self._evaluate()
        except NotFinite:
            return UserError(
                f"step {self.trainer.state.global_step}: embeddings contain NaN or infinity, the run diverged",
                key="training.learning_rate",
                remedy="lower it and choose another output_dir",
            )
        except UserError as error:
            return error

    def _evaluate(self) -> dict[str, float]:
        model, size, progress = self.trainer.model, self.recipe.batch_size, self.trainer.is_world_process_zero()
        scores: dict[str, float] = {}
        if self.pairs is not None:
            recalls = evaluate_retrieval(model, self.tokenizer, self.pairs, size, progress=progress)
            scores |= recalls | {"mean_recall": sum(recalls.values()) / len(recalls)}
        if self.task is not None:
            scores |= evaluate_zeroshot(model, self.tokenizer, self.task, size, progress=progress)
        return scores

    def _save_best(self, entry: dict[str, float]) -> None:
        """Write `best/` to a hidden folder, then replace the previous one."""
        average = self.trainer.averaged_weights()
        weights = self.trainer.full_weights() if self.trainer.average is None else average
        if weights is not None:
            partial = self.folder / f".{BEST}.partial"
            shutil.rmtree(partial, ignore_errors=True)
            try:
                save_encoder(self.trainer.model, self.tokenizer, partial, weights)
                write_text(partial / "evaluation.json", json.dumps(entry, indent=1) + "\n")
                shutil.rmtree(self.folder / BEST, ignore_errors=True)
                os.replace(partial, self.folder / BEST)
            except Exception as error:
                shutil.rmtree(partial, ignore_errors=True)
                if not disk_is_full(error):
                    raise
                logger.warning("%s: not written, no space left on the device; training continues", self.folder / BEST)
        self.trainer.accelerator.wait_for_everyone()
