"""The projector's start: standardised inputs, outputs as long as word embeddings."""

from __future__ import annotations

from pathlib import Path

import torch

from clips_mllm.model.checkpoint import load_parts
from clips_mllm.training.projector import fit_projector, read_features


def test_it_starts_from_standardised_features_and_word_length(mllm_dir: Path) -> None:
    model, _ = load_parts(mllm_dir, dtype=torch.float32)
    torch.manual_seed(0)
    pixels = torch.randn(12, 3, 96, 96) * 3 + 2
    fit_projector(model, pixels)
    features = read_features(model, pixels)
    projector = model.model.multi_modal_projector
    hidden = projector.linear_1(features)
    assert hidden.mean(dim=0).abs().max() < 1e-4
    assert 0.5 < hidden.std() < 2
    words = model.get_input_embeddings().weight.norm(dim=1).mean()
    torch.testing.assert_close(projector(features).norm(dim=1).mean(), words)


def test_features_are_what_the_model_hands_to_its_projector(mllm_dir: Path) -> None:
    model, _ = load_parts(mllm_dir, dtype=torch.float32)
    pixels = torch.randn(2, 3, 96, 96)
    states = model.model.vision_tower(pixels, output_hidden_states=True).hidden_states
    torch.testing.assert_close(read_features(model, pixels), states[-2].flatten(0, 1))
