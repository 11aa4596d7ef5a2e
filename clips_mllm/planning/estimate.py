"""Peak memory of a training step on one device, and the time of a run, from sizes alone. No torch.

Memory is summed by component. The peak is the larger of two moments on a GPU:

    backward   weights + optimizer + gradients so far + activations + logits + communication buffers
    step       weights + optimizer + gradients + their fp32 copy

On a CPU it is the sum of both: memory that the backward pass frees is fragmented, and the copies that the optimizer
step makes, each as large as all trainable parameters, do not fit into the fragments.

Sources: 2 + 2 + 12 bytes per parameter for bf16 training with AdamW, and what each ZeRO stage shards (Rajbhandari et
al., arXiv 1910.02054, section 3.1); activations by counting what autograd keeps of transformers' LLaMA block, as
Korthikanti et al. (arXiv 2205.05198, section 4.1) do for GPT; 4 bits with double quantization at 0.127 bits of
constants per parameter (Dettmers et al., arXiv 2305.14314, section 3).
"""

from __future__ import annotations

import dataclasses
from typing import Literal

from clips_mllm.planning.catalog import GB
from clips_mllm.planning.setup import Setup

Moment = Literal["backward", "step", "both"]

NF4_BYTES = 0.5 + 0.127 / 8  # per parameter
# Defaults of DeepSpeed's ZeRO-3: parameters that stay gathered (stage3_max_live_parameters), and parameters that the
# optimizer steps at once (sub_group_size).
MAX_LIVE = 1e9
SUB_GROUP = 1e9


@dataclasses.dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes on one device at the peak; `host` is in the host's memory, for one rank."""

    process: float
    weights: float
    gradients: float
    optimizer: float
    activations: float
    logits: float
    buffers: float
    slack: float
    host: float
    moment: Moment

    @property
    def total(self) -> float:
        """Bytes on the device."""
        parts = (self.process, self.weights, self.gradients, self.optimizer, self.activations, self.logits)
        return sum(parts) + self.buffers + self.slack


def peak_memory(setup: Setup) -> Memory:
    """Estimate the peak of a training step."""
    on_cpu = setup.device.kind == "cpu"
    if on_cpu:  # offloading moves nothing, since the host is the device
        setup = dataclasses.replace(setup, offload_optimizer=False, offload_weights=False)
    weights, optimizer, step = weight_bytes(setup), optimizer_bytes(setup), step_bytes(setup)
    activations, logits, buffers = activation_bytes(setup), logit_bytes(setup), buffer_bytes(setup)
    moment: Moment = "both" if on_cpu else "backward" if activations + logits + buffers >= step else "step"
    parts = {
        "weights": weights * (not setup.offload_weights),
        "gradients": 0.0 if setup.offload_optimizer else gradient_bytes(setup),
        "optimizer": optimizer * (not setup.offload_optimizer),
        "activations": activations * (moment != "step"),
        "logits": logits * (moment != "step"),
        "buffers": buffers * (moment != "step") + step * (moment != "backward"),
    }
    return Memory(
        **parts,
        process=setup.device.process_gb * GB,
        slack=setup.device.slack * sum(parts.values()),
        host=optimizer * setup.offload_optimizer + weights * setup.offload_weights,
        moment=moment,
    )


def weight_bytes(setup: Setup) -> float:
    """Weights as the forward pass reads them. ZeRO-3 shards them, including frozen ones."""
    shape, width = setup.shape, setup.value_bytes
    fp32_masters = setup.mixed and setup.zero == 0  # trainable weights are fp32, and autocast copies them to bf16
    if fp32_masters and setup.train_llm and setup.adapter == "none":
        width = 4
    llm: float = shape.llm.parameters * width
    if setup.adapter == "qlora":
        linear = shape.llm.linear_parameters
        llm = linear * NF4_BYTES + (shape.llm.parameters - linear) * width
    total = llm + (shape.tower.parameters + shape.projector_parameters) * width
    if setup.adapter != "none":
        total += setup.trainable * width
    copies = (4 - width + 2) * setup.trainable if fp32_masters else 0
    return total / (setup.devices if setup.zero == 3 else 1) + copies


def optimizer_bytes(setup: Setup) -> float:
    """AdamW's two fp32 moments, and DeepSpeed's fp32 master weights; ZeRO-1 and above shard them.

    ZeRO keeps master weights in fp32 training too, as a second copy.
    """
    bytes_each = 8 if setup.zero == 0 else 12
    return bytes_each * setup.trainable / (setup.devices if setup.zero >= 1 else 1)


def gradient_bytes(setup: Setup) -> float:
    """Averaged gradients before the optimizer step, in the precision of the weights; ZeRO-2 and above shard them."""
    bytes_each = 4 if setup.zero == 0 or not setup.mixed else 2
    return bytes_each * setup.trainable / (setup.devices if setup.zero >= 2 else 1)


def step_bytes(setup: Setup) -> float:
    """Copies of the gradients in the optimizer step: flattened, then cast to fp32, one group after the other."""
    if setup.zero == 0 or setup.offload_optimizer:
        return 0.0
    shard = setup.trainable / setup.devices
    if setup.zero == 3:
        shard = min(shard, SUB_GROUP)
    return (2 + 4) * shard if setup.mixed else 4 * shard


def buffer_bytes(setup: Setup) -> float:
    """ZeRO's buckets (two, since communication overlaps), and the parameters that ZeRO-3 keeps gathered."""
    if setup.zero == 0:
        return 0.0
    bucket = min(setup.bucket, setup.trainable)
    buffers = 2 * bucket * setup.value_bytes
    if setup.zero == 3 and (setup.devices > 1 or setup.offload_weights):
        buffers += min(MAX_LIVE, setup.shape.parameters) * setup.value_bytes
    return buffers


def activation_bytes(setup: Setup) -> float:
    """Activations that autograd keeps of the LLM's blocks, and of the tower's blocks if the tower trains.

    With checkpointing these are the input of every block, and everything of the one block that is recomputed.
    """
    llm, tower, width = setup.shape.llm, setup.shape.tower, setup.value_bytes
    positions = setup.batch * setup.tokens
    block = block_bytes(setup)
    blocks = llm.layers * llm.width * width + block if setup.checkpointing else llm.layers * block
    patches = setup.batch * setup.images * (tower.patches + 1)
    tower_blocks = patches * tower_block_bytes(setup) * (tower.layers if setup.train_tower else 1)
    embedded = positions * llm.width * width * 3  # word embeddings, the same with image features, and the final norm
    projected = patches * (tower.width + 3 * llm.width) * width * setup.train_projector
    return positions * blocks + tower_blocks + embedded + projected


def block_bytes(setup: Setup) -> float:
    """Activation bytes of one LLaMA block per position.

    Two RMSNorms keep their input in fp32. Attention keeps q, k, v and its output. The MLP keeps gate, silu(gate) and
    up. Eager attention also keeps the softmax of every head and pair of positions, in fp32 and rounded, and repeats k
    and v for every head of q. Trainable weights also keep the inputs of their layers: normalized values, the norms'
    outputs, the attention output as a matrix, and the gated product. Adapters keep the same inputs, and copies after
    dropout.

    A compiled block keeps the inputs of the norms in their own precision, q, k, v, the attention output, gate and up;
    with trainable weights also the norms' outputs and the gated product. Compiled adapters and compiled eager attention
    are counted as if they were not compiled, which is an upper bound.
    """
    llm, width = setup.shape.llm, setup.value_bytes
    qkv_and_output = 2 * llm.q_width + 2 * llm.kv_width
    if setup.compiled and setup.adapter == "none" and not setup.eager:
        kept = 2.0 * llm.width + qkv_and_output + 2 * llm.mlp
        return width * (kept + (2 * llm.width + llm.mlp if setup.train_llm else 0))
    kept = 8.0 * llm.width + width * (qkv_and_output + 3 * llm.mlp)  # 8: two norms, 4 bytes each
    if setup.eager:
        scores = llm.heads * setup.tokens * (4 + 2 * setup.mixed)
        kept += scores + width * (2 * llm.q_width - 2 * llm.kv_width)
    if not setup.train_llm:
        return kept
    inputs = width * (2 * llm.width + llm.q_width + llm.mlp)
    if setup.adapter == "none":
        return kept + inputs + width * 2 * llm.width
    # Dropout before each of the seven adapters keeps its output and its mask (1 byte).
    dropped = (width + 1) * (3 * llm.width + llm.q_width + 2 * llm.width + llm.mlp)
    return kept + inputs + dropped + 7 * setup.rank * width


def tower_block_bytes(setup: Setup) -> float:
    """Activation bytes of one ViT block per position: inputs and outputs of norms, q, k, v, attention, hidden MLP."""
    tower = setup.shape.tower
    return setup.value_bytes * (9 * tower.width + 2 * tower.mlp)


def logit_bytes(setup: Setup) -> float:
    """Logits at supervised positions: in bf16, in fp32, their log-softmax, and its gradient."""
    positions = setup.batch * setup.supervised
    return positions * setup.shape.llm.vocab_size * (12 + (2 if setup.mixed else 0))


def run_seconds(setup: Setup, *, samples: float, mean_tokens: float) -> float:
    """Seconds to train on a number of samples with all devices."""
    return samples * sample_flops(setup, mean_tokens) / (setup.device.flops * setup.devices)


def sample_flops(setup: Setup, tokens: float) -> float:
    """Floating-point operations for one sample.

    Per weight and token: two in the forward pass, two for the gradient of the activations, two for the gradient of the
    weights if they train (Kaplan et al., arXiv 2001.08361, section 2.1). Attention adds 4 x tokens x width per token
    and block in the forward pass. Checkpointing adds a second forward pass. The output layer runs at supervised
    positions only, and a frozen tower has no backward pass.
    """
    llm, tower = setup.shape.llm, setup.shape.tower
    passes = 1 + 1 + (setup.train_llm and setup.adapter == "none") + setup.checkpointing
    blocks = passes * 2 * llm.linear_parameters * tokens
    attention = (3 + setup.checkpointing) * 4 * tokens**2 * llm.q_width * llm.layers
    output_layer = (passes - setup.checkpointing) * 2 * llm.vocab_size * llm.width * setup.supervised
    patches = setup.images * tower.patches
    vision = (3 if setup.train_tower else 1) * 2 * tower.parameters * patches
    projector = 3 * 2 * setup.shape.projector_parameters * patches
    return blocks + attention + output_layer + vision + projector
