"""Checks before step 1 of what would otherwise fail hours later.

space      the disk has room for the checkpoints
dry save   config, processor, template, generation settings and the small trained parts are written by the code that
           saves checkpoints, read back and compared; the LLM's own weights are not
data       a sample is rendered and decoded; the first rows are shown with their supervised tokens marked
"""

from __future__ import annotations

import logging
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file
from transformers import AutoConfig, GenerationConfig, PreTrainedModel

from clips_mllm.model.adapters import PROJECTOR, read_config
from clips_mllm.model.checkpoint import save_mllm
from clips_mllm.model.fingerprints import tensor_digest
from clips_mllm.model.stock import check_image_token
from clips_mllm.training.projector import gathered
from vision_tower.checkpoints.loading import read_pretrained
from vision_tower.common.errors import UserError, disk_is_full
from vision_tower.training.disk_space import expected_bytes, free_bytes, gigabytes
from vision_tower.training.model_tools import size

if TYPE_CHECKING:
    from clips_mllm.training.trainer import MllmTrainer

PROBE = ".preflight"
logger = logging.getLogger(__name__)


def preflight(trainer: MllmTrainer, folder: Path) -> None:
    """Run all checks on the main process; the other ranks wait.

    Raises:
        UserError: too little disk space, or a part that is not read back as it was saved.
    """
    with gathered(_small_parameters(trainer).values()):
        if trainer.is_world_process_zero():
            check_space(trainer, folder)
            dry_save(trainer, folder / PROBE)
    trainer.accelerator.wait_for_everyone()


def check_space(trainer: MllmTrainer, folder: Path) -> None:
    """Raise UserError if the result, the kept checkpoints and one being written do not fit. A lower bound."""
    saved = list(trainer.saved_parameters())
    result = sum(size(p) * p.element_size() for p in saved)
    kept = trainer.args.save_total_limit or 1
    checkpoints = (kept + 1) * expected_bytes(saved) if trainer.args.save_strategy != "no" else 0
    present = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) if folder.exists() else 0
    if free_bytes(folder) + present < result + checkpoints:
        raise UserError(
            f"{gigabytes(free_bytes(folder))} free, but the model and its checkpoints need at least "
            f"{gigabytes(result + checkpoints)}",
            file=folder,
            remedy="free some space, or lower training.keep_checkpoints",
        )


def _small_parameters(trainer: MllmTrainer) -> dict[str, torch.nn.Parameter]:
    """Return what the dry save writes: the adapter with its projector, or the projector alone."""
    named = dict(trainer.model.named_parameters(remove_duplicate=False))  # with tiles, image_newline has two names
    if isinstance(trainer.model, PreTrainedModel):
        return {name: weights for name, weights in named.items() if PROJECTOR in name}
    return {name: weights for name, weights in named.items() if weights.requires_grad}


def dry_save(trainer: MllmTrainer, probe: Path) -> None:
    """Save the small parts as in a checkpoint, read them back, compare."""
    shutil.rmtree(probe, ignore_errors=True)
    probe.mkdir(parents=True)
    state: dict[str, Any] = {name: weights.detach().cpu() for name, weights in _small_parameters(trainer).items()}
    try:
        save_mllm(trainer.model, trainer.processor, probe, state)
        _same_weights(probe, state)
        processor = read_pretrained(type(trainer.processor), probe)
        check_image_token(processor.tokenizer, probe)
        _expect(processor.chat_template == trainer.processor.chat_template, "the chat template")
        text = f"An image: {processor.image_token} and words."
        tokens = [p.tokenizer(text)["input_ids"] for p in (processor, trainer.processor)]
        _expect(tokens[0] == tokens[1], "the tokenizer")
        images = [p.image_processor.to_dict() for p in (processor, trainer.processor)]
        _expect(images[0] == images[1], "the image processor")
        generation = GenerationConfig.from_pretrained(probe)
        _expect(generation.eos_token_id == trainer.bare.generation_config.eos_token_id, "the generation settings")
        if isinstance(trainer.model, PreTrainedModel):
            config = read_pretrained(AutoConfig, probe)
            configs = [whole.text_config.to_dict() for whole in (config, trainer.bare.config)]
            _expect(configs[0] == configs[1], "the LLM's configuration")
        else:
            read_config(probe)
    except OSError as error:
        if disk_is_full(error):
            raise
        raise UserError(f"cannot be written ({error})", file=probe.parent, remedy="use another output_dir") from error
    finally:
        shutil.rmtree(probe, ignore_errors=True)


def _same_weights(probe: Path, state: dict[str, torch.Tensor]) -> None:
    (file,) = probe.glob("*.safetensors")
    saved, wanted = ({*map(tensor_digest, weights.values())} for weights in (load_file(file), state))
    _expect(saved == wanted, "the weights")


def _expect(same: bool, what: str) -> None:
    if not same:
        raise UserError(
            f"dry save: {what} changes when saved and loaded, so checkpoints of this run would be wrong",
            remedy="use a tested version of transformers, or a tokenizer and processor of stock classes",
        )


def show_data(trainer: MllmTrainer) -> None:
    """Log statistics of a sample of the data, and its first rows with supervised tokens in green or between ⟦ and ⟧.

    Raises UserError on all ranks if too much of the sample is unusable.
    """
    from clips_mllm.checks.display import show_batch
    from clips_mllm.checks.sample_check import check_sample
    from clips_mllm.data.dataset import InstructionSubset

    dataset: Any = trainer.train_dataset
    found = check_sample(dataset.dataset if isinstance(dataset, InstructionSubset) else dataset)
    if trainer.is_world_process_zero():
        batch = trainer.data_collator([dataset[at] for at in range(min(2, len(dataset)))])
        rows = show_batch(batch, trainer.processor, color=sys.stderr.isatty(), max_rows=2)
        logger.info("%s\n%s", found.line(), rows)
