"""Recipe of `clips-mllm train`: all values of the two LLaVA stages. Does not import torch."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from clips_mllm.data.recipe import InstructionRecipe
from clips_mllm.model.recipe import AdapterRecipe, MllmRecipe
from vision_tower.common.errors import UserError
from vision_tower.common.files import read_object
from vision_tower.common.recipe import check_ranges, refuse_unused
from vision_tower.training.recipe import TrainingRecipe


@dataclasses.dataclass(frozen=True, kw_only=True)
class StageRecipe:
    """Trainable parts of a stage; the others are frozen.

    Args:
        projector: train the MLP between tower and LLM. It never gets an adapter; its weights are saved with the LLM's.
        llm: train the LLM, all weights or an adapter.
        tower: train the vision tower up to the hidden state that the projector reads, all weights or an adapter.
        tower_from_layer: with `tower`, index of the first block to train; earlier blocks stay frozen.
        projector_learning_rate: learning rate of the projector; default: training.learning_rate.
        llm_learning_rate: learning rate of the LLM; default: training.learning_rate.
        tower_learning_rate: learning rate of the tower; default: training.learning_rate.
        adapter: low-rank adapters for LLM and tower.
    """

    projector: bool = True
    llm: bool = False
    tower: bool = False
    tower_from_layer: int = 0
    projector_learning_rate: float | None = None
    llm_learning_rate: float | None = None
    tower_learning_rate: float | None = None
    adapter: AdapterRecipe = dataclasses.field(default_factory=AdapterRecipe)

    def check(self) -> None:
        """Raise UserError if nothing would train, or a value is invalid or has no effect."""
        if not (self.projector or self.llm or self.tower):
            raise UserError("nothing to train", key="stage", remedy="set projector, llm or tower to true")
        for name in ("projector", "llm", "tower"):
            if not getattr(self, name):
                fields = [f"{name}_learning_rate", *(["tower_from_layer"] if name == "tower" else [])]
                refuse_unused(self, fields, f"has no effect, the {name} is frozen", "stage.", f"set stage.{name}=true")
            check_ranges(self, "stage.", **{f"{name}_learning_rate": "[0, inf)"})
        self._check_adapter()

    def _check_adapter(self) -> None:
        adapter = self.adapter
        if adapter.kind == "none":
            fields, remedy = ("rank", "alpha", "dropout"), "set stage.adapter.kind"
            refuse_unused(adapter, fields, "has no effect without an adapter", "stage.adapter.", remedy)
            return
        if not (self.llm or self.tower):
            raise UserError(
                "nothing to adapt is trained", key="stage.adapter.kind", value=adapter.kind, remedy="set stage.llm=true"
            )
        if adapter.kind == "qlora" and not self.llm:
            raise UserError(
                "the LLM is frozen", key="stage.adapter.kind", value="qlora", remedy="set stage.llm=true, or use lora"
            )
        check_ranges(adapter, "stage.adapter.", rank="[1, inf)", alpha="[1, inf)", dropout="[0, 1)")


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainEvaluationRecipe:
    """Evaluation during training. The training itself does not depend on it, except for early stopping.

    Args:
        every: optimizer steps between evaluations; 0 turns evaluation off.
        file: held-out conversations in a format of data.file.
        images: folder of their images; default: data.images.
        share: without `file`, fraction of data.file that is held out from training.
        batch_size: samples per forward pass and device for the held-out loss.
        tasks: recipe of `clips-mllm evaluate` (configs/eval/) with lmms-eval tasks to run.
        scorer: with `tasks`, MODULE:FUNCTION that gets the path of `tasks` and returns an object with
            `evaluate(mllm, step) -> dict[str, float]` and the `names` of these scores.
        best_by: number that selects the best checkpoint: "loss" (lower is better) or a score of `tasks` (higher is
            better).
        keep_best: load the best weights at the end; their checkpoint is never deleted.
        patience: stop after this many evaluations without improvement; 0 never stops early.
    """

    every: int = 0
    file: str | None = None
    images: str | None = None
    share: float = 0.0
    batch_size: int = 8
    tasks: str | None = None
    scorer: str = "clips_eval.lmms.in_training:load_scorer"
    best_by: str = "loss"
    keep_best: bool = False
    patience: int = 0

    def check(self, save_every: int) -> None:
        """Raise UserError if a value is invalid or has no effect, or values contradict each other."""
        holds_out = self.file is not None or bool(self.share)
        selects = self.keep_best or bool(self.patience)
        for works, names, remedy in (
            (bool(self.every), [field.name for field in dataclasses.fields(self)], "set evaluation.every"),
            (self.file is not None, ["images"], "give evaluation.file"),
            (self.file is None, ["share"], "give either evaluation.file or evaluation.share"),
            (holds_out, ["batch_size"], "give evaluation.file or evaluation.share"),
            (self.tasks is not None, ["scorer"], "give evaluation.tasks"),
            (selects, ["best_by"], "set evaluation.keep_best or evaluation.patience"),
        ):
            if not works:
                refuse_unused(self, names, "has no effect", "evaluation.", remedy)
        if not self.every:
            return
        if not holds_out and self.tasks is None:
            raise UserError(
                "nothing to evaluate", key="evaluation.every", value=self.every, remedy="set .file, .share or .tasks"
            )
        check_ranges(self, "evaluation.", share="[0, 1)", batch_size="[1, inf)")
        if selects and self.best_by == "loss" and not holds_out:
            raise UserError("no held-out loss", key="evaluation.best_by", value="loss", remedy="set .file or .share")
        if selects and self.best_by != "loss" and self.tasks is None:
            raise UserError("no tasks", key="evaluation.best_by", value=self.best_by, remedy="set .tasks, or use loss")
        if self.keep_best and (not save_every or save_every % self.every):
            raise UserError(
                f"needs a checkpoint at every evaluation, but evaluation.every={self.every} and "
                f"training.save_every={save_every}",
                key="evaluation.keep_best",
                remedy="make training.save_every a multiple of evaluation.every",
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class MllmTraining(TrainingRecipe):
    """Optimization of an MLLM.

    Args:
        compile: compile the transformer blocks with torch.compile.
        liger: use the fused Triton kernels of the package liger-kernel (GPU only).
    """

    compile: bool = False
    liger: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainRecipe:
    """Train a multimodal LLM: stage 1 aligns the projector, stage 2 finetunes the LLM too.

    Args:
        output_dir: run folder for metrics, checkpoints, and the result: a stock LLaVA checkpoint or a PEFT adapter.
        model: parts of the MLLM.
        data: conversations.
        stage: trainable parts.
        training: optimization.
        evaluation: evaluation during training.
    """

    output_dir: str
    model: MllmRecipe
    data: InstructionRecipe
    stage: StageRecipe = dataclasses.field(default_factory=StageRecipe)
    training: MllmTraining = dataclasses.field(default_factory=MllmTraining)
    evaluation: TrainEvaluationRecipe = dataclasses.field(default_factory=TrainEvaluationRecipe)

    def check(self) -> None:
        """Raise UserError if a value is invalid or has no effect, or values contradict each other."""
        self.model.check()
        self.data.check()
        self.stage.check()
        self.training.check()
        self.evaluation.check(self.training.save_every)
        if self.model.tiles is not None and self.data.feature_cache is not None:
            raise UserError(
                "does not support images in tiles (model.tiles)",
                key="data.feature_cache",
                value=self.data.feature_cache,
                remedy="leave one of the two out",
            )
        if self.stage.adapter.kind != "none" and self.model.checkpoint is None:
            raise UserError(
                "an adapter is saved without its base, which must be a checkpoint",
                key="model.checkpoint",
                remedy="give a run of stage 1 (configs/mllm/*_align.yaml) instead of tower and llm",
            )
        if self._zero_stage() == 3:
            self._check_zero3()

    def _zero_stage(self) -> int:
        """Return the ZeRO stage of the DeepSpeed file; 0 without one."""
        if self.training.deepspeed is None or not Path(self.training.deepspeed).is_file():
            return 0  # a missing file is reported with the training arguments
        stage = read_object(Path(self.training.deepspeed)).get("zero_optimization", {}).get("stage", 0)
        return stage if isinstance(stage, int) else 0

    def _check_zero3(self) -> None:
        zero2 = "use configs/deepspeed/zero2.json"
        if self.model.projector_init == "standardized":
            raise UserError(
                "not supported with ZeRO-3, which shards the tower before it can read images",
                key="model.projector_init",
                value="standardized",
                remedy=f"{zero2}, or projector_init=default",
            )
        if self.stage.adapter.kind == "qlora":
            raise UserError(
                "ZeRO-3 cannot divide 4-bit weights",
                key="training.deepspeed",
                value=self.training.deepspeed,
                remedy=f"{zero2}, or stage.adapter.kind=lora",
            )
