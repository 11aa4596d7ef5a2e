"""Tiny real models and a tiny sample world, built once per session by the project's commands. No network."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from clips_mllm.model.checkpoint import Mllm

# At import, since torch, DeepSpeed, the hub and `datasets` read these variables when they are imported. Idle OpenMP
# threads must not spin, because tests run in parallel; nothing downloads, and caches of the user stay unchanged.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
CACHE = tempfile.TemporaryDirectory(prefix="datasets-cache-")
os.environ["HF_DATASETS_CACHE"] = CACHE.name

# Files that train, serve, drive a browser, or start processes, longest first. They run first, so that none runs alone
# at the end, and get the marker `integration`, which `make test-fast` leaves out.
INTEGRATION = (
    "test_train_ranks",
    "test_train_resume",
    "test_web",
    "test_pretrain_engine",
    "test_resume",
    "test_evaluate",
    "test_eval_callback",
    "test_ablate",
    "test_chat",
    "test_serve",
    "test_projector",
    "test_adapters",
    "test_examples",
    "test_bad_input",
    "test_compare",
    "test_checkpoint",
    "test_sample",
    "test_convert",
    "test_cached_tower",
    "test_pretrain",
    "test_losses",
    "test_train",
    "test_report_comparison",
    "test_plan",
    "test_shards",
    "test_recipe",
    "test_modeling",
    "test_lmms",
    "test_report",
    "test_tiles",
    "test_data",
    "test_structure",
    "test_step",
    "test_accumulation",
    "test_logs",
)

SMALL_WORLD = {
    "llm": "tiny",
    "pretrain_scenes": 180,
    "pretrain_figures": 40,
    "pretrain_shapes": 40,
    "shard_size": 60,
    "align_scenes": 24,
    "align_shapes": 8,
    "finetune_scenes": 24,
    "finetune_shapes": 8,
    "finetune_pairs": 4,
    "finetune_patch_texts": 4,
    "finetune_patch_text_shapes": 4,
    "finetune_texts": 4,
    "retrieval_scenes": 20,
    "pope_scenes": 8,
    "mmbench_scenes": 8,
    "easy_vqa_questions": 20,
}


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


@pytest.hookimpl(tryfirst=True)  # before -m selects by markers
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Run long files first, the others in their order; skip tests marked `gpu` without a GPU."""
    for item in items:
        if item.get_closest_marker("gpu") is not None and not _has_gpu():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU"))
    order = {name: place for place, name in enumerate(INTEGRATION)}
    for item in items:
        if item.path.stem in order:
            item.add_marker(pytest.mark.integration)
    items.sort(key=lambda item: order.get(item.path.stem, len(order)))


@pytest.fixture(scope="session")
def sample_world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small output of `clips-mllm data sample`, with a random two-layer LLaMA."""
    from clips_mllm.sample.build import main

    folder = tmp_path_factory.mktemp("world") / "data"
    main(
        [
            "--output_dir",
            str(folder),
            *(word for name, value in SMALL_WORLD.items() for word in (f"--{name}", str(value))),
        ]
    )
    return folder


@pytest.fixture(scope="session")
def encoder_dir(sample_world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random two-layer CLIPS encoder, saved as `clips-mllm pretrain` saves it."""
    import torch

    from vision_tower.checkpoints.encoder import save_encoder
    from vision_tower.data.pairs import read_texts
    from vision_tower.model.modeling import ClipsModel
    from vision_tower.model.recipe import ModelRecipe, TowerRecipe
    from vision_tower.pretraining.recipe import PairsRecipe
    from vision_tower.pretraining.setup import model_config
    from vision_tower.text.tokenizer import ClipsTokenizer

    texts = read_texts(PairsRecipe(shards=str(sample_world / "pretrain" / "*.tar")), 200)
    tokenizer = ClipsTokenizer.train(texts, 400)
    tower = TowerRecipe(width=32, layers=2, mlp=64, heads=2)
    recipe = ModelRecipe(
        image=tower,
        text=tower,
        captioner=tower,
        embed_dim=32,
        image_size=96,
        patch_size=32,
        text_length=24,
        target_length=32,
        vocabulary_size=400,
    )
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("encoder")
    save_encoder(ClipsModel.from_scratch(model_config(recipe, tokenizer)), tokenizer, folder)
    return folder


@pytest.fixture(scope="session")
def mllm_dir(sample_world: Path, encoder_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untrained stock LLaVA checkpoint of the tiny tower and the tiny LLaMA, with the ChatML template."""
    import torch

    from clips_mllm.model.build import build_mllm
    from clips_mllm.model.checkpoint import save_mllm
    from clips_mllm.prompts.render import load_template

    torch.manual_seed(0)
    model, processor = build_mllm(
        str(encoder_dir / "tower"),
        str(sample_world / "llm"),
        feature_layer=-2,
        feature_select="full",
        dtype=torch.float32,
    )
    processor.chat_template = processor.tokenizer.chat_template = load_template("chatml")
    folder = tmp_path_factory.mktemp("mllm")
    save_mllm(model, processor, folder)
    return folder


def enlarge_weights(mllm: Mllm, seed: int, std: float) -> Mllm:
    """Enlarge the weights, so that the output depends visibly on the input."""
    import torch

    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in mllm.model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=std)
    return mllm


@pytest.fixture(scope="module")
def mllm(mllm_dir: Path) -> Mllm:
    """The tiny MLLM with weights large enough that a wrong mask or attention across samples changes the output."""
    from clips_mllm.model.checkpoint import load_mllm

    return enlarge_weights(load_mllm(mllm_dir, device="cpu", dtype="float32"), seed=1, std=0.15)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[Path], str]:
    """Return a function that puts a folder into the hub's local cache, as a download does, and returns its id."""
    cache = tmp_path / "hub"
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))

    def publish(folder: Path) -> str:
        repository, commit = cache / f"models--someone--{folder.name}", "0" * 40
        shutil.copytree(folder, repository / "snapshots" / commit)
        (repository / "refs").mkdir()
        (repository / "refs" / "main").write_text(commit)
        return f"someone/{folder.name}"

    return publish


@pytest.fixture(scope="session")
def chat_mllm(mllm_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny MLLM with weights so large that every prompt and image has a different answer."""
    from clips_mllm.model.checkpoint import load_mllm, save_mllm

    mllm = enlarge_weights(load_mllm(mllm_dir, device="cpu", dtype="float32"), seed=7, std=0.25)
    folder = tmp_path_factory.mktemp("chat_mllm")
    save_mllm(mllm.model, mllm.processor, folder)
    return folder


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Use one thread: the number of threads changes the order of sums, and so their rounding."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
