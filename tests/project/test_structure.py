"""What holds the repository together: one direction of imports, quick help, no private hosts."""

from __future__ import annotations

import ast
import os
import re
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from clips_mllm.cli import COMMANDS

ROOT = Path(__file__).parents[2]
PACKAGES = {"vision_tower": ROOT / "vision_tower", "clips_mllm": ROOT / "clips_mllm"}
PACKAGES["clips_eval"] = ROOT / "eval" / "clips_eval"
MAY_IMPORT = {
    "vision_tower": {"vision_tower"},
    "clips_mllm": {"vision_tower", "clips_mllm"},
    "clips_eval": {"vision_tower", "clips_mllm", "clips_eval"},
}


def imported(file: Path) -> set[str]:
    """Top-level packages that a file imports anywhere, also inside functions and TYPE_CHECKING."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import"
            found.add((node.module or "").partition(".")[0])
    return found


@pytest.mark.parametrize("package", PACKAGES)
def test_dependencies_point_one_way(package: str) -> None:
    files = sorted(PACKAGES[package].rglob("*.py"))
    assert files
    wrong = {str(file): imported(file) & set(PACKAGES) - MAY_IMPORT[package] for file in files}
    # The table of commands names modules of all packages, as strings, and imports them when they are called.
    assert not {file: names for file, names in wrong.items() if names}


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
