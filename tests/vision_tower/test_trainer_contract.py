"""The private interface of transformers.Trainer that our trainers override or use, as of the pinned version.

When this test fails after an update of transformers: read what changed in the named method, adapt
vision_tower/training/resume.py, run the resume tests (-m "slow or not slow"), then update TABLE and pyproject.toml.
"""

from __future__ import annotations

import inspect
import re
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from transformers import Trainer

from clips_mllm.training.trainer import MllmTrainer
from vision_tower.pretraining.stream_trainer import StreamTrainer
from vision_tower.pretraining.trainer import PretrainTrainer
from vision_tower.training.resume import ResumableTrainer

RECORDED = "5.23"
OURS = (ResumableTrainer, StreamTrainer, PretrainTrainer, MllmTrainer)
# Private methods that we override or call, and public ones that we override: parameter names in order.
TABLE = {
    "_run_epoch": "self model epoch train_dataloader steps_in_epoch num_update_steps_per_epoch trial "
    "ignore_keys_for_eval start_time resume_from_checkpoint epochs_trained steps_trained_in_current_epoch",
    "_get_grad_norm": "self model grad_norm",
    "_save": "self output_dir state_dict",
    "_load_from_checkpoint": "self resume_from_checkpoint model",
    "_load_best_model": "self",
    "_get_output_dir": "self trial",
    "_save_checkpoint": "self model trial",
    "_get_train_sampler": "self train_dataset",
    "_prepare_inputs": "self inputs",
    "train": "self resume_from_checkpoint trial ignore_keys_for_eval",
    "create_scheduler": "self num_training_steps optimizer",
    "create_optimizer": "self model",
    "get_batch_samples": "self epoch_iterator num_batches device",
    "training_step": "self model inputs num_items_in_batch",
    "compute_loss": "self model inputs return_outputs num_items_in_batch",
    "floating_point_ops": "self inputs",
    "log": "self logs start_time",
    "evaluate": "self eval_dataset ignore_keys metric_key_prefix",
    "get_train_dataloader": "self",
}
# Private attributes that ResumableTrainer restores, with the method that resets them.
ATTRIBUTES = ("_tr_loss", "_globalstep_last_logged")


@pytest.mark.parametrize("name", TABLE)
def test_signature_is_unchanged(name: str) -> None:
    method = getattr(Trainer, name, None)
    version = metadata.version("transformers")
    assert method is not None, f"transformers {version} has no Trainer.{name}"
    found = " ".join(inspect.signature(method).parameters)
    assert found == TABLE[name], f"Trainer.{name} of transformers {version} differs from {RECORDED}"


def test_all_overrides_are_recorded() -> None:
    overridden = {name for ours in OURS for name in vars(ours) if inspect.isfunction(getattr(Trainer, name, None))}
    assert overridden - {"__init__"} <= set(TABLE)


def test_state_is_reset_before_on_train_begin() -> None:
    """`RestoreState` runs in on_train_begin and relies on this order."""
    source = inspect.getsource(Trainer._inner_training_loop)
    for name in ATTRIBUTES:
        assert 0 < source.find(f"self.{name} = ") < source.find("callback_handler.on_train_begin"), name


def test_installed_and_pinned_versions_equal_the_recorded_one() -> None:
    project = (Path(__file__).parents[2] / "pyproject.toml").read_text()
    (pin,) = map(Requirement, re.findall(r'"(transformers[<>=].*?)"', project))
    assert metadata.version("transformers").startswith(f"{RECORDED}.")
    assert pin.specifier.contains(f"{RECORDED}.0") and not pin.specifier.contains("5.99")
