"""The wheel, the extras and the pinned versions."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import venv
from importlib import metadata
from pathlib import Path

import pytest
import yaml

from vision_tower.common.errors import extra_of

ROOT = Path(__file__).parents[2]
DATA = (
    "clips_mllm/planning/catalog.yaml",
    "clips_mllm/prompts/templates/vicuna_v1.jinja",
    "vision_tower/data/templates.txt",
    "clips_eval/reporting/data/report.css",
    "clips_eval/tasks/clips_pope_random.yaml",
)


def pinned() -> dict[str, str]:
    """Package to version, as in requirements.lock."""
    return dict(re.findall(r"^([\w.-]+)==([\w.]+)", (ROOT / "requirements.lock").read_text(), flags=re.MULTILINE))


@pytest.mark.slow
def test_wheel_installs_in_a_fresh_environment(tmp_path: Path) -> None:
    """The wheel alone: its dependencies come from this environment, since torch is gigabytes."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    source = tmp_path / "source"  # a build leaves files in its source folder
    source.mkdir()
    for name in ("vision_tower", "clips_mllm", "eval"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    wheels = str(tmp_path / "dist")
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", wheels, str(source)]
    subprocess.run(build, check=True, capture_output=True, env=environment)
    (wheel,) = (tmp_path / "dist").glob("clips_mllm-*.whl")
    venv.create(tmp_path / "fresh", with_pip=True)
    python = tmp_path / "fresh" / "bin" / "python"
    install = [python, "-m", "pip", "install", "--quiet", "--no-deps", wheel]
    subprocess.run(install, check=True, capture_output=True, env=environment)
    (site,) = (tmp_path / "fresh" / "lib").glob("python*/site-packages")
    assert all((site / name).is_file() for name in DATA)
    # A plain path line: the .pth files of that folder, one of which makes this checkout importable, are not read.
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    run = {"cwd": tmp_path, "check": True, "capture_output": True, "text": True, "env": environment}
    code = "import vision_tower, clips_mllm; from vision_tower import load_encoder; print(vision_tower.__file__)"
    assert str(site) in subprocess.run([python, "-c", code], **run).stdout
    helped = subprocess.run([tmp_path / "fresh" / "bin" / "clips-mllm", "train", "--help"], **run).stdout
    assert helped.startswith("usage: clips-mllm train")


BASE_ONLY = """
import sys
class Hiding:
    def __init__(self, finder):
        self.finder = finder
    def find_spec(self, name, path=None, target=None):
        return None if name.partition(".")[0] in {names} else self.finder.find_spec(name, path, target)
    def find_distributions(self, *args):
        return getattr(self.finder, "find_distributions", lambda *_: [])(*args)
sys.meta_path[:] = map(Hiding, sys.meta_path)
from PIL import Image
from vision_tower import load_encoder
image = Image.new("RGB", (96, 96), "red")
encoder = load_encoder(sys.argv[1], "cpu")
assert (encoder.embed_images([image]) @ encoder.embed_texts(["a cat"]).T).shape == (1, 1)
from clips_mllm.chat import main
from vision_tower.common.errors import run_command
image.save(sys.argv[3])
question = ["--image", sys.argv[3], "--question", "What?", "--max_new_tokens", "4", "--device", "cpu"]
assert run_command(main, [sys.argv[2], *question]) == 0
from clips_mllm.serve import main
sys.exit(run_command(main, [sys.argv[2], "--device", "cpu"]))
"""


@pytest.mark.integration
def test_base_install_loads_embeds_and_chats(encoder_dir: Path, chat_mllm: Path, tmp_path: Path) -> None:
    """Without the packages of the extras; a command that needs one names the extra."""
    names = {
        "deepspeed",
        "bitsandbytes",
        "datasets",
        "pyarrow",
        "lmms_eval",
        "matplotlib",
        "gradio",
        "fastapi",
        "uvicorn",
    }
    code = BASE_ONLY.format(names=names | {"easy_vqa", "gguf", "resvg"})
    command = [sys.executable, "-c", code, str(encoder_dir), str(chat_mllm), str(tmp_path / "red.png")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 2, done.stderr
    assert done.stderr.strip().splitlines()[-1].endswith("pip install 'clips-mllm[serve]'")


@pytest.mark.parametrize(
    ("module", "extra"), [("gradio.blocks", "web"), ("lmms_eval", "eval"), ("easy_vqa", "sample"), ("torch", None)]
)
def test_missing_modules_belong_to_an_extra(module: str, extra: str | None) -> None:
    assert extra_of(module) == extra


def test_pre_commit_runs_the_pinned_versions() -> None:
    versions = pinned()
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"][0]["hooks"]
    exact = [entry.split("==") for hook in hooks for entry in hook["additional_dependencies"] if "==" in entry]
    assert {name for name, _ in exact} == {"ruff", "mypy"}
    assert all(versions[name] == version for name, version in exact)


def test_lock_file_covers_every_extra() -> None:
    required = [line.partition(";")[0] for line in metadata.requires("clips-mllm") or []]
    names = {re.split(r"[\[<>=! ]", line)[0].lower() for line in required} - {"clips-mllm"}
    assert names and names <= {name.lower() for name in pinned()}


@pytest.mark.parametrize("file", sorted((ROOT / ".github").rglob("*.yml")), ids=lambda file: file.name)
def test_workflow_files_are_yaml(file: Path) -> None:
    assert yaml.safe_load(file.read_text())


def test_workflows_call_targets_that_exist() -> None:
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))
    called = set(re.findall(r"run: make ([\w-]+)", (ROOT / ".github/workflows/tests.yml").read_text()))
    assert called and called <= targets
