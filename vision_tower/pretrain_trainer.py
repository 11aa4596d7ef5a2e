"""`transformers.Trainer` with the CLIPS objective."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils.data import DataLoader
from transformers import Trainer

from vision_tower.losses import clips_losses
from vision_tower.pretrain_recipe import LossWeights
from vision_tower.training import parameter_groups


class PretrainTrainer(Trainer):
    """Adds the loss, decay on weight matrices only, and the loss terms in the log."""

    def __init__(self, *, loss_weights: LossWeights, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.loss_weights = loss_weights
        self.model_accepts_loss_kwargs = False  # the loss is a mean over the global batch already
        self._sums: dict[str, torch.Tensor] = {}
        self._steps = 0

    def compute_loss(self, model: torch.nn.Module, inputs: dict[str, Any], *_: Any, **__: Any) -> torch.Tensor:
        """The CLIPS loss of this rank; its mean over ranks is the global one."""
        labels = inputs.pop("labels")
        del inputs["keys"]
        out = model(**inputs)
        losses = clips_losses(
            image=out.image,
            web=out.web,
            sub=out.sub,
            scale=out.scale,
            caption_logits=out.caption_logits,
            caption_labels=labels,
            weights=self.loss_weights,
        )
        for name, value in losses.report.items():
            self._sums[name] = self._sums.get(name, torch.zeros_like(value)) + value
        self._steps += 1
        return losses.total

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        """Add the mean of every loss term since the last line."""
        if "loss" in logs and self._steps:
            sums = torch.stack(list(self._sums.values())) / self._steps
            means = self.accelerator.reduce(sums, reduction="mean").tolist()  # every rank logs, so every rank is here
            logs = logs | {name: round(mean, 6) for name, mean in zip(self._sums, means, strict=True)}
            self._sums, self._steps = {}, 0
        super().log(logs, *args, **kwargs)

    def create_optimizer(self, model: torch.nn.Module | None = None) -> torch.optim.Optimizer:
        """AdamW; see `parameter_groups` for what decays."""
        if self.optimizer is None:  # type: ignore[has-type]
            kind, options = self.get_optimizer_cls_and_kwargs(self.args)
            self.optimizer = kind(parameter_groups(self.model, self.args.weight_decay), **options)
        return self.optimizer  # type: ignore[has-type]

    def get_train_dataloader(self) -> DataLoader:  # type: ignore[type-arg]
        """The stream splits itself over ranks; accelerate must not split it again."""
        return DataLoader(
            self.train_dataset,  # type: ignore[arg-type]
            batch_size=self.args.per_device_train_batch_size,
            collate_fn=self.data_collator,
            num_workers=self.args.dataloader_num_workers,
            pin_memory=torch.cuda.is_available(),
            drop_last=True,
        )
