"""Evaluation inside a pretraining run, and its best weights.

every N steps    scores of the weights, or of their average where one is kept --> evaluation.jsonl, the trainer's log
a new best       best/: a whole encoder, with the step and its scores in evaluation.json
"""

from __future__ import annotations

import json
import os
import shutil
import sys
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
from vision_tower.training.ema import is_divided
from vision_tower.training.run_folder import keep_lines

FILE = "evaluation.jsonl"
BEST = "best"


class Scoring(TrainerCallback):
    """Measures the run it is added to. Bad data raises UserError here, before the run starts."""

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
            given = [None if file is None else Path(file) for file in (recipe.templates, recipe.classes)]
            self.task = load_task(Path(recipe.zeroshot), *given)
        self._best: float | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """A resumed run drops the lines it will repeat and knows its best; a fresh one has neither."""
        told = self.folder / BEST / "evaluation.json"
        if state.global_step and told.is_file():
            self._best = read_object(told).get(self.recipe.best_by)  # none where another score is asked for now
        if state.is_world_process_zero:
            keep_lines(self.folder / FILE, state.global_step)
            if not state.global_step:
                shutil.rmtree(self.folder / BEST, ignore_errors=True)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Measure every N steps, and at the end."""
        if state.global_step % self.recipe.every and state.global_step != state.max_steps:
            return
        scores = self._scores()
        if state.is_world_process_zero:
            with (self.folder / FILE).open("a") as stream:
                stream.write(json.dumps({"step": state.global_step, **scores}) + "\n")
        due = control.should_log  # a line of the log takes it back, though the step's own is still to come
        self.trainer.log({f"eval_{name}": score for name, score in scores.items()})
        control.should_log = due
        if self.recipe.best_by != "none" and (self._best is None or scores[self.recipe.best_by] > self._best):
            self._best = scores[self.recipe.best_by]
            self._keep({"step": state.global_step, **scores})

    def _scores(self) -> dict[str, float]:
        """On all ranks. Rank 0 measures; under ZeRO-3, where the weights are divided, all do, with the same result."""
        model, average = self.trainer.model, self.trainer.average
        half = torch.autocast(model.device.type, torch.bfloat16, enabled=model.dtype == torch.bfloat16)
        found: list[dict[str, float] | UserError] = [{}]
        with untouched_randomness(), half, nullcontext() if average is None else average.applied(model):
            if is_divided(model) or self.trainer.is_world_process_zero():
                found = [self._measured()]
        if self.trainer.args.world_size > 1:
            dist.broadcast_object_list(found)
        if isinstance(found[0], UserError):  # all ranks end with the same line; none is left waiting
            raise found[0]
        return found[0]

    def _measured(self) -> dict[str, float] | UserError:
        """The scores, or why there are none."""
        try:
            return self._measure()
        except NotFinite:
            return UserError(
                f"step {self.trainer.state.global_step}: embeddings hold NaN or infinity, the run diverged",
                remedy="lower training.learning_rate in another output_dir",
            )
        except UserError as error:
            return error

    def _measure(self) -> dict[str, float]:
        model, size, progress = self.trainer.model, self.recipe.batch_size, self.trainer.is_world_process_zero()
        scores: dict[str, float] = {}
        if self.pairs is not None:
            recalls = evaluate_retrieval(model, self.tokenizer, self.pairs, size, progress=progress)
            scores |= recalls | {"mean_recall": sum(recalls.values()) / len(recalls)}
        if self.task is not None:
            scores |= evaluate_zeroshot(model, self.tokenizer, self.task, size, progress=progress)
        return scores

    def _keep(self, told: dict[str, float]) -> None:
        """Write `best/` whole, then put it in the place of the last one."""
        average = self.trainer.averaged_weights()
        weights = self.trainer.whole_weights() if self.trainer.average is None else average
        if weights is not None:
            work = self.folder / f".{BEST}.partial"
            shutil.rmtree(work, ignore_errors=True)
            try:
                save_encoder(self.trainer.model, self.tokenizer, work, weights)
                write_text(work / "evaluation.json", json.dumps(told, indent=1) + "\n")
                shutil.rmtree(self.folder / BEST, ignore_errors=True)
                os.replace(work, self.folder / BEST)
            except Exception as error:  # as with a checkpoint, a full disk does not cost the run
                shutil.rmtree(work, ignore_errors=True)
                if not disk_is_full(error):
                    raise
                print(f"{self.folder / BEST}: not written, the disk is full", file=sys.stderr, flush=True)
        self.trainer.accelerator.wait_for_everyone()
