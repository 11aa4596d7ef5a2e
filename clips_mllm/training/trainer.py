"""`transformers.Trainer` with a loss averaged over the supervised tokens of the global batch.

The vocabulary layer runs at supervised positions only: its output at image and prompt positions is not needed, and with
a large vocabulary it takes much of a step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from peft import PeftModel
from torch.utils.data import DataLoader, Sampler

from clips_mllm.data.sampler import LengthGroupedSampler
from clips_mllm.model.adapters import read_into
from clips_mllm.model.cached_tower import CachedTower
from clips_mllm.model.checkpoint import load_parts, save_mllm
from clips_mllm.model.tiles import AnyModel, AnyProcessor
from clips_mllm.prompts.conversation import IGNORED
from clips_mllm.training.recipe import StageRecipe
from clips_mllm.training.stages import optimizer_groups
from vision_tower.common.errors import UserError
from vision_tower.training.loader_signals import ignore_signals_in_worker
from vision_tower.training.resume import ResumableTrainer


@contextmanager
def only_at(model: AnyModel, chosen: torch.Tensor) -> Iterator[None]:
    """Run the vocabulary layer at the chosen positions only, within this context.

    Args:
        chosen: (b, s) bool. The logits are then (1, chosen.sum(), v), in row-major order.
    """

    def select(_: torch.nn.Module, arguments: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        return (arguments[0][chosen][None],)

    handle = model.lm_head.register_forward_pre_hook(select)
    try:
        yield
    finally:
        handle.remove()


def supervised_loss(
    model: torch.nn.Module, bare: AnyModel, inputs: dict[str, torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (fp32 sum of the cross entropy over the batch's supervised tokens, their number).

    Args:
        model: the model, possibly wrapped by PEFT, DDP or DeepSpeed.
        bare: the same model unwrapped.
        inputs: batch with `labels` (b, s); position t predicts label t + 1.
    """
    labels = inputs["labels"][:, 1:]  # the only place that shifts labels
    chosen = F.pad(labels != IGNORED, (0, 1))
    batch = {name: value for name, value in inputs.items() if name != "labels"}
    with only_at(bare, chosen):
        logits = model(**batch, use_cache=False).logits[0]
    targets = labels[labels != IGNORED]
    return F.cross_entropy(logits.float(), targets, reduction="sum"), chosen.sum()


def _start_worker(seed: Callable[[int], None], worker: int) -> None:
    ignore_signals_in_worker(worker)
    seed(worker)


class Evaluator(Protocol):
    """Evaluates a model in training."""

    def evaluate(self, trainer: MllmTrainer) -> dict[str, float]:
        """Return numbers by name, the same on every rank."""
        ...


class MllmTrainer(ResumableTrainer):
    """Adds the loss, the stage's parameter groups, grouping by length, and complete checkpoints.

    Args:
        bare: the stock model, which PEFT has wrapped in `model` if there are adapters.
        evaluator: called by `evaluate`; None without evaluation.
        tower: vision tower with a feature cache; None if batches hold pixels.
    """

    def __init__(
        self,
        *,
        stage: StageRecipe,
        processor: AnyProcessor,
        group_by_length: bool,
        text_first: bool,
        bare: AnyModel,
        evaluator: Evaluator | None = None,
        tower: CachedTower | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(processing_class=processor, **kwargs)
        self.stage = stage
        self.processor = processor
        self.group_by_length = group_by_length
        self.text_first = text_first
        self.bare = bare
        self.evaluator = evaluator
        self.tower = tower
        self._batches: list[dict[str, torch.Tensor]] = []  # of this step
        self.model_accepts_loss_kwargs = True  # makes transformers count the supervised tokens of the global batch

    # --- a step

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        """Return the micro-batches of a step and the number of supervised tokens in the global batch.

        Raises:
            UserError: there is none.
        """
        batches, count = super().get_batch_samples(*args, **kwargs)
        if batches and not count:
            raise UserError(
                f"no supervised token in the global batch of step {self.state.global_step + 1}",
                key="data",
                remedy="check the data with `clips-mllm data doctor`, or raise data.max_length",
            )
        self._batches = batches
        return batches, count

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor:
        """Return this rank's loss: sum over its tokens / global count, times the ranks that gradients average over."""
        summed, count = self.sum_and_count(model, inputs)
        return summed / (count if num_items_in_batch is None else num_items_in_batch) * self.accelerator.num_processes

    def sum_and_count(self, model: torch.nn.Module, inputs: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the `supervised_loss` of a batch, with images from the feature cache if there is one."""
        with nullcontext(inputs) if self.tower is None else self.tower.completed(inputs, self.accelerator) as batch:
            return supervised_loss(model, self.bare, batch)

    def step_samples(self) -> list[str]:
        """Return the beginnings of the texts of this step's samples."""
        image = self.processor.image_token_id
        rows = [row[row != image][:100] for batch in self._batches for row in batch["input_ids"]]
        return list(self.processor.tokenizer.batch_decode(rows, skip_special_tokens=True))

    def create_optimizer(self, model: torch.nn.Module | None = None) -> torch.optim.Optimizer:
        """Build AdamW with the stage's parameter groups."""
        if self.optimizer is None:  # type: ignore[has-type]
            kind, options = self.get_optimizer_cls_and_kwargs(self.args)
            self.optimizer = kind(optimizer_groups(self.bare, self.stage, self.args.weight_decay), **options)
        return self.optimizer  # type: ignore[has-type]

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[int] | None:
        if not self.group_by_length:
            return super()._get_train_sampler(train_dataset)
        together = self.args.train_batch_size * self.args.world_size * self.args.gradient_accumulation_steps
        lengths = self.train_dataset.lengths()  # type: ignore[union-attr]
        return LengthGroupedSampler(lengths, together, self.args.seed, text_first=self.text_first)

    def get_train_dataloader(self) -> DataLoader:  # type: ignore[type-arg]
        """Return transformers' loader; its processes ignore a scheduler's signal, which is for the trainer."""
        loader = super().get_train_dataloader()
        own = getattr(loader, "base_dataloader", loader)  # inside accelerate's wrapper
        own.worker_init_fn = partial(_start_worker, own.worker_init_fn)
        return loader

    # --- evaluation

    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
        """Evaluate on all ranks; log the numbers and pass them to the callbacks."""
        assert self.evaluator is not None, "transformers evaluates only if evaluation.every is set"
        scores = self.evaluator.evaluate(self)
        numbers = {f"eval_{name}": value for name, value in scores.items()}
        self.log(dict(numbers))
        handler = self.callback_handler
        self.control = handler.on_evaluate(self.args, self.state, self.control, numbers)  # type: ignore[has-type]
        return numbers

    # --- checkpoints

    def layout(self) -> dict[str, Any]:
        """Add the number of samples, which the data order depends on."""
        return super().layout() | {"samples": len(self.train_dataset)}  # type: ignore[arg-type]

    def saved_parameters(self) -> Iterator[torch.nn.Parameter]:
        """Iterate over the saved weights: with an adapter those that train, otherwise all."""
        adapter = isinstance(self.model, PeftModel)
        return (weights for weights in self.model.parameters() if weights.requires_grad or not adapter)

    def write_model(self, output_dir: str | None, state_dict: dict[str, Any] | None) -> None:
        """Write a complete checkpoint, in the format of the run's result."""
        if self.args.should_save:
            config = self.bare.config
            config.use_cache = True  # transformers turns it off during training
            try:
                save_mllm(self.model, self.processor, Path(output_dir or self.args.output_dir), state_dict)
            finally:
                config.use_cache = False

    def read_model(self, folder: str) -> None:
        """Load weights by `from_pretrained`, which maps the names of stock files to those of the class."""
        if isinstance(self.model, PeftModel):
            read_into(self.model, folder)
        else:
            widest = max((weights.dtype for weights in self.bare.parameters()), key=lambda kind: kind.itemsize)
            saved, _ = load_parts(folder, dtype=widest)  # keeps fp32 master weights exact
            self.bare.load_state_dict(saved.state_dict())
