"""Peak memory of a training step on one device, by component, from sizes alone. No torch.

Two moments can be the peak; the larger counts on a GPU:

    backward   weights + optimiser + gradients so far + activations + logits + communication buffers
    step       weights + optimiser + gradients + their fp32 copy

On a CPU both do: what the backward pass has freed is in pieces, and the step's copies, each as large as all that
trains, find no room among them in malloc's heap.

Sources: ZeRO's 2 + 2 + 12 bytes a parameter for bf16 training with AdamW (Rajbhandari et al., arXiv 1910.02054, section
3.1) and what its stages divide; activations by counting what autograd keeps in transformers' LLaMA block, as
Korthikanti et al. (arXiv 2205.05198, section 4.1) count for GPT; 4 bits with double quantisation at 0.127 bits of
constants a parameter (Dettmers et al., arXiv 2305.14314, section 3).
"""

from __future__ import annotations

import dataclasses
from typing import Literal

from clips_mllm.planning.shapes import Shape

Adapter = Literal["none", "lora", "dora", "qlora"]
Moment = Literal["backward", "step", "both"]

NF4 = 0.5 + 0.127 / 8  # bytes a parameter
# On a CPU interpreter, libraries, mapped checkpoint and the holes that any run makes in malloc's heap (fitted:
# docs/log.md); context and NCCL on a GPU.
PROCESS = {"cpu": 1.6e9, "gpu": 1.0e9}
SLACK = {"cpu": 0.0, "gpu": 0.05}  # share that the allocator holds beyond what is asked for
LIVE = 1e9  # parameters that ZeRO-3 keeps gathered (stage3_max_live_parameters)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Setup:
    """What is trained, how, and on what.

    Attributes:
        shape: sizes of tower and LLM.
        train_projector, train_llm, train_tower: what the stage trains.
        adapter, rank: how LLM and tower train; none is by their own weights.
        zero: DeepSpeed's stage, 0 for none.
        offload_optimizer, offload_weights: what ZeRO keeps in the host's memory.
        bucket: elements of ZeRO's communication buffer.
        mixed: bf16 with fp32 master weights; else fp32 throughout.
        checkpointing: activations are computed again in the backward pass.
        eager: attention is computed by plain products, and its scores are kept.
        compiled: torch.compile computes what is elementwise again in the backward pass.
        devices: ranks, each with one device.
        batch: samples in a forward pass of one device.
        tokens: of the longest row, to which the others are padded.
        supervised: tokens of a sample that are learnt from.
        images: of a sample.
        kind: of the device.
    """

    shape: Shape
    train_projector: bool = True
    train_llm: bool = False
    train_tower: bool = False
    adapter: Adapter = "none"
    rank: int = 0
    zero: int = 0
    offload_optimizer: bool = False
    offload_weights: bool = False
    bucket: float = 5e8
    mixed: bool = True
    checkpointing: bool = False
    eager: bool = False
    compiled: bool = False
    devices: int = 1
    batch: int = 1
    tokens: int = 2048
    supervised: int = 1024
    images: float = 1.0
    kind: Literal["gpu", "cpu"] = "gpu"

    @property
    def trainable(self) -> int:
        """Parameters that train."""
        llm = self.shape.llm.parameters if self.adapter == "none" else self.shape.llm.lora(self.rank)
        tower = self.shape.tower
        adapted = tower.layers * self.rank * (8 * tower.width + 2 * (tower.width + tower.mlp))
        return (
            self.shape.projector * self.train_projector
            + llm * self.train_llm
            + (tower.parameters if self.adapter == "none" else adapted) * self.train_tower
        )

    @property
    def width(self) -> int:
        """Bytes of a value in the forward pass."""
        return 2 if self.mixed else 4


@dataclasses.dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes on one device at the peak, and in the memory of its host for one rank."""

    process: float
    weights: float
    gradients: float
    optimiser: float
    activations: float
    logits: float
    buffers: float
    slack: float
    host: float
    moment: Moment

    @property
    def total(self) -> float:
        """On the device."""
        parts = (self.process, self.weights, self.gradients, self.optimiser, self.activations, self.logits)
        return sum(parts) + self.buffers + self.slack


def estimate(setup: Setup) -> Memory:
    """The peak of a training step."""
    if setup.kind == "cpu":  # what is offloaded lies in the same memory
        setup = dataclasses.replace(setup, offload_optimizer=False, offload_weights=False)
    weights, optimiser, gradients = weight_bytes(setup), optimiser_bytes(setup), gradient_bytes(setup)
    backward = activation_bytes(setup) + logit_bytes(setup) + buffer_bytes(setup)
    # At the step the gradients are flattened and copied to fp32, one group or sub-group after the other.
    step = step_bytes(setup)
    moment: Moment = "both" if setup.kind == "cpu" else "backward" if backward >= step else "step"
    parts = {
        "weights": weights * (not setup.offload_weights),
        "gradients": 0.0 if setup.offload_optimizer else gradients,
        "optimiser": optimiser * (not setup.offload_optimizer),
        "activations": activation_bytes(setup) * (moment != "step"),
        "logits": logit_bytes(setup) * (moment != "step"),
        "buffers": buffer_bytes(setup) * (moment != "step") + step * (moment != "backward"),
    }
    return Memory(
        **parts,
        process=PROCESS[setup.kind],
        slack=SLACK[setup.kind] * sum(parts.values()),
        host=optimiser * setup.offload_optimizer + weights * setup.offload_weights,
        moment=moment,
    )


def weight_bytes(setup: Setup) -> float:
    """Weights as the forward pass reads them; ZeRO-3 divides them, frozen ones too."""
    shape, width = setup.shape, setup.width
    master_here = setup.mixed and setup.zero == 0  # what trains is in fp32, and autocast makes a copy of it in bf16
    if master_here and setup.train_llm and setup.adapter == "none":
        width = 4
    llm: float = shape.llm.parameters * width
    if setup.adapter == "qlora":
        llm = shape.llm.matrices * NF4 + (shape.llm.parameters - shape.llm.matrices) * width
    whole = llm + (shape.tower.parameters + shape.projector) * width
    if setup.adapter != "none":
        whole += setup.trainable * width
    copies = (4 - width + 2) * setup.trainable if master_here else 0
    return whole / (setup.devices if setup.zero == 3 else 1) + copies


def optimiser_bytes(setup: Setup) -> float:
    """AdamW's two moments in fp32, and under DeepSpeed the fp32 master weights; ZeRO-1 and above divide them.

    Of weights in fp32 ZeRO keeps such masters too, a second copy.
    """
    each = 8 if setup.zero == 0 else 12
    return each * setup.trainable / (setup.devices if setup.zero >= 1 else 1)


def gradient_bytes(setup: Setup) -> float:
    """Averaged gradients until the step: in the weights' precision; ZeRO-2 and above divide them."""
    each = 4 if setup.zero == 0 or not setup.mixed else 2
    return each * setup.trainable / (setup.devices if setup.zero >= 2 else 1)


def step_bytes(setup: Setup) -> float:
    """Copies of the gradients that the optimiser's step makes, beside the averaged ones: flat, then in fp32."""
    if setup.zero == 0 or setup.offload_optimizer:
        return 0.0
    mine = setup.trainable / setup.devices
    if setup.zero == 3:
        mine = min(mine, 1e9)  # sub_group_size
    return (2 + 4) * mine if setup.mixed else 4 * mine


def buffer_bytes(setup: Setup) -> float:
    """ZeRO's buckets (two of them where communication overlaps), and the parameters that ZeRO-3 keeps gathered."""
    if setup.zero == 0:
        return 0.0
    bucket = min(setup.bucket, setup.trainable)
    buffers = 2 * bucket * setup.width
    if setup.zero == 3 and (setup.devices > 1 or setup.offload_weights):
        buffers += min(LIVE, setup.shape.parameters) * setup.width
    return buffers


def activation_bytes(setup: Setup) -> float:
    """What autograd keeps of the LLM's blocks, and of the tower's where it trains.

    With checkpointing: the input of every block, and all of one block that is computed again.
    """
    llm, positions = setup.shape.llm, setup.batch * setup.tokens
    block = block_bytes(setup)
    blocks = llm.layers * llm.width * setup.width + block if setup.checkpointing else llm.layers * block
    tower, patches = setup.shape.tower, setup.batch * setup.images * (setup.shape.tower.patches + 1)
    seen = patches * tower_block_bytes(setup) * (tower.layers if setup.train_tower else 1)
    embedded = positions * llm.width * setup.width * 3  # word embeddings, with images in them, and the final norm
    projected = patches * (tower.width + 3 * llm.width) * setup.width * setup.train_projector
    return positions * blocks + seen + embedded + projected


def block_bytes(setup: Setup) -> float:
    """Bytes a position that one LLaMA block keeps.

    Two RMSNorms keep their input in fp32 (4h each); attention keeps q, k, v and its output; the MLP keeps gate,
    silu(gate) and up. Eager attention keeps, of every head and pair of positions, the softmax in fp32 and rounded, and
    k and v as often as there are heads of q. Weights that train keep the inputs of their layers too: normalised values
    and the norms' outputs (4h each norm), the attention's output as a matrix (q) and the gated product (m). Adapters
    keep the same inputs, once more where they drop some out.

    A compiled block keeps the norms' inputs as they are, q, k, v, attention's output, gate and up; with weights that
    train also the norms' outputs and the gated product. Compiled adapters and compiled eager
    attention are counted as if they were not, which is too much.
    """
    llm, width = setup.shape.llm, setup.width
    if setup.compiled and setup.adapter == "none" and not setup.eager:
        kept = 2.0 * llm.width + 2 * llm.query + 2 * llm.key + 2 * llm.mlp
        return width * (kept + (2 * llm.width + llm.mlp if setup.train_llm else 0))
    kept = 8.0 * llm.width + width * (2 * llm.query + 2 * llm.key + 3 * llm.mlp)
    if setup.eager:
        scores = llm.heads * setup.tokens * (4 + 2 * setup.mixed)
        kept += scores + width * (2 * llm.query - 2 * llm.key)
    if not setup.train_llm:
        return kept
    inputs = width * (2 * llm.width + llm.query + llm.mlp)
    if setup.adapter == "none":
        return kept + inputs + width * 2 * llm.width
    # Dropout before each of the seven adapters keeps what it lets through, and its mask.
    dropped = (width + 1) * (3 * llm.width + llm.query + 2 * llm.width + llm.mlp)
    return kept + inputs + dropped + 7 * setup.rank * width


def tower_block_bytes(setup: Setup) -> float:
    """Bytes a position that one ViT block keeps: norms' inputs and outputs, q, k, v, attention, MLP in the middle."""
    tower = setup.shape.tower
    return setup.width * (9 * tower.width + 2 * tower.mlp)


def logit_bytes(setup: Setup) -> float:
    """Logits at supervised positions: in bf16, as fp32, their log-softmax, and its gradient in the backward pass."""
    positions = setup.batch * setup.supervised
    return positions * setup.shape.llm.vocabulary * (12 + (2 if setup.mixed else 0))
