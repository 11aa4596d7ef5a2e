"""Sizes of towers and LLMs from config.json alone, or from a short list of those that the recipes name. No torch."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from vision_tower.common.errors import UserError
from vision_tower.common.files import read_object

UNKNOWN_TILES = (
    "how many tiles an image has depends on its shape, and no image is opened here; `clips-mllm train` tells its "
    "memory before step 1"
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LlmShape:
    """A LLaMA-family LLM.

    Attributes:
        width, layers, mlp, heads, kv_heads, head: of its blocks; `mlp` is the width inside the gated MLP.
        vocabulary: rows of the embedding.
        tied: whether the vocabulary layer is the embedding.
        qkv_bias: biases on the three projections (Qwen2).
    """

    width: int
    layers: int
    mlp: int
    heads: int
    kv_heads: int
    vocabulary: int
    tied: bool = False
    qkv_bias: bool = False
    head: int = 0

    @property
    def query(self) -> int:
        """Columns of the query projection."""
        return self.heads * (self.head or self.width // self.heads)

    @property
    def key(self) -> int:
        """Columns of the key projection, and of the value projection."""
        return self.kv_heads * (self.head or self.width // self.heads)

    @property
    def matrices(self) -> int:
        """Parameters in the linear layers of the blocks: what LoRA adapts and 4 bits shrink."""
        attention = 2 * self.width * self.query + 2 * self.width * self.key
        return self.layers * (attention + 3 * self.width * self.mlp)

    @property
    def embedding(self) -> int:
        """Parameters of embedding and vocabulary layer."""
        return self.vocabulary * self.width * (1 if self.tied else 2)

    @property
    def parameters(self) -> int:
        """All."""
        bias = self.layers * (self.query + 2 * self.key) if self.qkv_bias else 0
        return self.matrices + self.embedding + bias + (2 * self.layers + 1) * self.width

    def lora(self, rank: int) -> int:
        """Parameters of adapters of this rank on every linear layer of the blocks."""
        attention = 2 * (self.width + self.query) + 2 * (self.width + self.key)
        return self.layers * rank * (attention + 3 * (self.width + self.mlp))


@dataclasses.dataclass(frozen=True, kw_only=True)
class TowerShape:
    """A vision transformer over square images.

    Attributes:
        width, layers, mlp, heads: of its blocks.
        image, patch: sides in pixels.
        class_token: whether one position is no patch.
    """

    width: int
    layers: int
    mlp: int
    heads: int
    image: int
    patch: int
    class_token: bool = False

    @property
    def patches(self) -> int:
        """Image tokens that the LLM sees."""
        return (self.image // self.patch) ** 2

    @property
    def parameters(self) -> int:
        """All, but for a bias here and there."""
        block = 4 * self.width**2 + 2 * self.width * self.mlp + 9 * self.width + self.mlp
        return self.layers * block + self.width * (3 * self.patch**2 + self.patches + 3)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shape:
    """Both halves of an MLLM; the projector follows from them."""

    tower: TowerShape
    llm: LlmShape

    @property
    def projector(self) -> int:
        """Parameters of mlp2x_gelu."""
        return (self.tower.width + 1) * self.llm.width + (self.llm.width + 1) * self.llm.width

    @property
    def parameters(self) -> int:
        """All."""
        return self.tower.parameters + self.projector + self.llm.parameters


VICUNA_7B = LlmShape(width=4096, layers=32, mlp=11008, heads=32, kv_heads=32, vocabulary=32000)
VICUNA_13B = LlmShape(width=5120, layers=40, mlp=13824, heads=40, kv_heads=40, vocabulary=32000)
LLAMA_3_8B = LlmShape(width=4096, layers=32, mlp=14336, heads=32, kv_heads=8, vocabulary=128256)
SMOLLM2 = LlmShape(width=576, layers=30, mlp=1536, heads=9, kv_heads=3, vocabulary=49152, tied=True)
TINY_LLM = LlmShape(width=64, layers=2, mlp=192, heads=4, kv_heads=2, vocabulary=1024, tied=True)
CLIP_L336 = TowerShape(width=1024, layers=24, mlp=4096, heads=16, image=336, patch=14, class_token=True)
CLIPS_L84 = TowerShape(width=1024, layers=24, mlp=4096, heads=16, image=84, patch=14)
QUICKSTART = TowerShape(width=128, layers=4, mlp=512, heads=2, image=96, patch=16)
SMOKE = TowerShape(width=64, layers=2, mlp=128, heads=2, image=96, patch=16)

# For folders that are not there yet and hubs that do not answer: the models that the recipes in configs/ name.
LLMS = {
    "lmsys/vicuna-7b-v1.5": VICUNA_7B,
    "lmsys/vicuna-13b-v1.5": VICUNA_13B,
    "meta-llama/Meta-Llama-3-8B-Instruct": LLAMA_3_8B,
    "runs/quickstart/data/llm": SMOLLM2,
    "runs/smoke/data/llm": TINY_LLM,
}
TOWERS = {
    "openai/clip-vit-large-patch14-336": CLIP_L336,
    "runs/l14_84/tower": CLIPS_L84,
    "runs/quickstart/encoder/tower": QUICKSTART,
    "runs/smoke/encoder/tower": SMOKE,
}
CHECKPOINTS = {
    "runs/vicuna_7b_align": Shape(tower=CLIPS_L84, llm=VICUNA_7B),
    "runs/llama3_8b_align": Shape(tower=CLIPS_L84, llm=LLAMA_3_8B),
    "runs/quickstart/align": Shape(tower=QUICKSTART, llm=SMOLLM2),
    "runs/smoke/align": Shape(tower=SMOKE, llm=TINY_LLM),
}


def read_shape(*, tower: str | None, llm: str | None, checkpoint: str | None) -> Shape:
    """Sizes of what a recipe's `model` names.

    Raises:
        UserError: a folder without config.json that is in no list either, a config of another kind, or tiles.
    """
    if checkpoint is not None:
        checkpoint = _base(checkpoint)
        values = _config(checkpoint)
        if values is None:
            return _listed(CHECKPOINTS, checkpoint, "model.checkpoint")
        if values.get("model_type") == "llava_next":
            raise UserError(f"{UNKNOWN_TILES}", file=checkpoint)
        return Shape(
            tower=tower_shape(_section(values, "vision_config", checkpoint), checkpoint),
            llm=llm_shape(_section(values, "text_config", checkpoint), checkpoint),
        )
    assert tower is not None and llm is not None, "MllmRecipe.check has run"
    vision, text = _config(tower), _config(llm)
    return Shape(
        tower=_listed(TOWERS, tower, "model.tower") if vision is None else tower_shape(vision, tower),
        llm=_listed(LLMS, llm, "model.llm") if text is None else llm_shape(text, llm),
    )


def llm_shape(values: dict[str, Any], place: str) -> LlmShape:
    """An LLM's config in these words. Raises UserError where a field is missing."""
    try:
        heads = values["num_attention_heads"]
        return LlmShape(
            width=values["hidden_size"],
            layers=values["num_hidden_layers"],
            mlp=values["intermediate_size"],
            heads=heads,
            kv_heads=values.get("num_key_value_heads") or heads,
            vocabulary=values["vocab_size"],
            tied=values.get("tie_word_embeddings", False),
            qkv_bias=values.get("model_type") == "qwen2" or values.get("attention_bias", False),
            head=values.get("head_dim") or 0,
        )
    except KeyError as error:
        raise UserError(f"its config has no {error.args[0]}", file=place, remedy="not a LLaMA-family LLM") from error


def tower_shape(values: dict[str, Any], place: str) -> TowerShape:
    """A tower's config in these words; of a whole CLIP or SigLIP its vision half. Raises UserError."""
    values = values.get("vision_config", values)
    try:
        return TowerShape(
            width=values["hidden_size"],
            layers=values["num_hidden_layers"],
            mlp=values["intermediate_size"],
            heads=values["num_attention_heads"],
            image=values["image_size"],
            patch=values["patch_size"],
            class_token=values.get("model_type") != "siglip_vision_model",
        )
    except KeyError as error:
        raise UserError(f"its config has no {error.args[0]}", file=place, remedy="not a vision tower") from error


def _base(checkpoint: str) -> str:
    """The base of an adapter, into which `train` merges it; any other checkpoint itself."""
    file = Path(checkpoint) / "adapter_config.json"
    return str(read_object(file).get("base_model_name_or_path")) if file.is_file() else checkpoint


def _config(name: str) -> dict[str, Any] | None:
    """config.json of a folder or of the hub's cache; None where there is none."""
    file = Path(name) / "config.json"
    if file.is_file():
        return read_object(file)
    if Path(name).exists() or name.count("/") != 1 or name in LLMS.keys() | TOWERS.keys() | CHECKPOINTS.keys():
        return None
    return _from_hub(name)


def _from_hub(name: str) -> dict[str, Any] | None:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return read_object(Path(hf_hub_download(name, "config.json")))
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError):
        return None


def _section(values: dict[str, Any], name: str, place: str) -> dict[str, Any]:
    if not isinstance(values.get(name), dict):
        raise UserError(f"its config.json has no {name}", file=place, remedy="give a LLaVA checkpoint")
    return dict(values[name])


def _listed(known: dict[str, Any], name: str, key: str) -> Any:
    if name not in known:
        raise UserError(
            f"no config.json there ({key}), and none on the hub",
            file=name,
            remedy=f"give a folder that has one, or one of {', '.join(known)}",
        )
    return known[name]
