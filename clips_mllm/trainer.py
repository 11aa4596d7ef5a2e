"""`transformers.Trainer` with the loss over the global count of supervised tokens.

The vocabulary layer runs only where there is supervision: on image and prompt positions its output would be thrown
away, and with a large vocabulary it is a good part of the step.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch.utils.data import Sampler
from transformers import LlavaForConditionalGeneration, LlavaProcessor, Trainer

from clips_mllm.checkpoint import load_parts
from clips_mllm.prompts import IGNORED
from clips_mllm.sampler import LengthGroupedSampler
from clips_mllm.stages import optimizer_groups
from clips_mllm.train_recipe import StageRecipe
from vision_tower.errors import UserError


@contextmanager
def only_at(model: LlavaForConditionalGeneration, chosen: torch.Tensor) -> Iterator[None]:
    """Within this context the vocabulary layer sees only the chosen positions.

    Args:
        chosen: (b, s) bool. The logits come out as (1, chosen.sum(), v), in reading order.
    """

    def select(_: torch.nn.Module, arguments: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        return (arguments[0][chosen][None],)

    handle = model.lm_head.register_forward_pre_hook(select)
    try:
        yield
    finally:
        handle.remove()


def supervised_loss(
    model: torch.nn.Module, bare: LlavaForConditionalGeneration, inputs: dict[str, torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor]:
    """(sum of the cross entropy over this batch's supervised tokens in fp32, their number).

    Args:
        model: what to call (it may be wrapped by DDP or DeepSpeed).
        bare: the same model unwrapped.
        inputs: batch with `labels` (b, s); position t predicts label t + 1.
    """
    labels = inputs["labels"][:, 1:]
    chosen = F.pad(labels != IGNORED, (0, 1))
    batch = {name: value for name, value in inputs.items() if name != "labels"}
    with only_at(bare, chosen):
        logits = model(**batch, use_cache=False).logits[0]
    targets = labels[labels != IGNORED]
    return F.cross_entropy(logits.float(), targets, reduction="sum"), chosen.sum()


class MllmTrainer(Trainer):
    """Adds the loss, the stage's parameter groups, grouping by length, and complete checkpoints."""

    def __init__(
        self, *, stage: StageRecipe, processor: LlavaProcessor, group_by_length: bool, bare: Any, **kwargs: Any
    ) -> None:
        super().__init__(processing_class=processor, **kwargs)
        self.stage = stage
        self.group_by_length = group_by_length
        self.bare = bare
        self.model_accepts_loss_kwargs = True  # makes transformers count the supervised tokens of the global batch

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor:
        """Sum over this rank's tokens / global count, times the ranks over which gradients are averaged."""
        summed, count = supervised_loss(model, self.bare, inputs)
        loss = summed / (count if num_items_in_batch is None else num_items_in_batch) * self.accelerator.num_processes
        if not torch.isfinite(loss):
            raise UserError(
                f"step {self.state.global_step}: the loss is {loss.item()}; lower training.learning_rate, or use "
                "training.precision=fp32, and go on from the last checkpoint"
            )
        return loss

    def create_optimizer(self, model: torch.nn.Module | None = None) -> torch.optim.Optimizer:
        """AdamW with the stage's groups."""
        if self.optimizer is None:  # type: ignore[has-type]
            kind, options = self.get_optimizer_cls_and_kwargs(self.args)
            self.optimizer = kind(optimizer_groups(self.bare, self.stage, self.args.weight_decay), **options)
        return self.optimizer  # type: ignore[has-type]

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: torch.nn.Module | None = None) -> None:
        """Weights of a checkpoint, by `from_pretrained`, which knows the names that files use for this class.

        Trainer's own version compares the file's names with the model's, finds none, warns, and goes on from the
        weights that the run began with.
        """
        saved, _ = load_parts(resume_from_checkpoint, dtype=self.bare.dtype)
        self.bare.load_state_dict(saved.state_dict())

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[int] | None:
        if not self.group_by_length:
            return super()._get_train_sampler(train_dataset)
        together = self.args.train_batch_size * self.args.world_size * self.args.gradient_accumulation_steps
        return LengthGroupedSampler(self.train_dataset.lengths(), together, self.args.seed)  # type: ignore[union-attr]
