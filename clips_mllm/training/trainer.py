"""`transformers.Trainer` with the loss over the global count of supervised tokens.

The vocabulary layer runs only where there is supervision: on image and prompt positions its output would be thrown
away, and with a large vocabulary it is a good part of the step.
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
from transformers.integrations.deepspeed import deepspeed_load_checkpoint

from clips_mllm.data.sampler import LengthGroupedSampler
from clips_mllm.model.adapters import read_into
from clips_mllm.model.cached_tower import CachedTower
from clips_mllm.model.checkpoint import load_parts, save_mllm
from clips_mllm.model.tiles import AnyModel, AnyProcessor
from clips_mllm.prompts.conversation import IGNORED
from clips_mllm.training.stage_recipe import StageRecipe
from clips_mllm.training.stages import optimizer_groups
from vision_tower.common.errors import UserError
from vision_tower.training.nan_guard import refuse
from vision_tower.training.resume import ResumableTrainer
from vision_tower.training.sigterm import leave_signals_to_the_trainer


@contextmanager
def only_at(model: AnyModel, chosen: torch.Tensor) -> Iterator[None]:
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
    model: torch.nn.Module, bare: AnyModel, inputs: dict[str, torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor]:
    """(sum of the cross entropy over this batch's supervised tokens in fp32, their number).

    Args:
        model: what to call (it may be wrapped by PEFT, DDP or DeepSpeed).
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


def _start_worker(seed: Callable[[int], None], worker: int) -> None:
    leave_signals_to_the_trainer(worker)
    seed(worker)


class Measures(Protocol):
    """What `evaluate` asks for numbers."""

    def measure(self, trainer: MllmTrainer) -> dict[str, float]:
        """All numbers, the same on every rank."""
        ...


class MllmTrainer(ResumableTrainer):
    """Adds the loss, the stage's parameter groups, grouping by length, checkpoints that are complete by themselves.

    Args:
        bare: the stock model inside `model`, which PEFT may have wrapped.
        measuring: what `evaluate` measures, or none.
        tower: reads and fills the feature cache, or none; then batches hold pixels.
    """

    def __init__(
        self,
        *,
        stage: StageRecipe,
        processor: AnyProcessor,
        group_by_length: bool,
        text_first: bool,
        bare: AnyModel,
        measuring: Measures | None = None,
        tower: CachedTower | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(processing_class=processor, **kwargs)
        self.stage = stage
        self.processor = processor
        self.group_by_length = group_by_length
        self.text_first = text_first
        self.bare = bare
        self.measuring = measuring
        self.tower = tower
        self._batches: list[dict[str, torch.Tensor]] = []  # of this step
        self.model_accepts_loss_kwargs = True  # makes transformers count the supervised tokens of the global batch

    # --- a step

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        """The micro-batches of a step and the global count of their supervised tokens, which is not 0."""
        batches, count = super().get_batch_samples(*args, **kwargs)
        if batches and not count:
            raise UserError(
                f"step {self.state.global_step + 1}: no supervised token in the whole batch, so there is "
                f"nothing to learn",
                remedy="look at the data with `clips-mllm data doctor`, or raise data.max_length",
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
        """Sum over this rank's tokens / global count, times the ranks over which gradients are averaged."""
        summed, count = self.sum_and_count(model, inputs)
        return summed / (count if num_items_in_batch is None else num_items_in_batch) * self.accelerator.num_processes

    def sum_and_count(self, model: torch.nn.Module, inputs: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
        """`supervised_loss` of a batch, whose images may be in the feature cache."""
        with nullcontext(inputs) if self.tower is None else self.tower.completed(inputs, self.accelerator) as batch:
            return supervised_loss(model, self.bare, batch)

    def _get_grad_norm(self, *args: Any, **kwargs: Any) -> Any:
        """The last place before anything of this step is kept: nothing that is not finite goes further."""
        norm = super()._get_grad_norm(*args, **kwargs)
        values = {"loss": self._tr_loss, "gradient norm": torch.as_tensor(0.0 if norm is None else norm)}
        refuse(values, self.state.global_step + 1, self._said, Path(self.args.output_dir))
        return norm

    def _said(self) -> list[str]:
        """This step's samples by the beginnings of their texts."""
        image = self.processor.image_token_id
        rows = [row[row != image][:100] for batch in self._batches for row in batch["input_ids"]]
        return list(self.processor.tokenizer.batch_decode(rows, skip_special_tokens=True))

    def create_optimizer(self, model: torch.nn.Module | None = None) -> torch.optim.Optimizer:
        """AdamW with the stage's groups."""
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
        """transformers', whose loader processes also outlive a scheduler's signal to the whole job."""
        loader = super().get_train_dataloader()
        own = getattr(loader, "base_dataloader", loader)  # accelerate's stands around it
        own.worker_init_fn = partial(_start_worker, own.worker_init_fn)
        return loader

    # --- measuring

    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
        """What the recipe asks for, on all ranks; the numbers go to the log and to the callbacks that wait for them."""
        assert self.measuring is not None, "transformers evaluates only where the recipe says how often"
        scores = self.measuring.measure(self)
        numbers = {f"eval_{name}": value for name, value in scores.items()}
        self.log(dict(numbers))
        handler = self.callback_handler
        self.control = handler.on_evaluate(self.args, self.state, self.control, numbers)  # type: ignore[has-type]
        return numbers

    # --- checkpoints

    def layout(self) -> dict[str, Any]:
        """Also the number of samples, which the order depends on."""
        return super().layout() | {"samples": len(self.train_dataset)}  # type: ignore[arg-type]

    def saved_parameters(self) -> Iterator[torch.nn.Parameter]:
        """An adapter's checkpoints hold what trains."""
        adapter = isinstance(self.model, PeftModel)
        return (weights for weights in self.model.parameters() if weights.requires_grad or not adapter)

    def write_model(self, output_dir: str | None, state_dict: dict[str, Any] | None) -> None:
        """A checkpoint as the run's last one will be, so that it loads, chats and merges by itself."""
        if self.args.should_save:
            config = self.bare.config
            config.use_cache = True  # transformers switches it off while training
            try:
                save_mllm(self.model, self.processor, Path(output_dir or self.args.output_dir), state_dict)
            finally:
                config.use_cache = False

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: torch.nn.Module | None = None) -> None:
        """Weights of a checkpoint, by `from_pretrained`, which knows the names that files use for this class.

        Trainer's own version compares the file's names with the model's, finds none, warns, and goes on from the
        weights that the run began with.
        """
        if isinstance(self.model, PeftModel):
            read_into(self.model, resume_from_checkpoint)
        else:
            widest = max((weights.dtype for weights in self.bare.parameters()), key=lambda kind: kind.itemsize)
            saved, _ = load_parts(resume_from_checkpoint, dtype=widest)  # fp32 masters beside a bf16 LLM stay exact
            self.bare.load_state_dict(saved.state_dict())

    def _load_best_model(self) -> None:
        """The best checkpoint's weights, in the same way as any other's."""
        best = self.state.best_model_checkpoint
        assert best is not None
        if self.is_deepspeed_enabled:
            deepspeed_load_checkpoint(
                self.model_wrapped, best, load_module_strict=not isinstance(self.model, PeftModel)
            )
        else:
            self._load_from_checkpoint(best)
