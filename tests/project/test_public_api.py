"""The Python API: lazy, typed exports of the packages, and their version."""

from __future__ import annotations

import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

import clips_mllm
import vision_tower

ROOT = Path(__file__).parents[2]
NAMES = {
    "vision_tower": ["load_encoder", "ClipsModel", "ClipsConfig", "ClipsTokenizer"],
    "clips_mllm": ["load_mllm", "build_mllm"],
}


def test_exports_are_the_objects_of_their_modules() -> None:
    from clips_mllm.model.build import build_mllm
    from clips_mllm.model.checkpoint import load_mllm
    from vision_tower.checkpoints.encoder import load_encoder
    from vision_tower.model.config import ClipsConfig
    from vision_tower.model.modeling import ClipsModel
    from vision_tower.text.tokenizer import ClipsTokenizer

    assert (clips_mllm.build_mllm, clips_mllm.load_mllm) == (build_mllm, load_mllm)
    assert vision_tower.load_encoder is load_encoder and vision_tower.ClipsTokenizer is ClipsTokenizer
    assert vision_tower.ClipsModel is ClipsModel and vision_tower.ClipsConfig is ClipsConfig


@pytest.mark.parametrize("package", [vision_tower, clips_mllm])
def test_all_and_dir_list_the_exports(package: object) -> None:
    name = package.__name__  # type: ignore[attr-defined]
    assert {*NAMES[name], "__version__"} == set(package.__all__)  # type: ignore[attr-defined]
    assert set(NAMES[name]) <= set(dir(package))
    with pytest.raises(AttributeError, match="no_such_name"):
        package.no_such_name  # type: ignore[attr-defined]  # noqa: B018


def test_version_is_that_of_pyproject() -> None:
    installed = version("clips-mllm")
    assert vision_tower.__version__ == clips_mllm.__version__ == installed
    assert f'\nversion = "{installed}"\n' in (ROOT / "pyproject.toml").read_text()


def test_import_does_not_import_torch() -> None:
    code = "import sys, vision_tower, clips_mllm; print(sorted({'torch', 'transformers', 'PIL'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout == "[]\n"


@pytest.mark.parametrize("folder", ["vision_tower", "clips_mllm", "eval/clips_eval"])
def test_packages_are_marked_as_typed(folder: str) -> None:
    assert (ROOT / folder / "py.typed").is_file()
    assert f'\n{Path(folder).name} = ["py.typed"' in (ROOT / "pyproject.toml").read_text()
