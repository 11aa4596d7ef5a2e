"""Time of a run from its floating-point operations. No torch."""

from __future__ import annotations

from clips_mllm.planning.memory import Setup


def run_seconds(setup: Setup, *, samples: float, mean_tokens: float, flops: float) -> float:
    """Seconds for a number of samples on all devices.

    Args:
        flops: operations that one device really does in a second.
    """
    return samples * sample_flops(setup, mean_tokens) / (flops * setup.devices)


def sample_flops(setup: Setup, tokens: float) -> float:
    """Operations for one sample.

    Two for each weight and token in the forward pass, two for the gradient of the activations, two for that of the
    weights where they train (Kaplan et al., arXiv 2001.08361, section 2.1); attention 4 x tokens x width for each token
    and block in the forward pass; a second forward pass with checkpointing. The vocabulary layer runs at supervised
    positions only, and a frozen tower has no backward pass.
    """
    llm, tower = setup.shape.llm, setup.shape.tower
    passes = 1 + 1 + (setup.train_llm and setup.adapter == "none") + setup.checkpointing
    blocks = passes * 2 * llm.matrices * tokens
    attention = (3 + setup.checkpointing) * 4 * tokens**2 * llm.query * llm.layers
    vocabulary = (passes - setup.checkpointing) * 2 * llm.vocabulary * llm.width * setup.supervised
    seen = setup.images * tower.patches
    vision = (3 if setup.train_tower else 1) * 2 * tower.parameters * seen
    projector = 3 * 2 * setup.shape.projector * seen
    return blocks + attention + vocabulary + vision + projector
