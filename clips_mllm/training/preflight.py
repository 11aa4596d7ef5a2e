"""Before step 1: what would fail at the end of the night fails now.

space      what the run will write fits on the disk
dry save   configuration, processor, template, generation settings and the trained small parts are written by the code
           that will write them, read back, and compared; whole LLMs are not written twice
data       a sample of it is rendered and decoded; the first rows are shown, with the tokens that are learnt marked
"""

from __future__ import annotations

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
from vision_tower.checkpoints.loading import read_pretrained
from vision_tower.common.errors import UserError, disk_is_full
from vision_tower.training.disk_space import expected_bytes, free_bytes, gigabytes
from vision_tower.training.ema import is_divided
from vision_tower.training.model_tools import size

if TYPE_CHECKING:
    from clips_mllm.data.recipe import InstructionRecipe
    from clips_mllm.training.trainer import MllmTrainer

PROBE = ".preflight"


def preflight(trainer: MllmTrainer, folder: Path) -> None:
    """Run all of it, on the main process; the others wait.

    Raises:
        UserError: too little space, or something that does not come back as it was saved.
    """
    if is_divided(trainer.model):
        from deepspeed.runtime.zero import GatheredParameters

        with GatheredParameters([p for p in _small(trainer).values() if hasattr(p, "ds_id")]):
            _checks(trainer, folder)
    else:
        _checks(trainer, folder)
    trainer.accelerator.wait_for_everyone()


def _checks(trainer: MllmTrainer, folder: Path) -> None:
    if trainer.is_world_process_zero():
        check_space(trainer, folder)
        dry_save(trainer, folder / PROBE)


def check_space(trainer: MllmTrainer, folder: Path) -> None:
    """The last checkpoint, those that stay, and the one being written beside them. A lower bound."""
    saved = list(trainer.saved_parameters())
    final = sum(size(p) * p.element_size() for p in saved)
    kept = trainer.args.save_total_limit or 1
    beside = (kept + 1) * expected_bytes(saved) if trainer.args.save_strategy != "no" else 0
    there = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) if folder.exists() else 0
    if free_bytes(folder) + there < final + beside:
        raise UserError(
            f"{gigabytes(free_bytes(folder))} free, the run will write at least "
            f"{gigabytes(final + beside)} (the model and its checkpoints)",
            file=folder,
            remedy="free some space, or lower training.keep_checkpoints",
        )


def _small(trainer: MllmTrainer) -> dict[str, torch.nn.Parameter]:
    """What the dry save writes: the adapter with its projector, or the projector alone."""
    named = dict(trainer.model.named_parameters(remove_duplicate=False))  # the row end of tiles goes by two names
    if isinstance(trainer.model, PreTrainedModel):
        return {name: weights for name, weights in named.items() if PROJECTOR in name}
    return {name: weights for name, weights in named.items() if weights.requires_grad}


def dry_save(trainer: MllmTrainer, probe: Path) -> None:
    """Write the small parts as a checkpoint would be, read them back, compare."""
    shutil.rmtree(probe, ignore_errors=True)
    probe.mkdir(parents=True)
    state: dict[str, Any] = {name: weights.detach().cpu() for name, weights in _small(trainer).items()}
    try:
        save_mllm(trainer.model, trainer.processor, probe, state)
        _same_weights(probe, state)
        processor = read_pretrained(type(trainer.processor), probe)
        check_image_token(processor.tokenizer, probe)
        _expect(processor.chat_template == trainer.processor.chat_template, "the chat template")
        words = f"An image: {processor.image_token} and words."
        tokens = [p.tokenizer(words)["input_ids"] for p in (processor, trainer.processor)]
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
        raise UserError(f"{probe.parent}: cannot be written to ({error})", remedy="take another output_dir") from error
    finally:
        shutil.rmtree(probe, ignore_errors=True)


def _same_weights(probe: Path, state: dict[str, torch.Tensor]) -> None:
    (file,) = probe.glob("*.safetensors")
    there, here = ({*map(tensor_digest, weights.values())} for weights in (load_file(file), state))
    _expect(there == here, "the weights")


def _expect(same: bool, what: str) -> None:
    if not same:
        raise UserError(
            f"dry save: {what} does not come back as saved, so no checkpoint of this run would",
            remedy="another version of transformers, or a tokenizer or processor of an unusual class, is "
            "the likely cause",
        )


def show_data(trainer: MllmTrainer, recipe: InstructionRecipe) -> None:
    """What a sample of the data is like, and the first rows with what is learnt in green, or between ⟦ and ⟧.

    Raises UserError on all ranks where too much of the sample cannot be used.
    """
    from clips_mllm.checks.display import show_batch
    from clips_mllm.checks.sample_check import check_sample
    from clips_mllm.data.held_out import Part

    dataset: Any = trainer.train_dataset
    found = check_sample(dataset.whole if isinstance(dataset, Part) else dataset)
    if trainer.is_world_process_zero():
        batch = trainer.data_collator([dataset[at] for at in range(min(2, len(dataset)))])
        shown = show_batch(batch, trainer.processor, color=sys.stderr.isatty(), max_rows=2)
        print(f"{found.line()}\n{shown}", file=sys.stderr, flush=True)
