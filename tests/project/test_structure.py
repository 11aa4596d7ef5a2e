"""What holds the repository together: one direction of imports, quick help, no private hosts."""

from __future__ import annotations

import ast
import os
import re
import resource
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from clips_mllm.cli import COMMANDS

ROOT = Path(__file__).parents[2]
PACKAGES = {"vision_tower": ROOT / "vision_tower", "clips_mllm": ROOT / "clips_mllm"}
PACKAGES["clips_eval"] = ROOT / "eval" / "clips_eval"
# Allowed imports: a folder may import itself and the folders listed for it. A bare package name means the modules
# at the root of the package, which are commands. vt: vision_tower, mllm: clips_mllm, eval: clips_eval.
ARROWS = {
    "vt/common": "",
    "vt/text": "vt/common",
    "vt/training": "vt/common",
    "vt/data": "vt/common vt/text",
    "vt/model": "vt/common vt/text",
    "vt/checkpoints": "vt/common vt/text vt/data vt/model",
    "vt/evaluation": "vt/common vt/text vt/data vt/model vt/checkpoints",
    "vt/pretraining": "vt/common vt/text vt/training vt/data vt/model vt/checkpoints vt/evaluation",
    "vt": "vt/common vt/text vt/training vt/data vt/model vt/checkpoints vt/pretraining",
    "mllm/prompts": "vt/common",
    "mllm/model": "mllm/prompts vt/common vt/data vt/model vt/checkpoints",
    "mllm/data": "mllm/prompts mllm/model vt/common vt/data",
    "mllm/formats": "mllm/prompts mllm/model vt/common vt/checkpoints",
    "mllm/checks": "mllm/prompts mllm/model mllm/data vt/common vt/data vt/checkpoints",
    "mllm/training": "mllm/prompts mllm/model mllm/data mllm/checks vt/common vt/training vt/model vt/checkpoints",
    "mllm/planning": "mllm/prompts mllm/model mllm/data mllm/training vt/common vt/data",
    "mllm/provenance": "mllm/model mllm/formats mllm/training vt/common vt/training",
    "mllm/sample": "vt/common vt/checkpoints",
    "mllm/talk": "mllm/prompts mllm/model mllm/data mllm/provenance vt/common vt/data",
    "mllm/talk/web": "mllm/talk mllm/prompts vt/common vt/data vt/checkpoints",
    "mllm/talk/serve": "mllm/talk mllm/prompts vt/common",
    "mllm": "mllm/prompts mllm/model mllm/data mllm/formats mllm/checks mllm/training mllm/planning mllm/provenance "
    "mllm/talk mllm/talk/web mllm/talk/serve vt vt/common vt/training vt/data vt/checkpoints",
    "eval/tasks": "",
    "eval/stats": "vt/common vt/checkpoints",
    "eval/lmms": "eval/tasks eval/stats mllm/prompts mllm/model vt/common vt/training vt/checkpoints",
    "eval/retrieval": "eval/stats vt/common vt/data vt/evaluation",
    "eval/reporting": "eval/stats eval/retrieval vt/common",
    "eval/experiments": "eval/stats eval/retrieval eval/reporting vt/common vt/text",
    "eval": "eval/stats eval/lmms eval/retrieval eval/reporting eval/experiments mllm/model vt/common vt/data "
    "vt/checkpoints vt/evaluation vt/pretraining",
}
SHORT = {"vision_tower": "vt", "clips_mllm": "mllm", "clips_eval": "eval"}
MAX_MODULES = 18


def modules() -> dict[str, Path]:
    """Dotted name to file, `__init__` files as their folder's name."""
    found = {}
    for package, root in PACKAGES.items():
        for file in sorted(root.rglob("*.py")):
            parts = file.relative_to(root).with_suffix("").parts
            found[".".join([package, *(part for part in parts if part != "__init__")])] = file
    assert len(found) > 200
    return found


def folder(module: str, file: Path) -> str:
    """The folder of a module as the table writes it."""
    parts = module.split(".")
    return "/".join([SHORT[parts[0]], *(parts[1:] if file.name == "__init__.py" else parts[1:-1])])


def imports(file: Path, known: dict[str, Path]) -> set[str]:
    """Modules of this project that a file imports anywhere, also inside functions and under TYPE_CHECKING."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import"
            inner = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= inner & known.keys() or {node.module or ""}
    return found & known.keys()


def test_imports_between_folders_are_those_of_the_table() -> None:
    known = modules()
    wrong = []
    for module, file in known.items():
        source = folder(module, file)
        allowed = {source, *ARROWS[source].split()}
        for target in imports(file, known):
            if folder(target, known[target]) not in allowed:
                wrong.append(f"{module} imports {target}: {source} -> {folder(target, known[target])}")
    assert not wrong, "\n".join(wrong)


def test_the_table_has_no_circle_and_no_unused_folder() -> None:
    known = modules()
    used = {folder(module, file) for module, file in known.items()}
    assert used == set(ARROWS)
    floors: set[str] = set()
    while len(floors) < len(ARROWS):
        ready = {name for name, targets in ARROWS.items() if set(targets.split()) <= floors} - floors
        assert ready, f"circle among {set(ARROWS) - floors}"
        floors |= ready


def test_no_circle_of_modules() -> None:
    known = modules()
    left = {module: imports(file, known) - {module} for module, file in known.items()}
    while ready := {module for module, targets in left.items() if not targets & left.keys()}:
        left = {module: targets for module, targets in left.items() if module not in ready}
    assert not left, f"circle among {sorted(left)}"


def test_no_folder_has_more_modules_than_a_reader_can_survey() -> None:
    counts = Counter(file.parent for file in modules().values() if file.name != "__init__.py")
    assert max(counts.values()) <= MAX_MODULES, counts.most_common(1)


def test_no_test_imports_another_test() -> None:
    for file in sorted((ROOT / "tests").rglob("*.py")):
        names = re.findall(r"^\s*(?:from|import) ([\w.]+)", file.read_text(), flags=re.MULTILINE)
        assert not [name for name in names if name.rpartition(".")[2].startswith("test_")], file


def environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "eval")]), "COLUMNS": "200"}


@pytest.mark.parametrize("name", COMMANDS)
def test_help_takes_less_than_a_second_and_explains_every_option(name: str) -> None:
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    words = [sys.executable, "-m", "clips_mllm.cli", *name.split(), "--help"]
    done = subprocess.run(words, capture_output=True, text=True, env=environment(), cwd=ROOT, check=True)
    after, text = resource.getrusage(resource.RUSAGE_CHILDREN), done.stdout
    # Processor time: a busy machine may take longer, and an import of torch alone costs more than this.
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 1.0
    assert text.startswith(f"usage: clips-mllm {name}") and not done.stderr
    # `--print_config` and the sections' own `--section CONFIG` are jsonargparse's.
    bare = re.findall(r"^  (?:--)?([\w.]+)(?: [\w{},.]+)?\s+\((?:required|type)", text, flags=re.MULTILINE)
    assert not bare, f"options without a description in the recipe's docstring: {bare}"


def test_overview_lists_every_command() -> None:
    words = [sys.executable, "-m", "clips_mllm.cli", "--help"]
    done = subprocess.run(words, capture_output=True, text=True, env=environment(), cwd=ROOT, check=True)
    assert all(f"  {name} " in done.stdout for name in COMMANDS)
    unknown = [sys.executable, "-m", "clips_mllm.cli", "pretrian"]
    done = subprocess.run(unknown, capture_output=True, text=True, env=environment(), cwd=ROOT, check=False)
    assert done.returncode == 2
    assert done.stderr == "error: clips-mllm: no command 'pretrian'; did you mean 'pretrain'?\n"


def tracked() -> list[Path]:
    done = subprocess.run(["git", "ls-files", "-co", "--exclude-standard"], capture_output=True, text=True, cwd=ROOT)
    if done.returncode:  # a source archive
        return [path for path in ROOT.rglob("*") if path.is_file() and not {".git", ".venv", "runs"} & set(path.parts)]
    return [ROOT / line for line in done.stdout.splitlines() if (ROOT / line).is_file()]


def test_no_file_names_a_package_index_or_a_private_path() -> None:
    hosts = re.compile(
        r"--(?:extra-)?index-url|--find-links|--trusted-host|files\.pythonhosted|/simple/?\b(?=[\s\"'])"
        r"|https?://(?:localhost|10\.|192\.168\.|172\.1[6-9])|/(?:tmp|root|home|work)/\w"
    )
    found = []
    for file in tracked():
        if file.suffix in {".png", ".jpg", ".parquet", ".tar"} or file.name == Path(__file__).name:
            continue
        for number, line in enumerate(file.read_text(errors="ignore").splitlines(), 1):
            if hosts.search(line):
                found.append(f"{file.relative_to(ROOT)}:{number}: {line.strip()[:100]}")
    assert not found


def test_the_lock_pins_every_line_and_nothing_else() -> None:
    lines = (ROOT / "requirements.lock").read_text().splitlines()
    pins = [line for line in lines if line.strip() and not line.lstrip().startswith("#")]
    pinned = re.compile(r"[A-Za-z0-9._-]+(\[[\w,-]+\])?==[\w.+!-]+( ; [\w\s.*<>=!'()-]+)?")
    assert pins and all(pinned.fullmatch(pin) for pin in pins)
    names = {re.split(r"[\[=]", pin)[0].lower().replace("_", "-") for pin in pins}
    assert {"torch", "transformers", "deepspeed", "jsonargparse", "docstring-parser", "pytest", "ruff"} <= names
